"""Open what was prepared for an attempt: split each data set, mix several, and see that it is enough for a step."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from apt_jobs.artifacts.conversations import RowKind
from apt_jobs.errors import InvalidDataset, InvalidInput
from apt_jobs.jobs.mixture import shares_of
from apt_jobs.jobs.spec import BUILTIN_DATASET, TrainSpec
from apt_jobs.training.data import Batches
from apt_jobs.training.mixture import MixedSequences
from apt_jobs.training.prepared import (
    VALIDATION,
    Examples,
    Pointer,
    evaluation_pointer_name,
    mixed_pointer_name,
    read_pointer,
)
from apt_jobs.training.sequences import (
    ExampleSequences,
    Indices,
    PairSequences,
    SeparateDocuments,
    Sequences,
    TextSequences,
    num_targets_of,
)


@dataclass(frozen=True, slots=True)
class _Split:
    """A data set to train on, and what of it is held out."""

    train: Sequences
    validation: Sequences
    words: str  # what there is of it, for errors


def open_batches(run_dir: Path, spec: TrainSpec, context: int, world_size: int, *, can_pack: bool) -> Batches:
    """Map what was prepared for an attempt and cut it.

    Args:
        run_dir: The attempt's folder, with the pointers.
        spec: The job.
        context: Tokens of a row.
        world_size: Ranks.
        can_pack: Whether the model keeps the examples of a row apart.

    Raises:
        InvalidDataset: it is too short for one step; the message says how long it has to be.
    """

    def whole(pointer_name: str, field: str, dataset: str) -> Sequences:
        found = _whole(read_pointer(run_dir, pointer_name), spec, context, can_pack)
        if not len(found):
            raise InvalidDataset(f"{field}: data set {dataset!r} has no sequence of {context:,} tokens")
        return found

    options = spec.training
    apart: Sequences | None = None
    if spec.validation_dataset is not None:
        apart = whole(VALIDATION, "validation_dataset", spec.validation_dataset)
    splits = []
    for number, dataset in enumerate(spec.mixture):
        pointer = read_pointer(run_dir, mixed_pointer_name(number))
        split = _split_text if pointer.kind is RowKind.TEXT else _split_examples
        splits.append(split(pointer, dataset.name, spec, context, can_pack))
    train, validation = _mixed(splits, spec)
    needed = options.batch_size * options.gradient_accumulation_steps * world_size
    if len(train) < needed:
        raise InvalidDataset(
            f"{'; '.join(split.words for split in splits)}; one step needs {needed:,}: use more data, shorter "
            "sequences (model.max_seq_len), or a smaller batch (batch_size, gradient_accumulation_steps, num_ranks)"
        )
    evaluations = {
        name: whole(evaluation_pointer_name(name), f"validation_datasets/{name}", dataset)
        for name, dataset in spec.validation_datasets.items()
    }
    return Batches(train, apart or validation, options, world_size, evaluations)


def _mixed(splits: Sequence[_Split], spec: TrainSpec) -> tuple[Sequences, Sequences]:
    """Return what is trained on and what is held out of all data sets."""
    if len(splits) == 1:
        return splits[0].train, splits[0].validation
    names = [one.name for one in spec.mixture]
    if empty := [split.words for split in splits if not len(split.train)]:
        raise InvalidDataset(f"datasets: {empty[0]}: none to train on; leave it out, or use shorter sequences")
    train = MixedSequences([split.train for split in splits], shares_of(spec.mixture), names)
    held_out = [split.validation for split in splits if len(split.validation)]
    if not held_out:
        return train, splits[0].validation
    total = sum(map(len, held_out))
    return train, MixedSequences(held_out, [len(one) / total for one in held_out], names[: len(held_out)])


def _whole(pointer: Pointer, spec: TrainSpec, context: int, can_pack: bool) -> Sequences:
    """Return all rows of a data set that nothing is trained on."""
    if pointer.kind is RowKind.TEXT:
        return _text(pointer, spec, context, slice(0, pointer.num_tokens // context), can_pack)
    examples = pointer.open_examples()
    usable = _usable(examples, spec, context, is_pairs=pointer.kind is RowKind.PREFERENCE)
    return _sequences(examples, usable, spec, context, can_pack)


def _split_text(pointer: Pointer, name: str, spec: TrainSpec, context: int, can_pack: bool) -> _Split:
    """Hold the last sequences out."""
    num_sequences = pointer.num_tokens // context
    num_validation = _num_held_out(num_sequences, spec)
    num_train = num_sequences - num_validation
    train, validation = (
        _text(pointer, spec, context, part, can_pack) for part in (slice(0, num_train), slice(num_train, num_sequences))
    )
    shown = "the built-in data set" if name == BUILTIN_DATASET else f"data set {name!r}"
    words = (
        f"{shown} has {pointer.num_tokens:,} tokens, which make {num_sequences:,} sequences of {context}, "
        f"{num_validation} of them for validation"
    )
    return _Split(train, validation, words)


def _split_examples(pointer: Pointer, name: str, spec: TrainSpec, context: int, can_pack: bool) -> _Split:
    """Hold a sample of the rows out."""
    is_pairs = pointer.kind is RowKind.PREFERENCE
    examples = pointer.open_examples()
    usable = _usable(examples, spec, context, is_pairs=is_pairs)
    held_out = _num_held_out(len(usable), spec)
    shuffled = torch.randperm(len(usable), generator=torch.Generator().manual_seed(spec.training.seed)).numpy()
    parts = np.sort(usable[shuffled[held_out:]]), np.sort(usable[shuffled[:held_out]])
    train, validation = (_sequences(examples, part, spec, context, can_pack) for part in parts)
    words = (
        f"data set {name!r} has {len(usable):,} rows to train on, of which {held_out:,} are for validation and the "
        f"others make {len(train):,} {'pairs' if is_pairs else 'sequences'}"
    )
    return _Split(train, validation, words)


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


def _num_held_out(number: int, spec: TrainSpec) -> int:
    fraction = spec.training.validation_fraction
    wants_validation = fraction > 0 and spec.validation_dataset is None
    return min(max(round(number * fraction), 1), number) if wants_validation else 0
