"""Put examples of different lengths into rows of one length, so that few places are padding.

Best fit, longest first: an example goes into the fullest row that has room. The same input gives the same rows.
"""

import bisect
from dataclasses import dataclass

import numpy as np

Indices = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Packing:
    """Which examples are in which row."""

    examples: Indices  # of all rows, one row after the other
    bounds: Indices  # row i is `examples[bounds[i] : bounds[i + 1]]`

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def examples_of(self, row: int) -> Indices:
        """Return the examples of a row, in their order."""
        return self.examples[self.bounds[row] : self.bounds[row + 1]]


def alone(examples: Indices) -> Packing:
    """Give each example a row of its own."""
    return Packing(examples, np.arange(len(examples) + 1))


def pack(examples: Indices, lengths: Indices, row_tokens: int) -> Packing:
    """Pack examples, each of which fits into a row.

    Args:
        examples: Indices of `lengths`.
        lengths: Tokens of every example there is.
        row_tokens: Length of a row.
    """
    order = examples[np.argsort(-lengths[examples], kind="stable")]
    row_of = np.empty(len(order), np.int64)
    num_rows = 0
    rooms: list[int] = []  # those that rows have left, sorted, each once
    rows_by_room: dict[int, list[int]] = {}
    for at, length in enumerate(lengths[order].tolist()):
        found = bisect.bisect_left(rooms, length)
        if found == len(rooms):
            row, room = num_rows, row_tokens
            num_rows += 1
        else:
            room = rooms[found]
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                del rows_by_room[room], rooms[found]
        row_of[at] = row
        left = room - length
        if left not in rows_by_room:
            rows_by_room[left] = []
            bisect.insort(rooms, left)
        rows_by_room[left].append(row)
    by_row = np.argsort(row_of, kind="stable")
    bounds = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=num_rows))])
    return Packing(order[by_row], bounds)
