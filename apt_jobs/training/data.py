"""The data: which rows each rank sees at each step, in an order that can be repeated.

Tensors: R rows of a micro batch, T tokens of a row. A step's loss is the mean over all targets of all its micro batches
on all ranks, however they are spread over them: each micro batch's mean is divided by its own `divisor`.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from apt_jobs.artifacts.conversations import RowKind
from apt_jobs.errors import InvalidDataset, InvalidInput
from apt_jobs.jobs.spec import BUILTIN_DATASET, TrainSpec
from apt_jobs.jobs.training_options import TrainingOptions
from apt_jobs.training.prepared import VALIDATION, Examples, Pointer, read_pointer
from apt_jobs.training.sequences import (
    IGNORED_LABEL,
    ExampleSequences,
    Indices,
    PairSequences,
    SeparateDocuments,
    Sequences,
    TextSequences,
    num_targets_of,
)


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
        return isinstance(self.train, TextSequences) and not self.train.is_packed

    @property
    def is_packed(self) -> bool:
        """Whether a row may hold several examples, which must not attend to each other."""
        return self.train.is_packed

    def epoch_of(self, step: int) -> int:
        """Return epoch (from 0) of an optimizer step (from 1)."""
        return (step - 1) // self.steps_per_epoch

    def micro_batches(self, step: int, rank: int) -> list[Batch]:
        """Return the micro batches of one rank at one optimizer step."""
        order = _epoch_order(self.options.seed, self.epoch_of(step), len(self.train))
        start = (step - 1) % self.steps_per_epoch * self.sequences_per_step
        shape = (self.options.gradient_accumulation_steps, self.world_size, self.options.batch_size)
        rows = order[start : start + self.sequences_per_step].view(shape).numpy()
        num_targets = self.train.num_targets(rows.reshape(-1))
        return [self._batch(part, num_targets) for part in rows[:, rank]]

    def validation_batches(self, rank: int) -> Iterator[ValidationBatch]:
        """Yield this rank's share of the validation split, at most `max_validation_batches` of it.

        All ranks get equally many batches, as a sharded model needs, and all batches have one shape, as a compiled
        one needs: what is missing is filled with rows that do not count.
        """
        split = np.arange(len(self.validation))
        size, limit = self.options.batch_size, self.options.max_validation_batches
        most = -(-len(split[:: self.world_size]) // size)  # of rank 0, which has the largest share
        mine = split[rank :: self.world_size]
        for number in range(most if limit is None else min(most, limit)):
            rows = mine[number * size : (number + 1) * size]
            filled = np.concatenate([rows, np.zeros(size - len(rows), np.int64)])
            yield ValidationBatch(self._validation_batch(filled, len(rows)), self.validation.num_targets(rows))

    def _batch(self, rows: Indices, num_targets: int) -> Batch:
        found = self.train.gather(rows)
        divisor = num_targets / (self.train.num_targets(rows) * self.world_size)
        return Batch(found.ids_RT, found.labels_RT, found.positions_RT, divisor)

    def _validation_batch(self, rows: Indices, num_counted: int) -> Batch:
        found = self.validation.gather(rows)
        labels = found.labels_RT.clone()
        # Of pairs there are twice as many rows: the chosen ones first, then as many rejected ones.
        labels.view(-1, len(rows), labels.shape[1])[:, num_counted:] = IGNORED_LABEL
        return Batch(found.ids_RT, labels, found.positions_RT, 1.0)


def open_batches(run_dir: Path, spec: TrainSpec, context: int, world_size: int, *, can_pack: bool) -> Batches:
    """Map what was prepared for an attempt and cut it.

    Args:
        run_dir: The attempt's folder, with the pointer.
        spec: The job.
        context: Tokens of a row.
        world_size: Ranks.
        can_pack: Whether the model keeps the examples of a row apart.

    Raises:
        InvalidDataset: it is too short for one step; the message says how long it has to be.
    """
    pointer, options = read_pointer(run_dir), spec.training
    apart = None if spec.validation_dataset is None else _validation(run_dir, spec, context, can_pack)
    if pointer.kind is RowKind.TEXT:
        return _text_batches(pointer, spec, context, world_size, apart, can_pack=can_pack)
    examples = pointer.open_examples()
    usable = _usable(examples, spec, context, is_pairs=pointer.kind is RowKind.PREFERENCE)
    held_out = _num_held_out(len(usable), options, apart)
    shuffled = torch.randperm(len(usable), generator=torch.Generator().manual_seed(options.seed)).numpy()
    splits = np.sort(usable[shuffled[held_out:]]), np.sort(usable[shuffled[:held_out]])
    train, validation = (_sequences(examples, split, spec, context, can_pack) for split in splits)
    needed = options.batch_size * options.gradient_accumulation_steps * world_size
    if len(train) < needed:
        what = "pairs" if pointer.kind is RowKind.PREFERENCE else "sequences"
        raise InvalidDataset(
            f"data set {spec.dataset!r} has {len(usable):,} rows to train on, of which {held_out:,} are for "
            f"validation and the others make {len(train):,} {what}; one step needs {needed:,}: use more rows, "
            "data.packing false, or a smaller batch (batch_size, gradient_accumulation_steps, num_ranks)"
        )
    return Batches(train, apart or validation, options, world_size)


def _validation(run_dir: Path, spec: TrainSpec, context: int, can_pack: bool) -> Sequences:
    """Return the rows of a validation set of its own."""
    pointer = read_pointer(run_dir, VALIDATION)
    if pointer.kind is RowKind.TEXT:
        num_sequences = pointer.num_tokens // context
        found: Sequences = _text(pointer, spec, context, slice(0, num_sequences), can_pack)
    else:
        examples = pointer.open_examples()
        usable = _usable(examples, spec, context, is_pairs=pointer.kind is RowKind.PREFERENCE)
        found = _sequences(examples, usable, spec, context, can_pack)
    if not len(found):
        raise InvalidDataset(
            f"validation_dataset: data set {spec.validation_dataset!r} has no sequence of {context:,} tokens"
        )
    return found


def _text_batches(
    pointer: Pointer, spec: TrainSpec, seq_len: int, world_size: int, apart: Sequences | None, *, can_pack: bool
) -> Batches:
    options, num_sequences = spec.training, pointer.num_tokens // seq_len
    num_validation = _num_held_out(num_sequences, options, apart)
    per_step = options.batch_size * options.gradient_accumulation_steps * world_size
    num_train = num_sequences - num_validation
    if num_train < per_step:
        name = "the built-in data set" if spec.dataset == BUILTIN_DATASET else f"data set {spec.dataset!r}"
        raise InvalidDataset(
            f"{name} has {pointer.num_tokens:,} tokens, which make {num_sequences:,} sequences of {seq_len}; one step "
            f"needs {per_step:,} for training and {num_validation} for validation: use more text, shorter sequences "
            "(max_seq_len), or a smaller batch (batch_size, gradient_accumulation_steps, num_ranks)"
        )
    train, validation = (
        _text(pointer, spec, seq_len, part, can_pack) for part in (slice(0, num_train), slice(num_train, num_sequences))
    )
    return Batches(train, apart or validation, options, world_size)


def _text(pointer: Pointer, spec: TrainSpec, seq_len: int, rows: slice, can_pack: bool) -> TextSequences:
    """Return some of the rows that the documents of a text are cut into."""
    tokens_NT = pointer.open_tokens()[rows.start * seq_len : rows.stop * seq_len].reshape(-1, seq_len)
    if not spec.data.separate_documents:
        return TextSequences(tokens_NT)
    if not can_pack:
        raise InvalidInput("data.separate_documents: the model does not keep documents of a row apart; leave it out")
    starts = pointer.open_starts()
    if starts is None:
        raise InvalidDataset("data.separate_documents: of uploaded token ids it is not known where documents start")
    return SeparateDocuments(tokens_NT, starts, rows.start)


def _sequences(examples: Examples, chosen: Indices, spec: TrainSpec, context: int, can_pack: bool) -> Sequences:
    if spec.training.objective == "dpo":
        return PairSequences(examples, chosen, context, spec.data)
    pack_rows = spec.data.packing and can_pack
    return ExampleSequences(examples, chosen, context, spec.data, pack_rows=pack_rows)


def _usable(examples: Examples, spec: TrainSpec, context: int, *, is_pairs: bool) -> Indices:
    """Return the examples that have something to train on within the context; of pairs the chosen ones."""
    lengths, keeps_long = examples.lengths, spec.data.longer_than_context != "skip"
    cut = np.minimum(lengths, context)
    has_target = num_targets_of(examples, cut, everything=spec.data.train_on == "everything") > 0
    is_usable = has_target & ((lengths <= context) | keeps_long)
    if is_pairs:
        is_usable = is_usable & np.roll(is_usable, -1)
        is_usable[1::2] = False
    return np.flatnonzero(is_usable)


def _num_held_out(number: int, options: TrainingOptions, apart: Sequences | None) -> int:
    wants_validation = options.validation_fraction > 0 and apart is None
    return min(max(round(number * options.validation_fraction), 1), number) if wants_validation else 0


@functools.lru_cache(maxsize=1)
def _epoch_order(seed: int, epoch: int, num_train: int) -> Tensor:
    """Return the order of the training rows in one epoch.

    Kept until the next epoch: of ten million rows it takes half a second and 80 MB.
    """
    generator = torch.Generator().manual_seed(seed + 1_000_003 * epoch)
    return torch.randperm(num_train, generator=generator)
