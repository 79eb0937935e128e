"""The scheduler: interactive before batch, nobody lost to an error, and the same text in any company."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from apt_jobs.errors import AptJobsError, InvalidCheckpoint, Unavailable
from apt_jobs.generation.attention import runs_of
from apt_jobs.generation.constraints import Constraint
from apt_jobs.generation.launches import Launched
from apt_jobs.generation.models import LoadedModel, load_model
from apt_jobs.generation.probe import make_runner
from apt_jobs.generation.reference import ReferenceRunner
from apt_jobs.generation.row_state import Sampling
from apt_jobs.generation.runner import SlotRunner, decode_step
from apt_jobs.generation.scheduler import Scheduler
from apt_jobs.generation.sequences import Delta, Priority, SamplingParams, Sequence, SequenceState

NUM_NEW = 24
PROMPTS = [[5], [7, 8, 9], list(range(20, 50)), [9] * 11, [1, 2], [300, 301, 302, 303], [77], list(range(100, 140))]


@pytest.fixture(scope="module")
def model(long_model_dir: Path) -> LoadedModel:
    return load_model(long_model_dir, torch.device("cpu"))


def slot_runner(model: LoadedModel, max_rows: int = 4) -> SlotRunner:
    runner = make_runner(model, max_rows=max_rows, compile_graphs=False)
    assert isinstance(runner, SlotRunner)
    return runner


class Heard:
    """A sequence and what its owner heard."""

    def __init__(self, prompt: list[int], priority: Priority = Priority.INTERACTIVE, **params: Any) -> None:
        self.deltas: list[Delta] = []
        params = {"max_tokens": NUM_NEW, **params}
        self.sequence = Sequence(
            list(prompt), SamplingParams(**params), 8_192, self.deltas.append, priority, group=object()
        )

    @property
    def tokens(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.token_ids]

    @property
    def error(self) -> AptJobsError | None:
        return self.deltas[-1].error


def run(scheduler: Scheduler, heard: list[Heard], most: int = 2_000) -> None:
    for each in heard:
        scheduler.submit(each.sequence)
    for _ in range(most):
        if not scheduler.has_work:
            return
        scheduler.step()
    raise AssertionError("the scheduler does not come to an end")


def params_of(number: int) -> dict[str, Any]:
    return [
        {},
        {"temperature": 1.0, "seed": number},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "seed": number},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.2, "temperature": 0.5, "min_p": 0.05, "seed": number},
    ][number % 4]


def alone(model: LoadedModel) -> list[list[int]]:
    texts = []
    for number, prompt in enumerate(PROMPTS):
        heard = Heard(prompt, **params_of(number))
        run(Scheduler(slot_runner(model), "m"), [heard])
        texts.append(heard.tokens)
    return texts


def test_a_text_is_the_same_alone_in_company_in_chunks_and_by_the_reference_runner(model: LoadedModel) -> None:
    expected = alone(model)
    for scheduler in (
        Scheduler(slot_runner(model), "m"),
        Scheduler(slot_runner(model, 8), "m", prefill_tokens=5, prefill_tokens_beside=3),
        Scheduler(ReferenceRunner(model, max_rows=3), "m"),
    ):
        heard = [Heard(prompt, **params_of(number)) for number, prompt in enumerate(PROMPTS)]
        run(scheduler, heard)
        assert [each.tokens for each in heard] == expected
        assert {each.deltas[-1].finish_reason for each in heard} == {"length"}


def test_an_interactive_sequence_preempts_a_batch_one_which_ends_with_the_same_text(model: LoadedModel) -> None:
    expected = alone(model)
    scheduler = Scheduler(slot_runner(model, 2), "m")
    batch = [Heard(prompt, Priority.BATCH, **params_of(number)) for number, prompt in enumerate(PROMPTS)]
    for each in batch:
        scheduler.submit(each.sequence)
    for _ in range(6):
        scheduler.step()
    quick = [Heard([5], max_tokens=3) for _ in range(3)]
    for each in quick:
        scheduler.submit(each.sequence)
    steps = 0
    while not all(each.sequence.is_finished for each in quick):
        scheduler.step()
        steps += 1
    assert steps <= 6, "two at a time, three steps each"
    assert not any(each.sequence.is_finished for each in batch)
    assert any(each.sequence.state is SequenceState.WAITING and each.tokens for each in batch), "one was preempted"
    run(scheduler, [])
    assert [each.tokens for each in batch] == expected


def test_some_slots_are_never_a_batchs(model: LoadedModel) -> None:
    scheduler = Scheduler(slot_runner(model, 8), "m")
    for _ in range(20):
        scheduler.submit(Heard([5], Priority.BATCH).sequence)
    scheduler.step()
    assert scheduler.num_running == 7


@pytest.mark.parametrize("priority", list(Priority))
def test_a_large_group_leaves_slots_to_others_of_its_priority(model: LoadedModel, priority: Priority) -> None:
    scheduler = Scheduler(slot_runner(model, 4), "m")
    crowd = object()
    for _ in range(12):
        heard = Heard([5], priority, max_tokens=2_000)
        heard.sequence.group = crowd
        scheduler.submit(heard.sequence)
    scheduler.step()
    single = Heard([5], priority, max_tokens=2)
    scheduler.submit(single.sequence)
    scheduler.step()
    scheduler.step()
    assert single.sequence.is_finished


@pytest.mark.parametrize("where", ["prefill", "decode"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), RuntimeError("boom")])
def test_an_error_halves_the_batch_and_loses_nobody(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception
) -> None:
    expected = alone(model)
    original = getattr(SlotRunner, where)

    def breaking(runner: SlotRunner, sequences: list[Sequence], *rest: Any) -> Any:
        if sum(slot is not None for slot in runner._slots) > 2:
            raise error
        return original(runner, sequences, *rest)

    monkeypatch.setattr(SlotRunner, where, breaking)
    heard = [Heard(prompt, **params_of(number)) for number, prompt in enumerate(PROMPTS)]
    run(Scheduler(slot_runner(model, 8), "m"), heard)
    assert [each.tokens for each in heard] == expected


@pytest.mark.parametrize(
    ("error", "kind"), [(torch.OutOfMemoryError("no room"), Unavailable), (RuntimeError("boom"), InvalidCheckpoint)]
)
def test_a_sequence_that_breaks_fails_alone(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[AptJobsError]
) -> None:
    expected = alone(model)
    decode = SlotRunner.decode

    def breaking(runner: SlotRunner, sequences: list[Sequence]) -> Launched:
        if any(each.prompt_ids == PROMPTS[3] and len(each.output_ids) > 4 for each in sequences):
            raise error
        return decode(runner, sequences)

    monkeypatch.setattr(SlotRunner, "decode", breaking)
    heard = [Heard(prompt, **params_of(number)) for number, prompt in enumerate(PROMPTS)]
    run(Scheduler(slot_runner(model, 8), "m"), heard)
    assert isinstance(heard[3].error, kind)
    assert [each.tokens for n, each in enumerate(heard) if n != 3] == [t for n, t in enumerate(expected) if n != 3]


def test_nan_in_one_row_fails_that_row_and_its_slot_is_clean_for_the_next(long_model_dir: Path) -> None:
    model = load_model(long_model_dir, torch.device("cpu"))
    expected = alone(model)
    runner = slot_runner(model, 2)
    embeddings: Any = model.model.get_input_embeddings()
    clean = embeddings.weight[[5]].detach().clone()

    def poisoned(_module: object, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return torch.where((args[0] == 339)[..., None], torch.nan, output)  # a token that the models here never say

    hook = embeddings.register_forward_hook(poisoned)
    bad = [Heard([5, 339, 6]) for _ in range(3)]
    good = [Heard(prompt, **params_of(number)) for number, prompt in enumerate(PROMPTS)]
    run(Scheduler(runner, "m"), [bad[0], *good[:3], bad[1], *good[3:], bad[2]])
    hook.remove()
    assert all(isinstance(each.error, InvalidCheckpoint) and "NaN" in str(each.error) for each in bad)
    assert [each.tokens for each in good] == expected
    assert torch.equal(embeddings.weight[[5]], clean)


def test_an_aborted_sequence_ends_and_its_slot_is_anothers(model: LoadedModel) -> None:
    scheduler = Scheduler(slot_runner(model, 1), "m")
    endless, other = Heard([5], max_tokens=8_000), Heard([5], max_tokens=2)
    scheduler.submit(endless.sequence)
    scheduler.submit(other.sequence)
    scheduler.step()
    scheduler.abort(endless.sequence)
    run(scheduler, [], most=4)
    assert endless.error is not None
    assert len(other.tokens) == 2


def test_a_step_is_one_graph_without_breaks_for_each_way_of_sampling(model: LoadedModel) -> None:
    """What a CUDA graph captures and the compiler takes, run by the compiler's tracer."""
    runner = slot_runner(model)
    scheduler = Scheduler(runner, "m")
    for number, prompt in enumerate(PROMPTS[:4]):
        heard = Heard(prompt, **params_of(number), num_logprobs=2)
        heard.sequence.constraint = Constraint(340, min_tokens=9, never=frozenset({3}))
        scheduler.submit(heard.sequence)
    scheduler.step()
    with torch.inference_mode():
        traced = torch.compile(functools.partial(decode_step, model), dynamic=False, fullgraph=True, backend="eager")
        for sampling in (
            Sampling(),
            Sampling(sampled=True),
            Sampling(penalized=True),
            Sampling(True, True, True, True),
        ):
            one, two = runner._state.first(4).clone(), runner._state.first(4).clone()
            traced(runner._cache.rows(0, 4, 64, one.position_B), one, sampling)
            decode_step(model, runner._cache.rows(0, 4, 64, two.position_B), two, sampling)
            assert one.position_B.tolist() == two.position_B.tolist()
            if not sampling.sampled:
                assert one.chosen_B.tolist() == two.chosen_B.tolist()
        with torch.compiler.set_stance("fail_on_recompile"):
            view = runner._state.first(4)
            traced(runner._cache.scratch(4, 64, view.position_B), view, Sampling())


