"""The data: documents as tokens in a file that all ranks map, cut into sequences with an order that can be repeated.

Tensors: B sequences of a micro batch, T tokens of a sequence.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from apt_jobs.errors import InvalidDataset
from apt_jobs.jobs.spec import BUILTIN_DATASET, TrainingOptions
from apt_jobs.training.prepared import read_pointer

IGNORED_LABEL = -100  # as cross entropy has it by default


@dataclass(frozen=True, slots=True)
class ValidationBatch:
    """A batch of which the first `num_sequences` count."""

    ids_BT: Tensor
    labels_BT: Tensor
    num_sequences: int


@dataclass(frozen=True)
class Batches:
    """Which sequences each rank sees at each step: a function of the seed and the step alone."""

    tokens_NT: "np.ndarray[tuple[int, int], np.dtype[np.uint16 | np.uint32]]"
    num_train: int  # sequences; the rest, at the end, is for validation
    options: TrainingOptions
    world_size: int

    @property
    def sequences_per_step(self) -> int:
        return self.options.batch_size * self.options.gradient_accumulation_steps * self.world_size

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.tokens_NT.shape[1]

    @property
    def steps_per_epoch(self) -> int:
        return self.num_train // self.sequences_per_step

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole training."""
        steps = self.steps_per_epoch * self.options.epochs
        return steps if self.options.max_steps is None else min(steps, self.options.max_steps)

    def epoch_of(self, step: int) -> int:
        """Return epoch (from 0) of an optimizer step (from 1)."""
        return (step - 1) // self.steps_per_epoch

    def micro_batches(self, step: int, rank: int) -> list[Tensor]:
        """Return the micro batches [B, T] of one rank at one optimizer step."""
        order = _epoch_order(self.options.seed, self.epoch_of(step), self.num_train)
        start = (step - 1) % self.steps_per_epoch * self.sequences_per_step
        shape = (self.options.gradient_accumulation_steps, self.world_size, self.options.batch_size)
        rows = order[start : start + self.sequences_per_step].view(shape)[:, rank]
        return [self._rows(part) for part in rows]

    def validation_batches(self, rank: int) -> Iterator["ValidationBatch"]:
        """Yield this rank's share of the validation split, at most `max_validation_batches` of it.

        All ranks get equally many batches, as a sharded model needs, and all batches have one shape, as a compiled
        one needs: what is missing is filled with sequences that do not count.
        """
        split = torch.arange(self.num_train, len(self.tokens_NT))
        size, limit = self.options.batch_size, self.options.max_validation_batches
        most = -(-len(split[:: self.world_size]) // size)  # of rank 0, which has the largest share
        mine = split[rank :: self.world_size]
        for number in range(most if limit is None else min(most, limit)):
            rows = mine[number * size : (number + 1) * size]
            ids = self._rows(torch.cat([rows, split[:1].expand(size - len(rows))]))
            labels = ids.clone()
            labels[len(rows) :] = IGNORED_LABEL
            yield ValidationBatch(ids, labels, len(rows))

    def _rows(self, rows: Tensor) -> Tensor:
        return torch.from_numpy(self.tokens_NT[rows.numpy()].astype(np.int64))


def open_batches(run_dir: Path, dataset: str, seq_len: int, options: TrainingOptions, world_size: int) -> Batches:
    """Map the tokens that were prepared for an attempt and cut them.

    Raises:
        InvalidDataset: it is too short for one step; the message says how long it has to be.
    """
    tokens = read_pointer(run_dir).open_tokens()
    num_sequences = len(tokens) // seq_len
    wants_validation = options.validation_fraction > 0
    num_validation = max(round(num_sequences * options.validation_fraction), 1) if wants_validation else 0
    per_step = options.batch_size * options.gradient_accumulation_steps * world_size
    num_train = num_sequences - num_validation
    if num_train < per_step:
        name = "the built-in data set" if dataset == BUILTIN_DATASET else f"data set {dataset!r}"
        raise InvalidDataset(
            f"{name} has {len(tokens):,} tokens, which make {num_sequences:,} sequences of {seq_len}; one step needs "
            f"{per_step:,} for training and {num_validation} for validation: use more text, shorter sequences "
            "(max_seq_len), or a smaller batch (batch_size, gradient_accumulation_steps, num_ranks)"
        )
    tokens_NT = tokens[: num_sequences * seq_len].reshape(num_sequences, seq_len)
    return Batches(tokens_NT, num_train, options, world_size)


@functools.lru_cache(maxsize=1)
def _epoch_order(seed: int, epoch: int, num_train: int) -> Tensor:
    """Return the order of the training sequences in one epoch.

    Kept until the next epoch: of ten million sequences it takes half a second and 80 MB.
    """
    generator = torch.Generator().manual_seed(seed + 1_000_003 * epoch)
    return torch.randperm(num_train, generator=generator)
