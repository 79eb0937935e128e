"""What a training sees at once: rows of tokens with labels, gathered from the files that all ranks map.

Shapes: R rows of a batch, T tokens of a row.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from apt_jobs.jobs.data_options import DataOptions
from apt_jobs.training.packing import Packing, alone, pack
from apt_jobs.training.prepared import Examples

IGNORED_LABEL = -100  # as cross entropy has it by default
ROW_MULTIPLE = 8  # rows that hold one example each are as long as the longest, and a multiple of this
Indices = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows: tokens, what to predict, and where in its example each token is."""

    ids_RT: Tensor
    labels_RT: Tensor  # those of the tokens themselves: models shift them
    positions_RT: Tensor | None  # None: a row is one sequence


class Sequences(Protocol):
    """The rows of a data set, in the order of the files."""

    @property
    def is_packed(self) -> bool:
        """Whether a row may hold several examples or documents, which must not attend to each other."""

    @property
    def is_plain(self) -> bool:
        """Whether every token is a label, and every row one sequence."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows, without padding."""

    def __len__(self) -> int: ...

    def gather(self, rows: Indices) -> Rows:
        """Return some rows."""

    def num_targets(self, rows: Indices) -> int:
        """Return over how many things the loss of these rows is a mean."""


class TextSequences:
    """Documents, one after the other, cut into rows of equal length."""

    def __init__(self, tokens_NT: "np.ndarray[tuple[int, int], np.dtype[np.uint16 | np.uint32]]") -> None:
        self._tokens_NT = tokens_NT

    @property
    def is_packed(self) -> bool:
        return False

    @property
    def is_plain(self) -> bool:
        return not self.is_packed

    @property
    def num_tokens(self) -> int:
        return self._tokens_NT.size

    def __len__(self) -> int:
        return len(self._tokens_NT)

    def gather(self, rows: Indices) -> Rows:
        ids = torch.from_numpy(self._tokens_NT[rows].astype(np.int64))
        return Rows(ids, ids, None)

    def num_targets(self, rows: Indices) -> int:
        return len(rows) * (self._tokens_NT.shape[1] - 1)


class SeparateDocuments(TextSequences):
    """The same rows, in which each document, or what a row has of it, is on its own."""

    def __init__(
        self,
        tokens_NT: "np.ndarray[tuple[int, int], np.dtype[np.uint16 | np.uint32]]",
        starts: "np.ndarray[tuple[int], np.dtype[np.uint64]]",
        first_row: int,
    ) -> None:
        """Take rows of which the first is row `first_row` of all tokens, and where in these documents start, sorted."""
        super().__init__(tokens_NT)
        self._starts, self._first_row = starts, first_row

    @property
    def is_packed(self) -> bool:
        return True

    def gather(self, rows: Indices) -> Rows:
        ids = super().gather(rows).ids_RT
        positions = np.tile(np.arange(ids.shape[1]), (len(rows), 1))
        labels = ids.clone()
        for row, number in enumerate(rows):
            for start in self._starts_in(int(number)):
                positions[row, start:] = np.arange(ids.shape[1] - start)
                labels[row, start] = IGNORED_LABEL  # nothing of its document comes before it
        return Rows(ids, labels, torch.from_numpy(positions))

    def num_targets(self, rows: Indices) -> int:
        num_starts = sum(int((self._starts_in(int(row)) > 0).sum()) for row in rows)
        return super().num_targets(rows) - num_starts

    def _starts_in(self, row: int) -> Indices:
        """Return where in a row documents start."""
        begin = (self._first_row + row) * self._tokens_NT.shape[1]
        first, last = np.searchsorted(self._starts, np.array([begin, begin + self._tokens_NT.shape[1]], np.uint64))
        return self._starts[first:last].astype(np.int64) - begin


