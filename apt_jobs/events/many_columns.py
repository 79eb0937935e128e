"""Decode many small bodies of columns at once: those of one layout are one matrix, and cost what one of them costs.

A comparison reads thousands of bodies of a few numbers each. Decoded one by one (`columns.unpack`), almost all of the
time would go into the calls.
"""

import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from apt_jobs.errors import InvalidInput
from apt_jobs.events.columns import ARRAY_HEAD, CONSTANT, ITEM_TYPES, STEPS, VERSION, Array

_FIRST_BYTES = 8  # of the value that differences begin with


@dataclass(frozen=True, slots=True)
class _Part:
    """Where one array is in a body, and how it is held."""

    head: int  # its first byte
    is_steps: bool  # its items are differences, after one value
    is_constant: bool
    dtype: "np.dtype[np.generic]"
    num_stored: int
    data: int  # first byte of the items
    count: int  # items when it is decoded
    end: int


def unpack_many(
    bodies: Sequence[bytes], num_arrays: int, wanted: Sequence[int]
) -> tuple[list[Array], NDArray[np.int64]]:
    """Decode some arrays of bodies that begin with a version and hold `num_arrays` arrays or more.

    Args:
        bodies: What `encode_columns` or `Summary.encode` returned.
        num_arrays: How many arrays each has at its beginning that are neither optional nor tuples.
        wanted: Which of them are decoded, from 0.

    Returns:
        Each wanted array, of all bodies one after another; and how many items of the first of them each body has.

    Raises:
        InvalidInput: a body does not have this form.
    """
    by_length: dict[int, list[int]] = {}
    for index, body in enumerate(bodies):
        by_length.setdefault(len(body), []).append(index)
    groups: list[tuple[NDArray[np.int64], dict[int, Array]]] = []
    for length, indices in by_length.items():
        joined = np.frombuffer(b"".join(bodies[index] for index in indices), np.uint8).reshape(len(indices), length)
        groups += _groups(joined, np.array(indices, np.int64), num_arrays, wanted)
    counts = np.zeros(len(bodies), np.int64)
    for which, arrays in groups:
        counts[which] = arrays[wanted[0]].shape[1]
    in_order = [_in_order([(which, arrays[number]) for which, arrays in groups], len(bodies)) for number in wanted]
    return in_order, counts


def _groups(
    matrix: Array, indices: NDArray[np.int64], num_arrays: int, wanted: Collection[int]
) -> list[tuple[NDArray[np.int64], dict[int, Array]]]:
    """Decode bodies of one length, those of each layout together."""
    found = []
    while len(indices):
        parts = _layout(matrix[0].tobytes(), num_arrays)
        heads = np.concatenate([np.arange(part.head, part.data) for part in parts])
        if any(part.is_steps for part in parts):  # the first values differ, their heads do not
            values = [part.data - ARRAY_HEAD.size - _FIRST_BYTES for part in parts if part.is_steps]
            heads = np.setdiff1d(heads, np.concatenate([np.arange(at, at + _FIRST_BYTES) for at in values]))
        alike = (matrix[:, heads] == matrix[0, heads]).all(axis=1)
        chosen = matrix[alike]
        found.append((indices[alike], {number: _decoded(chosen, parts[number]) for number in wanted}))
        matrix, indices = matrix[~alike], indices[~alike]
    return found


def _layout(body: bytes, num_arrays: int) -> list[_Part]:
    if not body or body[0] != VERSION:
        raise InvalidInput(f"columns of version {body[:1]!r}; this program reads version {VERSION}")
    parts, at = [], 1
    try:
        for _ in range(num_arrays):
            head = at
            code, form, count = ARRAY_HEAD.unpack_from(body, at)
            at += ARRAY_HEAD.size
            is_steps = form == STEPS
            if is_steps:
                at += _FIRST_BYTES
                code, form, _ = ARRAY_HEAD.unpack_from(body, at)
                at += ARRAY_HEAD.size
            num_items = count - 1 if is_steps else count
            num_stored = min(num_items, 1) if form == CONSTANT else num_items
            dtype = ITEM_TYPES[code]
            end = at + num_stored * dtype.itemsize
            parts.append(_Part(head, is_steps, form == CONSTANT, dtype, num_stored, at, count, end))
            at = end
    except (IndexError, struct.error) as exc:
        raise InvalidInput(f"not columns: {body[:40]!r}") from exc
    if at > len(body):
        raise InvalidInput(f"columns of {at} bytes in a body of {len(body)}")
    return parts


def _decoded(matrix: Array, part: _Part) -> Array:
    """Return the items of one array, a row for each body."""
    stored = np.ascontiguousarray(matrix[:, part.data : part.end]).view(part.dtype).reshape(len(matrix), -1)
    items = stored if part.dtype.kind == "f" else stored.astype(np.int64)
    num_items = part.count - part.is_steps
    if part.is_constant and num_items != part.num_stored:
        items = np.broadcast_to(items, (len(matrix), num_items))
    if not part.is_steps:
        return items
    at = part.data - ARRAY_HEAD.size - _FIRST_BYTES
    first = np.ascontiguousarray(matrix[:, at : at + _FIRST_BYTES]).view("<i8")
    return np.cumsum(np.hstack([first, items]), axis=1)


def _in_order(groups: Sequence[tuple[NDArray[np.int64], Array]], num_bodies: int) -> Array:
    counts = np.zeros(num_bodies, np.int64)
    for which, items in groups:
        counts[which] = items.shape[1]
    begins = np.cumsum(counts) - counts
    dtype = np.result_type(*(items.dtype for _, items in groups)) if groups else np.dtype(np.float64)
    joined = np.empty(int(counts.sum()), dtype)
    for which, items in groups:
        joined[begins[which][:, None] + np.arange(items.shape[1])] = items
    return joined
