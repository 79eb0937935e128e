"""The official `openai` package against the dialect, on a web process and a worker with a tiny model."""

import json
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
    ({"model": "tiny", "prompt": "x", "n": 65}, openai.BadRequestError, "n: "),
    ({"model": "tiny", "prompt": ["x"] * 9, "n": 8}, openai.BadRequestError, "9 texts with n=8"),
    ({"model": "tiny", "prompt": "x", "best_of": 2}, openai.BadRequestError, "best_of"),
    ({"model": "tiny", "prompt": "x", "logit_bias": {"1": 500}}, openai.BadRequestError, "logit_bias"),
    ({"model": "tiny", "prompt": "x", "logit_bias": {"9999": 5}}, openai.BadRequestError, "has tokens 0 to 339"),
    ({"model": "tiny", "prompt": "x", "extra_body": {"regex": "("}}, openai.BadRequestError, "unclosed group"),
    (
        {"model": "tiny", "prompt": "x", "extra_body": {"regex": "a", "response_format": {"type": "json_object"}}},
        openai.BadRequestError,
        "exclude each other",
    ),
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


def test_draws_of_a_prompt_differ_and_are_the_same_again_whole_and_streamed(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": "tiny",
        "prompt": ["The queue", "A"],
        "max_tokens": 8,
        "temperature": 1,
        "seed": 3,
        "n": 3,
    }
    whole = client.completions.create(**options)
    texts = [choice.text for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == list(range(6))
    assert len(set(texts)) == 6
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 48
    alone = client.completions.create(**{**options, "prompt": "A", "n": 1})
    assert alone.choices[0].text == texts[3]
    assert alone.usage is not None
    both = whole.usage.prompt_tokens - alone.usage.prompt_tokens
    assert 0 < both < whole.usage.prompt_tokens, "a prompt counts once"
    streamed = [""] * 6
    for chunk in client.completions.create(**options, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts


def test_logprobs_of_chats_and_completions_whole_and_streamed(client: openai.OpenAI) -> None:
    chat: dict[str, Any] = {
        "model": "chatty",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 9,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 3,
    }
    choice = client.chat.completions.create(**chat).choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    tokens = choice.logprobs.content
    assert len(tokens) == 9
    assert (
        bytes(byte for token in tokens for byte in token.bytes or [])
        .decode(errors="ignore")
        .startswith((choice.message.content or "?").split("\N{REPLACEMENT CHARACTER}")[0])
    )
    for token in tokens:
        assert token.top_logprobs[0].token == token.token, "greedy"
        assert token.top_logprobs[0].logprob == token.logprob < 0
        assert [like.logprob for like in token.top_logprobs] == sorted(
            (like.logprob for like in token.top_logprobs), reverse=True
        )
    streamed = [
        token
        for chunk in client.chat.completions.create(**chat, stream=True)
        for one in chunk.choices
        if one.logprobs is not None
        for token in one.logprobs.content or []
    ]
    assert streamed == tokens
    answer = client.completions.create(model="tiny", prompt="The", max_tokens=5, temperature=0, logprobs=2).choices[0]
    assert answer.logprobs is not None
    assert answer.logprobs.top_logprobs is not None
    assert answer.logprobs.text_offset is not None
    assert answer.logprobs.tokens is not None
    assert [len(likely) for likely in answer.logprobs.top_logprobs] == [2] * 5
    assert answer.logprobs.text_offset[2] == len(answer.logprobs.tokens[0]) + len(answer.logprobs.tokens[1])


SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["late", "forged"]}},
    "required": ["ok", "kind"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_format_makes_json_of_its_schema(client: openai.OpenAI, stream: bool) -> None:
    options: dict[str, Any] = {
        "model": "chatty",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 200,
        "temperature": 0.5,
        "seed": 1,
        "response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA, "strict": True}},
    }
    if stream:
        chunks = list(client.chat.completions.create(**options, stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        choice = client.chat.completions.create(**options).choices[0]
        text, reason = choice.message.content or "", choice.finish_reason
    found = json.loads(text)
    assert (set(found), type(found["ok"]), reason) == ({"ok", "kind"}, bool, "stop")
    assert found["kind"] in ("late", "forged")


@pytest.mark.parametrize(
    ("response_format", "word"),
    [
        ({"type": "json_schema", "json_schema": {"name": "it", "schema": {"type": "strin"}}}, "Invalid type: strin"),
        ({"type": "json_schema", "json_schema": {"name": "it", "schema": {"enum": []}}}, "nsatisfiable"),
        ({"type": "json_schema"}, "do not go together"),
        ({"type": "xml"}, "response_format"),
    ],
)
def test_a_response_format_that_cannot_be_is_refused(client: openai.OpenAI, response_format: Any, word: str) -> None:
    messages: Any = [{"role": "user", "content": "Hi"}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="chatty", messages=messages, response_format=response_format)
    assert word in caught.value.message


def test_our_own_dialect_has_the_same_options(stack: Generating) -> None:
    body: dict[str, Any] = {"text": "The", "model": "tiny", "max_tokens": 6, "seed": 1, "temperature": 1.0}
    answer = stack.client.post("/api/generate", json={**body, "n": 2, "logprobs": 1}).json()
    assert answer["generated_text"] == answer["choices"][0]["text"] != answer["choices"][1]["text"]
    assert [len(choice["logprobs"]) for choice in answer["choices"]] == [6, 6]
    batch = {"texts": ["The", "A"], "model": "tiny", "max_tokens": 6, "n": 2, "regex": "[0-9]{4}"}
    results = stack.client.post("/api/batch_generate", json=batch).json()["results"]
    texts = [choice["text"] for result in results for choice in result["choices"]]
    assert all(len(text) == 4 and text.isdecimal() for text in texts)
    assert len(texts) == 4
    wrong = stack.client.post("/api/generate", json={**body, "json_schema": {"type": "strin"}})
    assert (wrong.status_code, "Invalid type: strin" in wrong.json()["detail"]) == (422, True)
    biased = stack.client.post("/api/generate", json={**body, "temperature": 0, "logit_bias": {"40": 100}}).json()
    assert biased["generated_text"] == "H" * 6
    with stack.client.stream("POST", "/api/generate", json={**body, "n": 2, "stream": True}) as stream:
        lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line.startswith("data: ")]
    streamed = ["", ""]
    for event in map(json.loads, lines[:-1]):
        streamed[event["index"]] += event["text"]
    assert streamed == [choice["text"] for choice in answer["choices"]]


def test_every_error_of_the_dialect_has_its_form(stack: Generating, client: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="sk-wrong").models.list()
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("GET", "/v1", 404)):
        answer = stack.client.request(method, path, headers={"accept": "text/html"})
        assert (answer.status_code, list(answer.json())) == (status, ["error"])
    broken = stack.client.post("/v1/completions", content=b"{", headers={"content-type": "application/json"})
    assert (broken.status_code, broken.json()["error"]["type"]) == (400, "invalid_request_error")
