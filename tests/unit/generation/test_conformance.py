"""What every runner owes a request, whichever serves its model: the same options, the same texts, the same errors."""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from apt_jobs.errors import InvalidCheckpoint, InvalidInput
from apt_jobs.generation import engine as engine_module
from apt_jobs.generation.engine import Engine
from apt_jobs.generation.launches import Launched
from apt_jobs.generation.models import LoadedModel
from apt_jobs.generation.reference import ReferenceRunner
from apt_jobs.generation.request import Generated
from apt_jobs.generation.runner import Runner, SlotRunner
from apt_jobs.generation.sequences import Sequence
from apt_jobs.jobs.spec import GenerateSpec
from tests.unit.generation.tiny_model import NEVER, llama_config, save_model

TEXTS = ["The", "", "Rows join and leave", "x"]
RUNNERS: list[type[Any]] = [SlotRunner, ReferenceRunner]
SCHEMA = {
    "type": "object",
    "properties": {
        "ok": {"type": "boolean"},
        "kinds": {"type": "array", "items": {"enum": ["late", 7]}, "maxItems": 2},
    },
    "required": ["ok", "kinds"],
    "additionalProperties": False,
}


def reference_runner(model: LoadedModel, *, max_rows: int, compile_graphs: bool) -> Runner:
    return ReferenceRunner(model, max_rows=max_rows)


@pytest.fixture(scope="module", params=RUNNERS)
def runner_class(request: pytest.FixtureRequest) -> Iterator[type[Any]]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param is ReferenceRunner:
            patch.setattr(engine_module, "make_runner", reference_runner)
        yield request.param


@pytest.fixture(scope="module")
def engine(runner_class: type[Any]) -> Iterator[Engine]:
    engine = Engine(warm_models=2, device="cpu", max_rows=8)
    yield engine
    engine.close()


Generate = Callable[..., Generated]


@pytest.fixture
def generate(engine: Engine, long_model_dir: Path) -> Generate:
    """Texts and options in, the answer out."""

    def ask(*texts: str, folder: Path = long_model_dir, **options: Any) -> Generated:
        options = {"max_length": 12, **options}
        return engine.generate(folder, GenerateSpec(kind="generate", texts=list(texts), **options))

    return ask