class ExampleSequences:
    """Conversations and completions, one or several in a row, of which the answers are labels."""

    def __init__(self, examples: Examples, chosen: Indices, context: int, options: DataOptions, *, pack_rows: bool):
        """Lay out the examples `chosen`; those that are longer than `context` are cut."""
        self._examples, self._trains_all = examples, options.train_on == "everything"
        self._lengths = np.minimum(examples.lengths, context)
        self._targets = num_targets_of(examples, self._lengths, everything=self._trains_all)
        self._packing: Packing = pack(chosen, self._lengths, context) if pack_rows else alone(chosen)
        longest = int(self._lengths[chosen].max(initial=1))
        self._row_tokens = context if pack_rows else min(-(-longest // ROW_MULTIPLE) * ROW_MULTIPLE, context)
        self._packs = pack_rows

    @property
    def is_packed(self) -> bool:
        return self._packs

    @property
    def is_plain(self) -> bool:
        return False

    @property
    def num_tokens(self) -> int:
        return int(self._lengths[self._packing.examples].sum())

    def __len__(self) -> int:
        return len(self._packing)

    def gather(self, rows: Indices) -> Rows:
        shape = (len(rows), self._row_tokens)
        ids, labels = np.zeros(shape, np.int64), np.full(shape, IGNORED_LABEL, np.int64)
        positions = np.tile(np.arange(self._row_tokens), (len(rows), 1))
        for row, number in enumerate(rows):
            end = 0
            for example in self._packing.examples_of(int(number)):
                begin, length = end, int(self._lengths[example])
                end = begin + length
                first = int(self._examples.bounds[example])
                tokens = self._examples.tokens[first : first + length].astype(np.int64)
                is_label = np.ones(length, bool)
                if not self._trains_all:
                    is_label = self._examples.answers[first : first + length].astype(bool)
                is_label[:1] = False  # else the last token of the example before it would predict it
                ids[row, begin:end] = tokens
                labels[row, begin:end][is_label] = tokens[is_label]
                positions[row, begin:] -= positions[row, begin]
            positions[row, end:] -= positions[row, end] if end < self._row_tokens else 0
        return Rows(
            torch.from_numpy(ids),
            torch.from_numpy(labels),
            torch.from_numpy(positions) if self._packs else None,
        )

    def num_targets(self, rows: Indices) -> int:
        return sum(int(self._targets[self._packing.examples_of(int(row))].sum()) for row in rows)


class PairSequences:
    """Preferences: a row of the files is a pair, and gives two rows, first all chosen answers, then the rejected."""

    def __init__(self, examples: Examples, chosen: Indices, context: int, options: DataOptions) -> None:
        """Lay out the pairs of which the chosen answers are the examples `chosen`."""
        both = np.stack([chosen, chosen + 1], axis=1).ravel()
        self._of_examples = ExampleSequences(examples, both, context, options, pack_rows=False)

    @property
    def is_packed(self) -> bool:
        return False

    @property
    def is_plain(self) -> bool:
        return False

    @property
    def num_tokens(self) -> int:
        return self._of_examples.num_tokens

    def __len__(self) -> int:
        return len(self._of_examples) // 2

    def gather(self, rows: Indices) -> Rows:
        return self._of_examples.gather(np.concatenate([2 * rows, 2 * rows + 1]))

    def num_targets(self, rows: Indices) -> int:
        return len(rows)


def num_targets_of(examples: Examples, lengths: Indices, *, everything: bool) -> Indices:
    """Return how many tokens of each example are labels, if it is cut to its length here."""
    if everything:
        return np.maximum(lengths - 1, 0)
    counts = np.zeros(len(lengths), np.int64)
    bounds = examples.bounds
    for first in range(0, len(lengths), _COUNTED_EXAMPLES):
        last = min(first + _COUNTED_EXAMPLES, len(lengths))
        answers = np.concatenate([[0], np.cumsum(examples.answers[bounds[first] : bounds[last]], dtype=np.int64)])
        begins = bounds[first:last] - bounds[first]
        counts[first:last] = answers[begins + lengths[first:last]] - answers[begins]
    return counts


_COUNTED_EXAMPLES = 4_096  # at once
