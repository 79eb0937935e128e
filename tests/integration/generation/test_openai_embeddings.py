"""Embeddings, as the official `openai` package asks for them."""

import base64
import struct
from typing import Any

import openai
import pytest
from transformers import AutoTokenizer

from tests.integration.generation.served import Generating
from tests.integration.generation.test_openai_batches import ended, rows, uploaded


def test_texts_and_tokens_in_both_encodings(stack: Generating, client: openai.OpenAI) -> None:
    texts = ["What is a queue?", "一个消息"]
    found = client.embeddings.create(model="tiny", input=texts)  # the client itself asks for base64
    assert [row.index for row in found.data] == [0, 1]
    tokenizer = AutoTokenizer.from_pretrained(stack.settings.local_models_dir / "tiny")
    tokens = [tokenizer.encode(text) for text in texts]
    assert found.usage.prompt_tokens == found.usage.total_tokens == sum(map(len, tokens))
    for asked in (tokens, texts):
        plain = client.embeddings.create(model="tiny", input=asked, encoding_format="float")
        for one, other in zip(plain.data, found.data, strict=True):
            assert one.embedding == pytest.approx(other.embedding, rel=1e-4, abs=1e-5)
    alone = client.embeddings.create(model="tiny", input=tokens[0], encoding_format="float").data
    assert [row.embedding for row in alone] == [pytest.approx(found.data[0].embedding, rel=1e-4, abs=1e-5)]
    raw = stack.client.post("/v1/embeddings", json={"model": "tiny", "input": "a", "encoding_format": "base64"}).json()
    encoded = base64.b64decode(raw["data"][0]["embedding"])
    assert len(struct.unpack(f"<{len(encoded) // 4}f", encoded)) == len(found.data[0].embedding)


def test_more_inputs_than_a_batch_has_texts(client: openai.OpenAI) -> None:
    assert len(client.embeddings.create(model="tiny", input=[f"number {index}" for index in range(300)]).data) == 300


@pytest.mark.parametrize(
    ("fields", "error", "word"),
    [
        ({"model": "absent"}, openai.NotFoundError, "absent"),
        ({"dimensions": 64}, openai.BadRequestError, "dimensions"),
        ({"input": ""}, openai.BadRequestError, "input"),
        ({"input": []}, openai.BadRequestError, "input"),
        ({"input": [-1]}, openai.BadRequestError, "input"),
        ({"input": [["a"]]}, openai.BadRequestError, "input"),
        ({"input": ["a"] * 2_049}, openai.BadRequestError, "input"),
        ({"input": "一" * 3_000}, openai.BadRequestError, "input 0 has .* the context"),
        ({"input": [[2**30]]}, openai.BadRequestError, "token"),
        ({"encoding_format": "int8"}, openai.BadRequestError, "encoding_format"),
    ],
)
def test_wrong_inputs_are_refused(
    client: openai.OpenAI, fields: dict[str, Any], error: type[openai.APIStatusError], word: str
) -> None:
    asked: dict[str, Any] = {"model": "tiny", "input": "a", **fields}
    with pytest.raises(error, match=word):
        client.embeddings.create(**asked)


def test_a_batch_embeds(client: openai.OpenAI) -> None:
    line = '{"custom_id":"%d","method":"POST","url":"/v1/embeddings","body":{"model":"tiny","input":["a","b"]}}'
    file_id = uploaded(client, line % 1, line % 2)
    batch = ended(
        client,
        client.batches.create(input_file_id=file_id, endpoint="/v1/embeddings", completion_window="24h"),
    )
    assert batch.status == "completed"
    direct = client.embeddings.create(model="tiny", input=["a", "b"], encoding_format="float")
    for row in rows(client, batch.output_file_id):
        for one, other in zip(row["response"]["body"]["data"], direct.data, strict=True):
            assert one["embedding"] == pytest.approx(other.embedding, rel=1e-4, abs=1e-5)
