"""Embeddings: the mean of the last hidden states, whatever shares the batch, beside texts that are generated."""

import base64
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from apt_jobs.errors import InvalidInput, Unavailable
from apt_jobs.generation import embeddings
from apt_jobs.generation.engine import Engine
from apt_jobs.generation.request import Stopped
from apt_jobs.jobs.spec import GenerateSpec
from tests.unit.generation.tiny_model import CONTEXT_TOKENS, SENTENCES

INPUTS: list[Any] = ["The", *SENTENCES[:2], [5, 6, 7], "一个消息", "x"]


def spec(*inputs: Any) -> GenerateSpec:
    return GenerateSpec(kind="generate", texts=[""], embed=list(inputs))


def numbers(encoded: str) -> torch.Tensor:
    raw = base64.b64decode(encoded)
    return torch.tensor(struct.unpack(f"<{len(raw) // 4}f", raw))


def by_hand(folder: Path, one: Any) -> torch.Tensor:
    tokens = AutoTokenizer.from_pretrained(folder).encode(one) if isinstance(one, str) else one
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        hidden_TD: torch.Tensor = model.base_model(input_ids=torch.tensor([tokens])).last_hidden_state[0]
    return hidden_TD.mean(0)


def test_they_are_the_mean_of_the_last_hidden_states_in_any_company(engine: Engine, model_dir: Path) -> None:
    generating = engine.submit(model_dir, GenerateSpec(kind="generate", texts=["The"], max_length=30))
    found = engine.generate(model_dir, spec(*INPUTS))
    for one, output in zip(INPUTS, found.outputs, strict=True):
        torch.testing.assert_close(numbers(output), by_hand(model_dir, one), rtol=1e-4, atol=1e-5)
    assert found.num_prompt_tokens[3] == 3
    assert found.num_tokens == [0] * len(INPUTS)
    assert generating.future.result().num_tokens == [30]


def test_many_inputs_are_read_a_few_at_a_time(engine: Engine, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    embed = embeddings._embed

    def counted(model: Any, prompts: list[list[int]]) -> list[str]:
        sizes.append(max(map(len, prompts)) * len(prompts))
        return embed(model, prompts)

    monkeypatch.setattr(embeddings, "_embed", counted)
    assert len(engine.generate(model_dir, spec(*[[1] * 30] * 100)).outputs) == 100
    assert max(sizes) <= embeddings._CPU_TOKENS


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (["a", [1] * (CONTEXT_TOKENS + 1)], f"input 1 has {CONTEXT_TOKENS + 1:,} tokens; the context"),
        ([[2**30]], "input 0 has the token"),
    ],
)
def test_inputs_that_the_model_cannot_read_are_named(
    engine: Engine, model_dir: Path, inputs: list[Any], words: str
) -> None:
    with pytest.raises(InvalidInput, match=words):
        engine.generate(model_dir, spec(*inputs))


def test_an_answer_is_bounded(engine: Engine, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "MAX_VALUES", 100)
    with pytest.raises(InvalidInput, match="send at most"):
        engine.generate(model_dir, spec(*["a"] * 50))


def test_a_want_of_memory_reads_less_at_once_and_fails_one_alone(
    engine: Engine, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed = embeddings._embed

    def scarce(model: Any, prompts: list[list[int]]) -> list[str]:
        if len(prompts) > 2 or len(prompts[0]) > 20:
            raise torch.OutOfMemoryError("no room")
        return embed(model, prompts)

    monkeypatch.setattr(embeddings, "_embed", scarce)
    assert len(engine.generate(model_dir, spec(*[[1] * 10] * 9)).outputs) == 9
    with pytest.raises(Unavailable, match="no memory"):
        engine.generate(model_dir, spec([1] * 30))
    assert engine.generate(model_dir, spec([1])).outputs


def test_a_request_that_is_stopped_is_not_read(engine: Engine, model_dir: Path) -> None:
    request = engine.submit(model_dir, spec(*[[1] * 60] * 500))
    request.stop()
    with pytest.raises(Stopped):
        request.future.result()
    assert engine.generate(model_dir, spec("a")).outputs
