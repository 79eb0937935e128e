"""A run of events of one kind as columns: how the database holds the series of a training.

Numbers of many steps stand together, each column in the narrowest form that loses nothing: floats as float32 where that
is exact (norms are measured so), integers as differences, a column that does not change as one value. 150 norms of a
step are 600 bytes instead of 3,000 of JSON. `payloads` gives back, to the byte, the JSON that `codec.encode_payload`
makes of each event.

The form, little-endian: the version (one byte); then the arrays `seq`, `at` (Unix ms), and those of each field in the
order of its dataclass. An optional value has an array of flags before its values; a tuple has its lengths first.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from functools import cache
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import orjson
from numpy.typing import NDArray

from apt_jobs.errors import InvalidInput
from apt_jobs.events.codec import LoggedEvent, finite_or_name
from apt_jobs.events.kinds import EVENT_TYPES, StoredEvent

VERSION = 1
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
COLUMN_TYPES: dict[str, type[Any]] = {cls.kind: cls for cls in EVENT_TYPES if cls.stored_as == "columns"}
Array = NDArray[Any]

ARRAY_HEAD = struct.Struct("<BBI")  # type of the items, how they are held, number of items
PLAIN, CONSTANT, STEPS = 0, 1, 2  # all items; the one that all are; the first, then the differences
ITEM_TYPES = [np.dtype(name) for name in ("<f4", "<f8", "<i1", "<i2", "<i4", "<i8")]
_CODES = {dtype: code for code, dtype in enumerate(ITEM_TYPES)}
_INTEGERS = ITEM_TYPES[2:]


@dataclass(frozen=True, slots=True)
class _Field:
    name: str
    item: type[Any]  # int, float or bool
    is_optional: bool  # of the value, or of the items of a tuple
    is_tuple: bool


@dataclass(frozen=True, slots=True)
class Ragged:
    """A tuple for each event: `items` of all of them, one after another."""

    lengths: NDArray[np.int64]
    items: Array
    known: NDArray[np.bool_] | None = None  # None: all are

    def matrix(self) -> Array:
        """Return the items as a matrix with a row for each event.

        Raises:
            InvalidInput: the events have tuples of different lengths.
        """
        width = int(self.lengths[0]) if len(self.lengths) else 0
        if (self.lengths != width).any():
            raise InvalidInput("tuples of different lengths are no matrix")
        return self.items.reshape(len(self.lengths), width)


@dataclass(frozen=True, slots=True)
class Columns:
    """The events of a chunk. A field is an array, a `Ragged`, or a pair of values and flags of those that are known."""

    kind: str
    seqs: NDArray[np.int64]
    at_ms: NDArray[np.int64]
    fields: dict[str, Any]

    def logged(self, attempt: int, rows: slice = slice(None)) -> list[LoggedEvent]:
        """Return the events as the log shows them."""
        steps = self.fields["step"][rows].tolist()
        of_events = zip(self.seqs[rows].tolist(), steps, self.at_ms[rows].tolist(), self.payloads(rows), strict=True)
        return [
            LoggedEvent(seq, self.kind, attempt, step, _EPOCH + timedelta(milliseconds=at_ms), payload)
            for seq, step, at_ms, payload in of_events
        ]

    def payloads(self, rows: slice) -> list[bytes]:
        """Return the JSON of each event."""
        values = {field.name: _values(self.fields[field.name], field, rows) for field in _fields_of(self.kind)}
        return [orjson.dumps(dict(zip(values, event, strict=True))) for event in zip(*values.values(), strict=True)]


def encode_columns(events: Sequence[StoredEvent]) -> bytes:
    """Encode events of one of `COLUMN_TYPES`, in order of `seq`."""
    parts = [
        bytes([VERSION]),
        _pack(np.array([event.seq for event in events], np.int64)),
        _pack(np.array([_ms(event.at) for event in events], np.int64)),
    ]
    for field in _fields_of(events[0].event.kind):
        parts += _packed([getattr(event.event, field.name) for event in events], field)
    return b"".join(parts)


def decode_columns(kind: str, body: bytes) -> Columns:
    """Decode what `encode_columns` returned.

    Raises:
        InvalidInput: the body does not have this form.
    """
    if not body or body[0] != VERSION:
        raise InvalidInput(f"columns of version {body[:1]!r}; this program reads version {VERSION}")
    reader = _Reader(body, 1)
    try:
        seqs, at_ms = reader.array(), reader.array()
        values = {field.name: reader.field(field) for field in _fields_of(kind)}
    except (struct.error, ValueError, IndexError) as exc:
        raise InvalidInput(f"not a chunk of {kind!r} events: {body[:40]!r}") from exc
    return Columns(kind, seqs, at_ms, values)


def pack_floats(values: Array) -> bytes:
    """Pack an array of floats, as `float32` if that is exact."""
    with np.errstate(over="ignore", under="ignore"):
        narrow = values.astype(np.float32)
    exact = np.array_equal(narrow.astype(values.dtype), values, equal_nan=True)
    return _pack(narrow if exact else values)


def pack_integers(values: Array) -> bytes:
    """Pack an array of integers, in its narrowest exact form."""
    return _pack(values.astype(np.int64))


def unpack(body: bytes, at: int) -> tuple[Array, int]:
    """Return the array that begins at `at`, and where it ends."""
    reader = _Reader(body, at)
    return reader.array(), reader.at


class _Reader:
    def __init__(self, body: bytes, at: int) -> None:
        self._body, self.at = body, at

    def array(self) -> Array:
        code, form, count = ARRAY_HEAD.unpack_from(self._body, self.at)
        self.at += ARRAY_HEAD.size
        dtype = ITEM_TYPES[code]
        if form == STEPS:
            first = np.frombuffer(self._body, "<i8", 1, self.at)
            self.at += 8
            return np.cumsum(np.concatenate([first, self.array().astype(np.int64)]))
        num_stored = min(count, 1) if form == CONSTANT else count
        values = np.frombuffer(self._body, dtype, num_stored, self.at)
        self.at += num_stored * dtype.itemsize
        if form == CONSTANT:
            values = np.broadcast_to(values, count) if count else values
        return values if dtype.kind == "f" else values.astype(np.int64)

    def field(self, field: _Field) -> Any:
        lengths = self.array() if field.is_tuple else None
        known = self.array().astype(bool) if field.is_optional else None
        values = self.array()
        if lengths is not None:
            return Ragged(lengths, values, known)
        return values if known is None else (values, known)


def _packed(values: list[Any], field: _Field) -> list[bytes]:
    parts = []
    if field.is_tuple:
        parts.append(pack_integers(np.array([len(value) for value in values])))
        if not field.is_optional and field.item is float:
            return [*parts, pack_floats(_flat(values))]
        values = [item for value in values for item in value]
    if field.is_optional:
        parts.append(pack_integers(np.array([value is not None for value in values])))
        values = [0 if value is None else value for value in values]
    if field.item is float:
        return [*parts, pack_floats(np.array(values, np.float64))]
    return [*parts, pack_integers(np.array(values, np.int64))]


def _flat(values: list[Any]) -> Array:
    if len({len(value) for value in values}) == 1:
        return np.array(values, np.float64).ravel()
    return np.array([item for value in values for item in value], np.float64)


def _pack(values: Array) -> bytes:
    """Pack integers in their narrowest form, floats as they are given."""
    count = values.size
    if values.dtype.kind == "f":
        values = np.ascontiguousarray(values)
        if count > 1 and values.tobytes() == values[:1].tobytes() * count:
            return ARRAY_HEAD.pack(_CODES[values.dtype], CONSTANT, count) + values[:1].tobytes()
        return ARRAY_HEAD.pack(_CODES[values.dtype], PLAIN, count) + values.tobytes()
    if count == 0:
        return ARRAY_HEAD.pack(_CODES[_INTEGERS[0]], PLAIN, 0)
    low, high = int(values.min()), int(values.max())
    narrow = _narrowest(low, high)
    if count > 1 and low == high:
        return ARRAY_HEAD.pack(_CODES[narrow], CONSTANT, count) + values[:1].astype(narrow).tobytes()
    if count > 2 and high < 2**62 and low > -(2**62):
        steps = np.diff(values)
        low, high = int(steps.min()), int(steps.max())
        if low == high or _narrowest(low, high).itemsize < narrow.itemsize:
            head = ARRAY_HEAD.pack(_CODES[_INTEGERS[-1]], STEPS, count) + values[:1].astype("<i8").tobytes()
            narrow = _narrowest(low, high)
            if low == high:
                return head + ARRAY_HEAD.pack(_CODES[narrow], CONSTANT, count - 1) + steps[:1].astype(narrow).tobytes()
            return head + ARRAY_HEAD.pack(_CODES[narrow], PLAIN, count - 1) + steps.astype(narrow).tobytes()
    return ARRAY_HEAD.pack(_CODES[narrow], PLAIN, count) + values.astype(narrow).tobytes()


def _narrowest(low: int, high: int) -> "np.dtype[Any]":
    return next(dtype for dtype in _INTEGERS if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max)


def _values(column: Any, field: _Field, rows: slice) -> list[Any]:
    """Return what JSON shows of each event of `rows`."""
    if isinstance(column, Ragged):
        ends = np.cumsum(column.lengths)[rows].tolist()
        lengths = column.lengths[rows].tolist()
        first = ends[0] - lengths[0] if ends else 0
        last = ends[-1] if ends else 0
        known = None if column.known is None else column.known[first:last]
        items = _plain(column.items[first:last], known, field)
        return [items[end - length - first : end - first] for end, length in zip(ends, lengths, strict=True)]
    if isinstance(column, tuple):
        return _plain(column[0][rows], column[1][rows], field)
    return _plain(column[rows], None, field)


def _plain(values: Array, known: NDArray[np.bool_] | None, field: _Field) -> list[Any]:
    items: list[Any] = values.tolist()
    if field.item is bool:
        items = list(map(bool, items))
    elif field.item is float and not np.isfinite(values).all():
        items = list(map(finite_or_name, items))
    if known is None or known.all():
        return items
    return [item if is_known else None for item, is_known in zip(items, known.tolist(), strict=True)]


def _ms(at: datetime) -> int:
    """Return Unix milliseconds, cut as `codec.timestamp` cuts them."""
    return (at - _EPOCH) // timedelta(milliseconds=1)


@cache
def _fields_of(kind: str) -> tuple[_Field, ...]:
    cls = COLUMN_TYPES[kind]
    hints = get_type_hints(cls)
    return tuple(_field(field.name, hints[field.name]) for field in fields(cls))


def _field(name: str, hint: Any) -> _Field:
    is_tuple = get_origin(hint) is tuple
    if is_tuple:
        hint = get_args(hint)[0]
    members = get_args(hint) or (hint,)
    (item,) = (member for member in members if member is not NoneType)
    return _Field(name, item, NoneType in members, is_tuple)
