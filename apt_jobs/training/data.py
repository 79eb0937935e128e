"""The data: which rows each rank sees at each step, in an order that can be repeated.

Tensors: R rows of a micro batch, T tokens of a row. A step's loss is the mean over all targets of all its micro batches
on all ranks, however they are spread over them: each micro batch's mean is divided by its own `divisor`.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from apt_jobs.jobs.training_options import TrainingOptions
from apt_jobs.training.mixture import MixedSequences
from apt_jobs.training.sequences import IGNORED_LABEL, Indices, Sequences


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro batch."""

    ids_RT: Tensor
    labels_RT: Tensor
    positions_RT: Tensor | None  # None: no row holds several examples
    divisor: float  # of the mean loss: the micro batches of a step, if all of them have equally many targets

    def pinned(self) -> "Batch":
        """Return it in memory from which a GPU copies without a wait."""
        return self._map(Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        """Return it on a device. From pinned memory the copies are queued, not waited for."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        ids = change(self.ids_RT)
        labels = ids if self.labels_RT is self.ids_RT else change(self.labels_RT)
        positions = None if self.positions_RT is None else change(self.positions_RT)
        return Batch(ids, labels, positions, self.divisor)


@dataclass(frozen=True, slots=True)
class ValidationBatch:
    """A batch whose loss is a mean over `num_targets` targets; of some rows none counts, and maybe of all."""

    rows: Batch
    num_targets: int


@dataclass(frozen=True)
class Batches:
    """Which rows each rank sees at each step: a function of the seed and the step alone."""

    train: Sequences
    validation: Sequences
    options: TrainingOptions
    world_size: int
    evaluations: Mapping[str, Sequences] = field(default_factory=dict)  # data sets that are evaluated by name

    @property
    def sequences_per_step(self) -> int:
        return self.options.batch_size * self.options.gradient_accumulation_steps * self.world_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step, without padding; their mean where it differs from step to step."""
        return round(self.sequences_per_step * self.train.num_tokens / len(self.train))

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train) // self.sequences_per_step

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole training."""
        steps = self.steps_per_epoch * self.options.epochs
        return steps if self.options.max_steps is None else min(steps, self.options.max_steps)

    @property
    def is_text(self) -> bool:
        """Whether every token is a label, and every row one sequence."""
        return self.train.is_plain

    @property
    def is_packed(self) -> bool:
        """Whether a row may hold several examples, which must not attend to each other."""
        return self.train.is_packed

    def epoch_of(self, step: int) -> int:
        """Return epoch (from 0) of an optimizer step (from 1)."""
        return (step - 1) // self.steps_per_epoch

    def micro_batches(self, step: int, rank: int) -> list[Batch]:
        """Return the micro batches of one rank at one optimizer step."""
        order = self._order(self.epoch_of(step))
        start = (step - 1) % self.steps_per_epoch * self.sequences_per_step
        shape = (self.options.gradient_accumulation_steps, self.world_size, self.options.batch_size)
        rows = order[start : start + self.sequences_per_step].view(shape).numpy()
        num_targets = self.train.num_targets(rows.reshape(-1))
        return [self._batch(part, num_targets) for part in rows[:, rank]]

    def validation_batches(self, rank: int, of: Sequences | None = None) -> Iterator[ValidationBatch]:
        """Yield this rank's share of the validation split, or `of` others, at most `max_validation_batches` of it.

        All ranks get equally many batches, as a sharded model needs, and all batches have one shape, as a compiled
        one needs: what is missing is filled with rows that do not count.
        """
        sequences = self.validation if of is None else of
        split = np.arange(len(sequences))
        size, limit = self.options.batch_size, self.options.max_validation_batches
        most = -(-len(split[:: self.world_size]) // size)  # of rank 0, which has the largest share
        mine = split[rank :: self.world_size]
        for number in range(most if limit is None else min(most, limit)):
            rows = mine[number * size : (number + 1) * size]
            filled = np.concatenate([rows, np.zeros(size - len(rows), np.int64)])
            yield ValidationBatch(_validation_batch(sequences, filled, len(rows)), sequences.num_targets(rows))

    def _order(self, epoch: int) -> Tensor:
        if isinstance(self.train, MixedSequences):
            return self.train.order(self.options.seed, epoch)
        return _epoch_order(self.options.seed, epoch, len(self.train))

    def _batch(self, rows: Indices, num_targets: int) -> Batch:
        found = self.train.gather(rows)
        divisor = num_targets / (self.train.num_targets(rows) * self.world_size)
        return Batch(found.ids_RT, found.labels_RT, found.positions_RT, divisor)


def _validation_batch(sequences: Sequences, rows: Indices, num_counted: int) -> Batch:
    found = sequences.gather(rows)
    labels = found.labels_RT.clone()
    # Of pairs there are twice as many rows: the chosen ones first, then as many rejected ones.
    labels.view(-1, len(rows), labels.shape[1])[:, num_counted:] = IGNORED_LABEL
    return Batch(found.ids_RT, labels, found.positions_RT, 1.0)


@functools.lru_cache(maxsize=1)
def _epoch_order(seed: int, epoch: int, num_train: int) -> Tensor:
    """Return the order of the training rows in one epoch.

    Kept until the next epoch: of ten million rows it takes half a second and 80 MB.
    """
    generator = torch.Generator().manual_seed(seed + 1_000_003 * epoch)
    return torch.randperm(num_train, generator=generator)
