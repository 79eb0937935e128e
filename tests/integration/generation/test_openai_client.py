"""The official `openai` package against the dialect, on a web process and a worker with a tiny model."""

from typing import Any

import openai
import pytest

from tests.integration.generation.served import Generating


def test_models_are_listed_and_found_by_their_id(client: openai.OpenAI) -> None:
    assert {"tiny", "chatty"} <= {model.id for model in client.models.list()}
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("absent")
    assert caught.value.code == "model_not_found"


def test_completions_whole_and_streamed_are_the_same_text(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": "tiny",
        "prompt": ["The queue", "A"],
        "max_tokens": 12,
        "temperature": 0.7,
        "seed": 5,
    }
    whole = client.completions.create(**options)
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 24
    texts = ["", ""]
    reasons: dict[int, str] = {}
    usages = []
    for chunk in client.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        usages += [chunk.usage] if chunk.usage else []
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert [usage.total_tokens for usage in usages] == [whole.usage.total_tokens]


def test_a_stop_string_ends_a_completion(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tiny", prompt="The", max_tokens=20, temperature=0).choices[0].text
    stop = whole[4:6]
    cut = client.completions.create(model="tiny", prompt="The", max_tokens=20, temperature=0, stop=stop).choices[0]
    assert (cut.text, cut.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_a_chat_is_written_by_the_models_template_and_streams(client: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What is <|end|> here?"}]},
    ]
    whole = client.chat.completions.create(model="chatty", messages=messages, max_completion_tokens=9, seed=1)
    assert whole.choices[0].message.role == "assistant"
    chunks = list(client.chat.completions.create(model="chatty", messages=messages, max_tokens=9, seed=1, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert (chunks[0].choices[0].delta.role, chunks[-1].choices[0].finish_reason) == ("assistant", "length")


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_without_a_template_refuses_chats_by_its_name(client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError, match="'tiny' has no chat template"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}], stream=stream)


WRONG: list[tuple[dict[str, Any], type[openai.APIStatusError], str]] = [
    ({"model": "absent", "prompt": "x"}, openai.NotFoundError, "absent"),
    ({"model": "tiny", "prompt": "一" * 3_000}, openai.BadRequestError, "tokens"),
    ({"model": "tiny", "prompt": "x", "max_tokens": 0}, openai.BadRequestError, "max_tokens"),
    ({"model": "tiny", "prompt": "x", "n": 2}, openai.BadRequestError, "'n'"),
    ({"model": "tiny", "prompt": "x", "logit_bias": {"1": 5}}, openai.BadRequestError, "logit_bias"),
    ({"model": "tiny", "prompt": "x", "temperature": 9}, openai.BadRequestError, "temperature"),
    ({"model": "tiny", "prompt": [1, 2]}, openai.BadRequestError, "prompt"),
    ({"model": "tiny", "prompt": "x", "extra_body": {"unheard": 1}}, openai.BadRequestError, "unheard"),
    ({"model": "tiny", "prompt": "x", "stop": ["a"] * 9}, openai.BadRequestError, "stop"),
]


@pytest.mark.parametrize(("request_of", "error", "word"), WRONG)
def test_wrong_requests_are_refused_as_openai_does(
    client: openai.OpenAI, request_of: dict[str, Any], error: type[openai.APIStatusError], word: str
) -> None:
    with pytest.raises(error) as caught:
        client.completions.create(**request_of)
    assert word in caught.value.message
    assert isinstance(caught.value.body, dict)
    assert {"message", "type", "param", "code"} == caught.value.body.keys()


def test_every_error_of_the_dialect_has_its_form(stack: Generating, client: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="sk-wrong").models.list()
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("GET", "/v1", 404)):
        answer = stack.client.request(method, path, headers={"accept": "text/html"})
        assert (answer.status_code, list(answer.json())) == (status, ["error"])
    broken = stack.client.post("/v1/completions", content=b"{", headers={"content-type": "application/json"})
    assert (broken.status_code, broken.json()["error"]["type"]) == (400, "invalid_request_error")