def test_special_tokens_in_a_text_are_text(model: LoadedModel, long_model_dir: Path) -> None:
    special = AutoTokenizer.from_pretrained(long_model_dir).eos_token
    tokens = model.encode(f"a {special} b")
    assert not model.end_tokens.intersection(tokens)
    assert model.tokenizer.eos_token_id not in tokens
    assert model.tokenizer.decode(tokens) == f"a {special} b"


def test_a_prompt_that_is_read_in_a_slot_of_its_own_and_copied_is_the_same(model: LoadedModel) -> None:
    """What the graph of a short prompt does, run eagerly."""
    runner = slot_runner(model)
    heard = Heard(PROMPTS[2])
    scheduler = Scheduler(runner, "m")
    scheduler.submit(heard.sequence)
    scheduler.step()
    first = heard.tokens[0]
    staging = runner._staging()
    staging.reserve(1, 64)
    tokens = torch.tensor([PROMPTS[2] + [0] * (64 - len(PROMPTS[2]))])
    with torch.inference_mode():
        rows = staging.rows(0, 1, 64, torch.zeros(1, dtype=torch.long))
        logits_1V = runner._read_whole(tokens, rows, torch.tensor([len(PROMPTS[2]) - 1]))
        assert int(logits_1V.argmax()) == first
        expected = [tensor[0, :, : len(PROMPTS[2])].clone() for tensor in runner._cache._keys]
        runner._cache.wipe(0)
        runner._cache.copy_from(staging, 0, len(PROMPTS[2]))
    for found, right in zip(runner._cache._keys, expected, strict=True):
        torch.testing.assert_close(found[0, :, : len(PROMPTS[2])], right)


@pytest.mark.parametrize(
    ("columns", "runs"),
    [
        ([64], [(0, 1, 64)]),
        ([100] * 3, [(0, 3, 100)]),
        ([2_000, 100, 90, 2_000], [(0, 1, 2_000), (1, 3, 100), (3, 4, 2_000)]),
        ([100, 300, 400], [(0, 3, 400)]),
    ],
)
def test_rows_are_read_together_where_that_reads_little_that_is_not_theirs(
    columns: list[int], runs: list[tuple[int, int, int]]
) -> None:
    assert runs_of(columns) == runs


def test_a_long_text_among_short_ones_changes_none(model: LoadedModel) -> None:
    prompts = [[9] * 40, list(range(300)) * 3, [7, 8], [5] * 60]
    expected = []
    for prompt in prompts:
        heard = Heard(prompt)
        run(Scheduler(slot_runner(model), "m"), [heard])
        expected.append(heard.tokens)
    together = [Heard(prompt) for prompt in prompts]
    run(Scheduler(slot_runner(model), "m"), together)
    assert [heard.tokens for heard in together] == expected
