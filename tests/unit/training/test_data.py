"""Which sequences a rank sees: an order that is made once an epoch, and validation batches of one shape."""

from typing import Any

import numpy as np
import pytest
import torch

from apt_jobs.jobs.training_options import TrainingOptions
from apt_jobs.training import data
from apt_jobs.training.data import Batches
from apt_jobs.training.ddp import Rank
from apt_jobs.training.prefetch import Prefetcher
from apt_jobs.training.sequences import TextSequences

RANK = Rank(0, 1, torch.device("cpu"), "gloo")


def _batches(num_train: int, num_validation: int = 0, world_size: int = 1, **options: Any) -> Batches:
    tokens = np.arange((num_train + num_validation) * 4, dtype=np.uint32).reshape(-1, 4)
    train, validation = TextSequences(tokens[:num_train]), TextSequences(tokens[num_train:])
    return Batches(train, validation, TrainingOptions(epochs=3, **options), world_size)


def test_each_epoch_sees_every_sequence_once_in_another_order() -> None:
    batches = _batches(12, batch_size=2)
    epochs = [
        torch.cat([batch.ids_RT for step in range(first, first + 6) for batch in batches.micro_batches(step, 0)])
        for first in (1, 7, 13)
    ]
    assert all(sorted(epoch[:, 0].tolist()) == list(range(0, 48, 4)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])


def test_the_order_is_made_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = torch.randperm

    def counted(num_train: int, **options: Any) -> torch.Tensor:
        made.append(num_train)
        return real(num_train, **options)

    monkeypatch.setattr(torch, "randperm", counted)
    data._epoch_order.cache_clear()
    batches = _batches(12, batch_size=2)
    for step in range(1, 13):
        batches.micro_batches(step, 0)
    assert made == [12, 12]


def test_what_was_fetched_ahead_is_what_the_step_gets_in_any_order() -> None:
    batches = _batches(40, batch_size=2, gradient_accumulation_steps=2)
    prefetcher = Prefetcher(batches, RANK)
    for step in (1, 2, 3, 9, 10, 4, 1, 1, 2, 25, 26):  # skipped and rolled back
        found, expected = prefetcher.micro_batches(step), batches.micro_batches(step, 0)
        assert [batch.ids_RT.tolist() for batch in found] == [batch.ids_RT.tolist() for batch in expected]
    prefetcher.close()


def test_an_error_in_the_thread_is_raised_where_the_batch_is_asked_for() -> None:
    class Broken:
        def micro_batches(self, step: int, rank: int) -> list[torch.Tensor]:
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        Prefetcher(Broken(), RANK).micro_batches(1)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_validation", [1, 2, 3, 4, 5, 7, 8, 9])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_counts_every_sequence_once_in_batches_of_one_shape(num_validation: int, world_size: int) -> None:
    batches = _batches(12, num_validation, world_size, batch_size=2)
    of_ranks = [list(batches.validation_batches(rank)) for rank in range(world_size)]
    assert len({len(of_rank) for of_rank in of_ranks}) == 1
    everything = [batch for of_rank in of_ranks for batch in of_rank]
    assert {tuple(batch.rows.ids_RT.shape) for batch in everything} == {(2, 4)}
    counted = [row[0] for batch in everything for row in batch.rows.labels_RT.tolist() if row[0] != -100]
    assert sorted(counted) == list(range(48, 48 + 4 * num_validation, 4))
    assert sum(batch.num_targets for batch in everything) == 3 * num_validation


def test_a_validation_can_be_limited() -> None:
    batches = _batches(12, 9, 2, batch_size=2, max_validation_batches=2)
    assert [[batch.num_targets for batch in batches.validation_batches(rank)] for rank in (0, 1)] == [[6, 6], [6, 6]]
