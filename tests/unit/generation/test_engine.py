"""The engine: a request gives the same in any company, and nothing that a request or a model does ends the engine."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from apt_jobs.errors import InvalidCheckpoint, InvalidInput, Unavailable
from apt_jobs.generation import engine as engine_module
from apt_jobs.generation.engine import Engine
from apt_jobs.generation.launches import Launched
from apt_jobs.generation.request import Stopped
from apt_jobs.generation.runner import SlotRunner
from apt_jobs.generation.sequences import Sequence
from tests.unit.generation.requests import DEADLINE_S, finish_after, spec, wait_until
from tests.unit.generation.tiny_model import CONTEXT_TOKENS, NEVER, SENTENCES, llama_config, save_model

TEXTS = ["The", "", "一个消息", "Rows join and leave", "x", SENTENCES[0], "late or forged.\n"]


def tokens_by_hand(folder: Path, text: str, num_new: int) -> list[int]:
    """The greedy tokens without a cache, a batch or an engine, while they fit the context."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = AutoTokenizer.from_pretrained(folder).encode(text) or [NEVER]
    prompt = len(tokens)
    for _ in range(num_new):
        with torch.inference_mode():
            tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    assert NEVER not in tokens[prompt:]
    return list(tokens[prompt:])


def by_hand(folder: Path, text: str, num_new: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    decoded = tokenizer.decode(tokens_by_hand(folder, text, num_new), skip_special_tokens=True)
    return str(decoded).rstrip("\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize("text", TEXTS)
def test_greedy_text_is_what_the_model_says(engine: Engine, model_dir: Path, text: str) -> None:
    assert engine.generate(model_dir, spec(text)).outputs == [by_hand(model_dir, text, 20)]


def test_texts_of_one_request_equal_the_same_texts_alone(engine: Engine, model_dir: Path) -> None:
    together = engine.generate(model_dir, spec(*TEXTS, max_length=90))
    alone = [engine.generate(model_dir, spec(text, max_length=90)) for text in TEXTS]
    assert together.outputs == [one.outputs[0] for one in alone]
    assert together.num_tokens == [one.num_tokens[0] for one in alone]
    assert together.truncated == [one.truncated[0] for one in alone]
    assert len(set(together.outputs)) > 3, "the model is varied enough for the test to mean something"


def test_requests_that_come_and_go_at_different_times_do_not_disturb_each_other(model_dir: Path) -> None:
    engine = Engine(device="cpu", max_rows=5)
    requests = [
        spec(
            TEXTS[number % 7],
            TEXTS[number % 3],
            max_length=1 + 13 * number % 70,
            temperature=number % 3 / 2,
            seed=number,
        )
        for number in range(18)
    ]
    alone = [engine.generate(model_dir, request) for request in requests]
    submitted = []
    for request in requests:
        submitted.append(engine.submit(model_dir, request))
        if len(submitted) % 4:  # the others arrive in a burst
            wait([submitted[len(submitted) // 2].future], timeout=0.01)
    assert [finish_after(request) for request in submitted] == alone
    engine.close()


def test_requests_of_many_threads_share_rounds(
    engine: Engine, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most_rows = 0
    decode = SlotRunner.decode

    def counting(runner: SlotRunner, sequences: list[Sequence]) -> Launched:
        nonlocal most_rows
        most_rows = max(most_rows, len(sequences))
        return decode(runner, sequences)

    monkeypatch.setattr(SlotRunner, "decode", counting)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda text: engine.generate(model_dir, spec(text, max_length=60)), TEXTS))
    assert [answer.outputs[0] for answer in answers] == engine.generate(model_dir, spec(*TEXTS, max_length=60)).outputs
    assert most_rows >= 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_seed_decides_the_text_whatever_else_is_in_the_batch(
    engine: Engine, model_dir: Path, temperature: float
) -> None:
    options: dict[str, Any] = {"temperature": temperature, "top_p": 0.95, "seed": 11}
    alone = engine.generate(model_dir, spec("The", **options)).outputs
    assert engine.generate(model_dir, spec("x", "The", "Rows", **options)).outputs[1:2] == alone
    other = engine.generate(model_dir, spec("The", **{**options, "seed": 12})).outputs
    assert (other == alone) is (temperature == 0.0)


def test_without_a_seed_samples_differ(engine: Engine, model_dir: Path) -> None:
    outputs = engine.generate(model_dir, spec("The", "The", "The", temperature=1.0)).outputs
    assert len(set(outputs)) == 3


def test_a_stop_string_ends_the_text_before_it(engine: Engine, model_dir: Path) -> None:
    whole = engine.generate(model_dir, spec("The", max_length=30)).outputs[0]
    stop = whole[8:11]
    answer = engine.generate(model_dir, spec("The", "x", max_length=30, stop=[stop]))
    assert answer.outputs[0] == whole[: whole.index(stop)]
    assert answer.num_tokens[0] < 30


def test_a_text_ends_with_the_end_token(tmp_path: Path, engine: Engine, model_dir: Path) -> None:
    tokens = tokens_by_hand(model_dir, "The", 10)
    folder = tmp_path / "ending"
    shutil.copytree(model_dir, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [NEVER, tokens[3]]}))
    answer = engine.generate(folder, spec("The", max_length=10))
    assert answer.num_tokens == [tokens.index(tokens[3])]


def test_a_prompt_longer_than_the_context_is_refused_alone(engine: Engine, model_dir: Path) -> None:
    other = engine.submit(model_dir, spec("The"))
    with pytest.raises(InvalidInput, match=r"text 1 has .* tokens; the context of model 'tiny' has 64"):
        engine.generate(model_dir, spec("x", SENTENCES[0] * 20))
    assert finish_after(other).num_tokens == [20]


def test_a_prompt_loses_its_beginning_if_that_is_asked_for(engine: Engine, model_dir: Path) -> None:
    long = SENTENCES[0] * 20
    answer = engine.generate(model_dir, spec(long, "The", "x" + long, max_length=10, truncate=True))
    assert answer.truncated == [True, False, True]
    assert answer.outputs[0] == answer.outputs[2], "what was cut off has no influence"
    assert answer.num_tokens == [10, 10, 10]


def test_a_full_context_ends_the_text(engine: Engine, model_dir: Path) -> None:
    answer = engine.generate(model_dir, spec("The", max_length=3 * CONTEXT_TOKENS))
    assert answer.num_tokens == [CONTEXT_TOKENS - answer.num_prompt_tokens[0]]
    assert answer.finish_reasons == ["length"]
    assert answer.truncated == [False]
    short = engine.generate(model_dir, spec("The", max_length=CONTEXT_TOKENS // 2))
    assert answer.outputs[0].startswith(short.outputs[0].rstrip("\N{REPLACEMENT CHARACTER}"))


@pytest.mark.parametrize(
    ("config", "model_class"),
    [
        (
            GPT2Config(
                vocab_size=340,
                n_positions=64,
                n_embd=32,
                n_layer=2,
                n_head=2,
                initializer_range=0.4,
                eos_token_id=NEVER,
            ),
            GPT2LMHeadModel,
        ),
        (
            MistralConfig(
                **{**llama_config().to_dict(), "model_type": "mistral", "sliding_window": 8, "architectures": None}
            ),
            MistralForCausalLM,
        ),
        (
            Lfm2Config(
                vocab_size=340,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=64,
                initializer_range=0.4,
                layer_types=["conv", "full_attention"],
                bos_token_id=None,
                eos_token_id=NEVER,
            ),
            Lfm2ForCausalLM,
        ),
        (
            MambaConfig(
                vocab_size=340,
                hidden_size=32,
                state_size=8,
                num_hidden_layers=2,
                initializer_range=0.4,
                bos_token_id=None,
                eos_token_id=NEVER,
            ),
            MambaForCausalLM,
        ),
    ],
    ids=["gpt2", "sliding-window", "convolutions", "mamba"],
)
def test_other_kinds_of_model_generate_the_same_together_and_by_hand(
    tmp_path: Path, config: Any, model_class: Any
) -> None:
    folder = save_model(tmp_path / "model", config, model_class)
    engine = Engine(device="cpu")
    assert engine.generate(folder, spec(*TEXTS)).outputs == [by_hand(folder, text, 20) for text in TEXTS]
    engine.close()


def test_a_stopped_request_ends_between_tokens_and_others_go_on(engine: Engine, long_model_dir: Path) -> None:
    endless = engine.submit(long_model_dir, spec(*["The"] * 8, max_length=4_096))
    other = engine.submit(long_model_dir, spec("x", max_length=300))
    wait_until(lambda: bool(endless.texts) and endless.texts[0].num_new > 3)
    endless.stop()
    with pytest.raises(Stopped):
        endless.future.result(timeout=DEADLINE_S)
    assert finish_after(other).num_tokens == [300]
    assert endless.texts[0].num_new < 4_096


def test_a_request_that_waits_can_be_stopped(long_model_dir: Path) -> None:
    engine = Engine(device="cpu", max_rows=1)
    running = engine.submit(long_model_dir, spec("The", max_length=4_096))
    waiting = engine.submit(long_model_dir, spec("x"))
    wait_until(lambda: bool(running.texts) and running.texts[0].num_new > 3)
    waiting.stop()
    with pytest.raises(Stopped):
        waiting.future.result(timeout=DEADLINE_S)
    running.stop()
    engine.close()


def test_more_texts_than_may_wait_are_refused(long_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "MAX_WAITING_ROWS", 10)
    engine = Engine(device="cpu", max_rows=1)
    running = engine.submit(long_model_dir, spec(*["The"] * 8, max_length=4_096))
    with pytest.raises(Unavailable, match="at most 10"):
        engine.submit(long_model_dir, spec(*["x"] * 6))
    running.stop()
    engine.close()
    with pytest.raises(Unavailable, match="shutting down"):
        engine.submit(long_model_dir, spec("x"))


def test_closing_answers_everyone(long_model_dir: Path) -> None:
    engine = Engine(device="cpu", max_rows=2)
    requests = [engine.submit(long_model_dir, spec("The", "x", max_length=4_096)) for _ in range(3)]
    engine.close()
    for request in requests:
        with pytest.raises(Unavailable):
            request.future.result(timeout=DEADLINE_S)


def test_a_model_that_diverged_says_so(tmp_path: Path, engine: Engine, model_dir: Path) -> None:
    folder = tmp_path / "diverged"
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    shutil.copytree(model_dir, folder)
    model.save_pretrained(folder)
    with pytest.raises(InvalidCheckpoint, match="NaN or infinity"):
        engine.generate(folder, spec("x"))


@pytest.mark.parametrize(
    ("error", "expected"),
    [(RuntimeError("boom"), InvalidCheckpoint), (torch.OutOfMemoryError("no room"), Unavailable)],
)
def test_a_model_that_breaks_while_it_runs_does_not_end_the_engine(
    engine: Engine,
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    expected: type[Exception],
) -> None:
    broke = threading.Event()
    decode = SlotRunner.decode

    def breaking(runner: SlotRunner, sequences: list[Sequence]) -> Launched:
        if not broke.is_set():
            broke.set()
            raise error
        return decode(runner, sequences)

    monkeypatch.setattr(SlotRunner, "decode", breaking)
    with pytest.raises(expected):
        engine.generate(model_dir, spec("x"))
    assert engine.generate(model_dir, spec("x")).num_tokens == [20]