def logits_by_hand(folder: Path, tokens: list[int]) -> torch.Tensor:
    """Return the logits (T, V) without a cache, a batch or an engine."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()
    return logits


def test_draws_of_a_text_differ_and_are_as_they_were_alone(generate: Generate) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "seed": 5}
    answer = generate("The", "x", n=3, **options)
    assert len(set(answer.outputs)) == 6
    assert (len(answer.num_prompt_tokens), len(answer.truncated), len(answer.num_tokens)) == (2, 2, 6)
    assert generate("x", n=2, **options).outputs == answer.outputs[3:5]
    assert generate("The", **options).outputs == answer.outputs[:1]
    assert generate("The", n=2).outputs[0] == generate("The", n=2).outputs[1], "greedy"


def test_a_seed_decides_the_text_in_any_company(generate: Generate) -> None:
    options: dict[str, Any] = {"temperature": 0.8, "top_k": 40, "min_p": 0.01, "frequency_penalty": 0.3, "seed": 11}
    alone = generate("The", **options).outputs
    assert generate("x", "The", "Rows", **options).outputs[1:2] == alone


def test_a_bias_forces_and_bans_tokens_and_leaves_the_next_request_alone(generate: Generate) -> None:
    before = generate(*TEXTS).outputs
    assert generate("The", logit_bias={40: 100.0}).outputs == ["H" * 12]
    tokens = [token["bytes"] for token in (generate("The", logprobs=0).logprobs or [[]])[0]]
    banned = generate("The", logit_bias=dict.fromkeys(range(50, 200), -100.0), logprobs=0)
    assert [token["bytes"] for token in (banned.logprobs or [[]])[0]] != tokens
    assert generate(*TEXTS).outputs == before


def test_logprobs_are_those_of_the_model_whatever_is_done_to_them(generate: Generate, long_model_dir: Path) -> None:
    answer = generate("The", "x", logprobs=4, temperature=0.9, seed=1, top_k=30, repetition_penalty=1.2)
    assert answer.logprobs is not None
    tokenizer = AutoTokenizer.from_pretrained(long_model_dir)
    by_bytes = {tokenizer_bytes(tokenizer, token): token for token in range(len(tokenizer))}
    by_bytes |= {f"<[{token}]>".encode(): token for token in range(len(tokenizer), 340)}
    prompt = tokenizer.encode("The")
    tokens = [by_bytes[bytes(one["bytes"])] for one in answer.logprobs[0]]
    expected = logits_by_hand(long_model_dir, prompt + tokens).log_softmax(-1)[len(prompt) - 1 : -1]
    assert [len(one) for one in answer.logprobs] == answer.num_tokens == [12, 12]
    for place, one in enumerate(answer.logprobs[0]):
        assert one["logprob"] == pytest.approx(float(expected[place, tokens[place]]), abs=1e-4)
        likeliest = expected[place].topk(4)
        assert [like["logprob"] for like in one["top_logprobs"]] == pytest.approx(likeliest.values.tolist(), abs=1e-4)
    assert generate("The", logprobs=0, temperature=0).logprobs is not None
    assert generate("The").logprobs is None


def tokenizer_bytes(tokenizer: Any, token: int) -> bytes:
    back = {character: byte for byte, character in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]  # its
    return bytes(back.get(character, ord("?")) for character in tokenizer.convert_ids_to_tokens(token))


def test_logprobs_end_where_a_stop_string_begins(generate: Generate) -> None:
    whole = generate("The", logprobs=0)
    text, tokens = whole.outputs[0], (whole.logprobs or [[]])[0]
    stop = next(text[at : at + 2] for at in range(3, 9) if text.index(text[at : at + 2]) == at)
    cut = generate("The", logprobs=0, stop=[stop])
    assert cut.outputs[0] == text[: text.index(stop)]
    shown = (cut.logprobs or [[]])[0]
    assert shown == tokens[: len(shown)]
    assert 0 < len(shown) < len(tokens)


def test_a_text_ends_at_a_stop_token_or_string_but_not_before_its_min_tokens(generate: Generate) -> None:
    options: dict[str, Any] = {"logit_bias": {40: 100.0}}  # H
    at_once = generate("x", stop_token_ids=[40], **options)
    assert (at_once.outputs, at_once.num_tokens, at_once.finish_reasons) == ([""], [0], ["stop"])
    later = generate("x", stop_token_ids=[40], min_tokens=5, **options)
    assert (later.num_tokens, later.finish_reasons) == ([5], ["stop"])
    assert "H" not in later.outputs[0]
    assert generate("x", stop=["H"], **options).outputs == [""]
    assert generate("x", stop=["H"], min_tokens=4, **options).outputs == ["HHHH"]
    assert generate("x", stop=["HH"], min_tokens=3, **options).outputs == ["HHH"]


def test_texts_match_their_schema_and_their_neighbours_are_unharmed(generate: Generate, engine: Engine) -> None:
    answer = generate(*TEXTS, json_schema=SCHEMA, max_length=400, temperature=1.0, seed=3, n=2)
    assert answer.finish_reasons == ["stop"] * 8
    for text in answer.outputs:
        found = json.loads(text)
        assert set(found) == {"ok", "kinds"}
        assert all(kind in ("late", 7) for kind in found["kinds"])
    assert len(set(answer.outputs)) > 2


def test_texts_match_their_regular_expression_beside_free_ones(
    engine: Engine, generate: Generate, long_model_dir: Path
) -> None:
    free = generate("The", max_length=60).outputs
    pattern = r"(late|forged) [0-9]{3}(-[a-c]+)?\."
    submitted = [
        engine.submit(long_model_dir, GenerateSpec(kind="generate", texts=["The"], max_length=60, **options))
        for options in ({}, {"regex": pattern}, {"regex": pattern, "temperature": 2.0, "seed": 9, "min_tokens": 9})
    ]
    answers = [request.future.result(timeout=90) for request in submitted]
    assert answers[0].outputs == free
    for answer in answers[1:]:
        assert re.fullmatch(pattern, answer.outputs[0])
        assert answer.finish_reasons == ["stop"]


def test_a_grammar_that_is_not_done_ends_with_length(generate: Generate) -> None:
    answer = generate("The", regex="[a-z]{50}", max_length=7)
    assert answer.finish_reasons == ["length"]
    assert answer.outputs[0].isalpha()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"json_schema": {"type": "strin"}}, "json_schema cannot be used: Invalid type: strin"),
        ({"json_schema": {"type": "integer", "minimum": 5, "maximum": 3}}, "minimum (5) is greater than maximum (3)"),
        ({"json_schema": {"$ref": "http://example.org/x"}}, "http://example.org/x"),
        ({"json_schema": {"type": "string", "pattern": "(a"}}, "unclosed group"),
        ({"json_schema": {"not": {"type": "string"}}}, "not"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": r"[^\s\S]"}, "no text of this model's tokens matches it"),
        ({"regex": "(a{500}){500}{500}"}, "too many expressions"),
        ({"logit_bias": {9_999: 1.0}}, "logit_bias names token 9999"),
        ({"stop_token_ids": [9_999]}, "stop_token_ids names token 9999"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(generate: Generate, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        generate("The", **options)
    assert words in str(caught.value)


def test_what_a_model_wants_of_its_sampling_is_the_default(
    generate: Generate, long_model_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "wants"
    shutil.copytree(long_model_dir, folder)
    wanted = {"do_sample": True, "temperature": 0.6, "top_k": 7, "top_p": 0.9, "eos_token_id": NEVER}
    (folder / "generation_config.json").write_text(json.dumps(wanted))
    default = generate("The", folder=folder, seed=4).outputs
    assert default == generate("The", seed=4, temperature=0.6, top_k=7, top_p=0.9).outputs
    assert default != generate("The", folder=folder, seed=4, temperature=0).outputs


def test_a_weight_that_is_nan_fails_the_requests_that_meet_it(
    engine: Engine, tmp_path: Path, runner_class: type[Any]
) -> None:
    folder = save_model(tmp_path / "poisoned", llama_config(tie_word_embeddings=False))
    model = AutoModelForCausalLM.from_pretrained(folder)
    poison = AutoTokenizer.from_pretrained(folder).encode("q")[0]
    clean = engine.generate(folder, GenerateSpec(kind="generate", texts=TEXTS, max_length=12)).outputs
    with torch.no_grad():
        model.model.embed_tokens.weight[poison] = math.nan
    model.save_pretrained(folder)
    good = [GenerateSpec(kind="generate", texts=TEXTS, max_length=12, logit_bias={poison: -100.0}) for _ in range(2)]
    bad = GenerateSpec(kind="generate", texts=["q", "aq"], max_length=12)
    requests = [engine.submit(folder, one) for one in (good[0], bad, good[1], bad)]
    for request in (requests[1], requests[3]):
        with pytest.raises(InvalidCheckpoint, match="NaN or infinity"):
            request.future.result(timeout=90)
    assert [requests[place].future.result(timeout=90).outputs for place in (0, 2)] == [clean, clean]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), RuntimeError("boom")])
def test_nobody_is_lost_when_a_batch_is_too_large(
    long_model_dir: Path, runner_class: type[Any], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    engine = Engine(device="cpu", max_rows=8)

    def generate(*texts: str, max_length: int = 12, **more: Any) -> Generated:
        asked = GenerateSpec(kind="generate", texts=list(texts), max_length=max_length, **more)
        return engine.generate(long_model_dir, asked)

    options: dict[str, Any] = {"temperature": 1.0, "seed": 3, "n": 2, "logprobs": 1}
    expected = generate(*TEXTS, **options)
    grammar = generate("x", json_schema=SCHEMA, max_length=100, seed=1, temperature=1.0)
    decode = runner_class.decode
    sizes = []

    def breaking(runner: Any, sequences: list[Sequence]) -> Launched:
        sizes.append(len(sequences))
        if len(sequences) > 2:
            raise error
        launched: Launched = decode(runner, sequences)
        return launched

    monkeypatch.setattr(runner_class, "decode", breaking)
    found = generate(*TEXTS, **options)
    assert (found.outputs, found.finish_reasons) == (expected.outputs, expected.finish_reasons)
    assert max(sizes) > 2
    assert generate("x", json_schema=SCHEMA, max_length=100, seed=1, temperature=1.0) == grammar
    engine.close()
