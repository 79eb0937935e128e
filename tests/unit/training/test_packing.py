"""Rows of examples: packed without loss or overlap, and examples of a row that do not see each other."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, LlamaConfig, MambaConfig

from apt_jobs.jobs.data_options import DataOptions
from apt_jobs.jobs.training_options import TrainingOptions
from apt_jobs.training.attention import keeps_examples_apart
from apt_jobs.training.data import Batches
from apt_jobs.training.packing import pack
from apt_jobs.training.prepared import Examples
from apt_jobs.training.sequences import ExampleSequences, PairSequences, SeparateDocuments

TINY: dict[str, Any] = {"vocab_size": 64, "num_hidden_layers": 2, "hidden_size": 16}
LLAMA = LlamaConfig(**TINY, intermediate_size=32, num_attention_heads=2, max_position_embeddings=32)


def _examples(*lengths: int) -> Examples:
    """Example i is `i + 1` over and over; the second half of each is the answer."""
    tokens = np.concatenate([np.full(length, number + 1, np.uint16) for number, length in enumerate(lengths)])
    answers = np.concatenate([np.arange(length) >= max(length // 2, 1) for length in lengths]).astype(np.uint8)
    return Examples(tokens, answers, np.cumsum([0, *lengths]), np.arange(len(lengths), dtype=np.uint64))


def _from_config(config: Any) -> Any:
    torch.manual_seed(0)
    make: Any = AutoModelForCausalLM.from_config
    return make(config)


def _all(examples: Examples) -> Any:
    return np.arange(len(examples.lengths))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_every_example_is_in_one_row_that_has_room(lengths: list[int]) -> None:
    packing = pack(np.arange(len(lengths)), np.array(lengths), 20)
    assert sorted(packing.examples.tolist()) == list(range(len(lengths)))
    rooms = [20 - sum(lengths[one] for one in packing.examples_of(row)) for row in range(len(packing))]
    assert min(rooms) >= 0
    assert all(rooms[one] + rooms[other] < 20 for one in range(len(rooms)) for other in range(one))


def test_a_packed_row_has_the_labels_and_positions_of_its_examples() -> None:
    examples = _examples(6, 3, 4)
    rows = ExampleSequences(examples, _all(examples), 16, DataOptions(), pack_rows=True).gather(np.array([0]))
    assert rows.ids_RT.tolist() == [[1] * 6 + [3] * 4 + [2] * 3 + [0] * 3]
    assert rows.labels_RT.tolist() == [[-100] * 3 + [1] * 3 + [-100] * 2 + [3] * 2 + [-100] + [2] * 2 + [-100] * 3]
    assert rows.positions_RT is not None
    assert rows.positions_RT.tolist() == [[*range(6), *range(4), *range(3), *range(3)]]


def test_a_row_of_its_own_is_as_long_as_the_longest_example_and_cut_at_the_context() -> None:
    examples = _examples(5, 9, 30)
    short = ExampleSequences(examples, np.array([0, 1]), 24, DataOptions(packing=False), pack_rows=False)
    assert short.gather(np.array([0, 1])).ids_RT.shape == (2, 16)
    cut = ExampleSequences(examples, _all(examples), 20, DataOptions(packing=False), pack_rows=False)
    rows = cut.gather(np.array([2]))
    assert (rows.ids_RT.shape, rows.positions_RT) == ((1, 20), None)
    assert (rows.labels_RT != -100).sum() == cut.num_targets(np.array([2])) == 5


def test_all_tokens_are_labels_if_that_is_asked_for_but_the_first() -> None:
    examples = _examples(4, 4)
    options = DataOptions(train_on="everything")
    sequences = ExampleSequences(examples, _all(examples), 8, options, pack_rows=True)
    assert sequences.gather(np.array([0])).labels_RT.tolist() == [[-100, 1, 1, 1, -100, 2, 2, 2]]
    assert sequences.num_targets(np.array([0])) == 6


def test_pairs_give_their_chosen_rows_first() -> None:
    examples = _examples(4, 5, 6, 7)
    pairs = PairSequences(examples, np.array([0, 2]), 16, DataOptions())
    assert len(pairs) == 2
    assert pairs.gather(np.array([1, 0])).ids_RT[:, 0].tolist() == [3, 1, 4, 2]


def test_documents_of_a_text_are_kept_apart_within_a_row_and_from_the_row_before() -> None:
    tokens = np.arange(24, dtype=np.uint16).reshape(3, 8)
    starts = np.array([0, 5, 16, 18], np.uint64)
    sequences = SeparateDocuments(tokens[1:], starts, 1)
    rows = sequences.gather(np.array([1, 0]))
    assert rows.positions_RT is not None
    assert rows.positions_RT.tolist() == [[0, 1, 0, 1, 2, 3, 4, 5], list(range(8))]
    assert rows.labels_RT.tolist() == [[-100, 17, -100, *range(19, 24)], list(range(8, 16))]
    for one in (0, 1):
        row = np.array([one])
        labels = sequences.gather(row).labels_RT[:, 1:]
        assert sequences.num_targets(row) == (labels != -100).sum()


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_losses_of_a_step_are_weighed_by_their_answers(world_size: int) -> None:
    examples = _examples(*range(4, 20))
    sequences = ExampleSequences(examples, _all(examples), 24, DataOptions(packing=False), pack_rows=False)
    options = TrainingOptions(batch_size=2, gradient_accumulation_steps=2, epochs=3)
    batches = Batches(sequences, sequences, options, world_size)
    counts, weights = [], []
    for rank in range(world_size):
        for batch in batches.micro_batches(1, rank):
            counts.append(int((batch.labels_RT[:, 1:] != -100).sum()))
            weights.append(1 / batch.divisor / world_size)
    assert sum(weights) == pytest.approx(1.0)
    assert weights == pytest.approx([count / sum(counts) for count in counts])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LLAMA, True),
        (GPT2Config(vocab_size=64, n_layer=2, n_embd=16, n_head=2, n_positions=32), True),
        (MambaConfig(**TINY, state_size=4), False),
        (BloomConfig(vocab_size=64, n_layer=2, hidden_size=16, n_head=2), False),
    ],
)
def test_what_a_model_does_with_packed_rows_is_found_out(config: Any, expected: bool) -> None:
    model = _from_config(config)
    assert keeps_examples_apart(model) is expected
    assert model.training is not None


def test_examples_of_a_row_do_not_see_each_other(tmp_path: Path) -> None:
    model = _from_config(LLAMA).eval()
    examples = _examples(6, 3, 4)
    rows = ExampleSequences(examples, _all(examples), 16, DataOptions(), pack_rows=True).gather(np.array([0]))
    with torch.no_grad():
        packed = model(input_ids=rows.ids_RT, position_ids=rows.positions_RT, use_cache=False).logits[0]
        begin = 0
        for number in (0, 2, 1):
            length = int(examples.lengths[number])
            alone = model(input_ids=torch.full((1, length), number + 1), use_cache=False).logits[0]
            torch.testing.assert_close(packed[begin : begin + length], alone)
            begin += length
