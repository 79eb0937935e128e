"""A mixture of data sets: how many rows of each, in which order, the same for each seed and epoch."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from apt_jobs.errors import InvalidInput
from apt_jobs.jobs.training_options import TrainingOptions
from apt_jobs.training.data import Batches
from apt_jobs.training.mixture import MixedSequences
from apt_jobs.training.sequences import SeparateDocuments, TextSequences


def _rows(number: int, first: int, length: int = 4) -> TextSequences:
    """Rows whose first token is `first`, `first` + 1 and so on."""
    tokens = np.tile(np.arange(first, first + number, dtype=np.uint32)[:, None], (1, length))
    return TextSequences(tokens)


def _mixture(sizes: list[int], shares: list[float]) -> MixedSequences:
    parts = [_rows(size, 1_000 * number) for number, size in enumerate(sizes)]
    return MixedSequences(parts, shares, [f"set-{number}" for number in range(len(sizes))])


def _sources(rows: torch.Tensor, sizes: list[int]) -> Counter[int]:
    return Counter((np.searchsorted(np.cumsum(sizes), rows.numpy(), side="right")).tolist())


@pytest.mark.parametrize(
    ("sizes", "shares", "quotas"),
    [
        ([100, 100], [0.5, 0.5], (100, 100)),
        ([100, 50], [0.2, 0.8], (30, 120)),
        ([10, 10, 10], [1 / 3, 1 / 3, 1 / 3], (10, 10, 10)),
        ([7, 3], [0.55, 0.45], (6, 4)),  # 5.5 and 4.5: they add up
        ([1], [1.0], (1,)),
    ],
)
def test_an_epoch_has_the_share_of_each_data_set(
    sizes: list[int], shares: list[float], quotas: tuple[int, ...]
) -> None:
    mixture = _mixture(sizes, shares)
    assert mixture.quotas == quotas
    for epoch in (0, 1, 5):
        counts = _sources(mixture.order(1, epoch), sizes)
        assert tuple(counts[number] for number in range(len(sizes))) == quotas


def test_no_row_comes_twice_before_all_of_its_data_set_have_come() -> None:
    """Over epochs, too: a pass that an epoch begins goes on in the next one."""
    sizes = [40, 12]
    mixture = _mixture(sizes, [0.4, 0.6])
    rows = torch.cat([mixture.order(7, epoch).sort().values for epoch in range(5)])
    for number, (begin, size) in enumerate([(0, 40), (40, 12)]):
        counts = Counter(row for row in rows.tolist() if begin <= row < begin + size)
        assert max(counts.values()) - min(counts[row] for row in range(begin, begin + size)) <= 1, number


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    first = _mixture([30, 20], [0.5, 0.5]).order(3, 2)
    _mixture([30, 20], [0.5, 0.5]).order(3, 0)
    assert torch.equal(_mixture([30, 20], [0.5, 0.5]).order(3, 2), first)
    assert not torch.equal(_mixture([30, 20], [0.5, 0.5]).order(4, 2), first)
    assert not torch.equal(_mixture([30, 20], [0.5, 0.5]).order(3, 1), first)


def test_what_is_gathered_is_in_the_order_that_was_asked_for() -> None:
    mixture = _mixture([3, 2], [0.5, 0.5])
    found = mixture.gather(np.array([4, 0, 3, 2]))
    assert found.ids_RT[:, 0].tolist() == [1_001, 0, 1_000, 2]
    assert found.labels_RT is found.ids_RT  # one copy of text
    assert found.positions_RT is None
    assert mixture.num_targets(np.array([4, 0])) == 6
    assert (mixture.is_plain, mixture.is_packed, len(mixture), mixture.num_tokens) == (True, False, 5, 20)


def test_documents_stay_apart_in_a_mixture() -> None:
    tokens = np.arange(8, dtype=np.uint32).reshape(2, 4)
    apart = [SeparateDocuments(tokens, np.array(starts, np.uint64), 0) for starts in ([0, 2], [0, 5])]
    mixture = MixedSequences(apart, [0.5, 0.5], ["a", "b"])
    found = mixture.gather(np.array([3, 0]))
    assert found.positions_RT is not None
    assert found.positions_RT.tolist() == [[0, 0, 1, 2], [0, 1, 0, 1]]
    assert found.labels_RT[1].tolist()[2] == -100
    assert (mixture.is_plain, mixture.is_packed) == (False, True)


def test_every_step_of_a_mixture_is_a_function_of_its_number() -> None:
    def steps(first: int) -> list[Any]:
        batches = Batches(_mixture([20, 10], [0.3, 0.7]), _rows(1, 0), TrainingOptions(batch_size=3, epochs=4), 2)
        assert batches.num_steps == 20
        found = [batches.micro_batches(step, rank) for step in range(first, 21) for rank in (0, 1)]
        return [[batch.ids_RT.tolist() for batch in micro_batches] for micro_batches in found]

    assert steps(11) == steps(1)[20:]


def test_a_weight_that_gives_no_row_is_refused_with_its_share() -> None:
    with pytest.raises(InvalidInput, match=r"weight of 'set-1' gives it 1e-06 of 20 sequences"):
        _mixture([10, 10], [1 - 1e-6, 1e-6])


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_any_seed_makes_an_order(seed: int) -> None:
    options: Any = {"seed": seed}
    batches = Batches(_mixture([4, 4], [0.5, 0.5]), _rows(1, 0), TrainingOptions(batch_size=2, **options), 1)
    assert len(batches.micro_batches(1, 0)) == 1
