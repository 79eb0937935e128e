"""Prompts that begin as another text: read once, in bounded memory, and the text is the same."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from apt_jobs.generation import runner as runner_module
from apt_jobs.generation.engine import Engine
from apt_jobs.generation.models import LoadedModel, load_model
from apt_jobs.generation.probe import make_runner
from apt_jobs.generation.request import Generated
from apt_jobs.generation.runner import SlotRunner
from apt_jobs.generation.scheduler import Scheduler
from apt_jobs.jobs.spec import GenerateSpec
from tests.unit.generation.test_architectures import run, sequence

SHARED = "Rows join and leave between tokens. " * 12
ENDS = ["The queue", "A message", "The queue is", "x"]


@pytest.fixture
def without(long_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """An engine that reads every prompt."""
    with monkeypatch.context() as patch:
        patch.setattr(runner_module, "MIN_PREFIX_CPU", 1 << 30)
        engine = Engine(device="cpu")
        engine.generate(long_model_dir, spec("x"))  # its runner is made now
    yield engine
    engine.close()


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(device="cpu")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def model(long_model_dir: Path) -> LoadedModel:
    return load_model(long_model_dir, torch.device("cpu"))


def spec(*texts: str, **options: Any) -> GenerateSpec:
    return GenerateSpec(kind="generate", texts=list(texts), **{"max_length": 12, **options})


def told(answer: Generated) -> tuple[list[str], list[int], list[int]]:
    return answer.outputs, answer.num_prompt_tokens, answer.num_tokens


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 7, "n": 3}])
def test_texts_are_the_same_with_and_without_what_is_known(
    engine: Engine, without: Engine, long_model_dir: Path, options: dict[str, Any]
) -> None:
    asked = spec(*[SHARED + end for end in ENDS], **options)
    expected = without.generate(long_model_dir, asked)
    assert expected.num_reused == 0
    together = engine.generate(long_model_dir, asked)
    assert told(together) == told(expected)
    one = together.num_prompt_tokens[3]
    assert together.num_reused > 2 * one, "the first is read, the others begin as it does"
    later = engine.generate(long_model_dir, asked)
    assert told(later) == told(expected)
    assert later.num_reused > 3 * one, "they are known from before"


def test_a_chat_that_goes_on_reads_only_what_is_new(engine: Engine, long_model_dir: Path) -> None:
    first = engine.generate(long_model_dir, spec(SHARED))
    assert first.num_reused == 0
    second = engine.generate(long_model_dir, spec(SHARED + " Then"))
    assert second.num_prompt_tokens[0] - second.num_reused < 8
    assert engine.generate(long_model_dir, spec("x")).num_reused == 0


def test_what_is_kept_is_bounded_and_the_latest_used_stays(model: LoadedModel) -> None:
    runner = make_runner(model, max_rows=2, compile_graphs=False)
    assert isinstance(runner, SlotRunner)
    prefixes = runner._prefixes
    prefixes._max_tokens = 150
    prompts = [[number] * 60 for number in (5, 6, 7)]
    for prompt in (prompts[0], prompts[1], prompts[0], prompts[2]):
        run(Scheduler(runner, "m"), [sequence(prompt, context=8_192, max_tokens=4)])
        assert prefixes.num_tokens <= 150
    known = {kept.tokens[0] for kept in prefixes._kept}
    assert known == {5, 7}
    runner.close()
    assert prefixes.num_tokens == 0


def test_a_row_that_was_nan_leaves_nothing(model: LoadedModel) -> None:
    runner = make_runner(model, max_rows=2, compile_graphs=False)
    assert isinstance(runner, SlotRunner)
    one = sequence(list(range(60)), context=8_192, max_tokens=40)
    scheduler = Scheduler(runner, "m")
    scheduler.submit(one)
    scheduler.step()
    with torch.inference_mode():
        runner._cache._values[0][one.slot, :, 3] = torch.nan
    run(scheduler, [])
    assert one.is_finished
    assert runner._prefixes.num_tokens == 0
