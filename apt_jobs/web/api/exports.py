"""A job's full histories in the forms that other tools read, as streams of bytes with bounded memory."""

import csv
import io
import struct
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, Literal

import crc32c
import numpy as np
import orjson

from apt_jobs.db.series.table import Block, HistoryTable, plain_rows
from apt_jobs.errors import Unavailable
from apt_jobs.events.codec import finite_or_name, timestamp

ExportFormat = Literal["csv", "json", "parquet", "tensorboard", "wandb"]
MEDIA_TYPES: dict[ExportFormat, str] = {
    "csv": "text/csv",
    "json": "application/json",
    "parquet": "application/vnd.apache.parquet",
    "tensorboard": "application/vnd.tensorboard.events",
    "wandb": "application/x-ndjson",
}
ROW_GROUP_ROWS = 4_096
_CRC_MASK = 0xA282EAD8  # of TFRecord files: crc rotated by 15 bits, plus this
_FILE_VERSION = b"brain.Event:2"


def export_filename(job_id: str, form: ExportFormat) -> str:
    """Name the fields as the tool in question looks for them."""
    if form == "tensorboard":
        return f"events.out.tfevents.{job_id}"
    return f"{job_id}-wandb-history.jsonl" if form == "wandb" else f"{job_id}.{form}"


def exported(table: HistoryTable, form: ExportFormat) -> Iterator[bytes]:
    """Return the whole file, in pieces.

    Raises:
        Unavailable: Parquet is asked for, and pyarrow is not installed.
    """
    writers: dict[ExportFormat, Callable[[HistoryTable], Iterator[bytes]]] = {
        "csv": _csv,
        "json": _json,
        "tensorboard": _tensorboard,
        "wandb": _wandb,
    }
    return _parquet(table, _pyarrow()) if form == "parquet" else writers[form](table)


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet  # an extra, and slow to load
    except ImportError as exc:
        raise Unavailable("Parquet needs pyarrow: pip install 'apt-jobs[export]' where the service runs") from exc
    return pyarrow


def _csv(table: HistoryTable) -> Iterator[bytes]:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["step", "at", *table.columns])
    for block in table.blocks():
        for step, at_ms, values in plain_rows(block, ""):
            writer.writerow([step, _instant(at_ms), *_named(values, block)])
        yield _drained(text)
    yield _drained(text)


def _json(table: HistoryTable) -> Iterator[bytes]:
    yield b'{"columns":%b,"rows":[' % orjson.dumps(["step", "at", *table.columns])
    separator = b"\n"
    for block in table.blocks():
        rows = [
            orjson.dumps([step, _instant(at_ms), *_named(values, block)])
            for step, at_ms, values in plain_rows(block, None)
        ]
        yield separator + b",\n".join(rows)
        separator = b",\n"
    yield b"\n]}\n"


def _wandb(table: HistoryTable) -> Iterator[bytes]:
    for block in table.blocks():
        lines = []
        for step, at_ms, values in plain_rows(block, None):
            numbers = zip(table.columns, _named(values, block), strict=True)
            row = {"_step": step, "_timestamp": at_ms / 1000.0}
            lines.append(orjson.dumps({**row, **{name: value for name, value in numbers if value is not None}}))
        yield b"\n".join(lines) + b"\n"


def _parquet(table: HistoryTable, pyarrow: Any) -> Iterator[bytes]:
    types = [pyarrow.float32() if is_layer else pyarrow.float64() for is_layer in table.are_layers]
    fields = [("step", pyarrow.int64()), ("at", pyarrow.timestamp("ms", tz="UTC"))]
    fields += zip(table.columns, types, strict=True)
    sink = _Sink()
    with pyarrow.parquet.ParquetWriter(sink, pyarrow.schema(fields)) as writer:
        for blocks in _gathered(table.blocks()):
            columns = [
                pyarrow.array(np.concatenate([getattr(block, name) for block in blocks]), field[1])
                for name, field in zip(("steps_N", "at_ms_N"), fields[:2], strict=True)
            ]
            values_NC = np.concatenate([block.values_NC for block in blocks])
            unknown_NC = ~np.concatenate([block.known_NC for block in blocks])
            for index, kind in enumerate(types):
                values = values_NC[:, index].astype(kind.to_pandas_dtype())
                columns.append(pyarrow.array(values, kind, mask=unknown_NC[:, index]))
            writer.write_table(pyarrow.table(columns, schema=pyarrow.schema(fields)))
            yield sink.drained()
    yield sink.drained()


class _Sink(io.RawIOBase):
    """A file that keeps only what was not yet sent."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._num_bytes = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._num_bytes

    def write(self, data: Any) -> int:
        self._parts.append(bytes(data))
        self._num_bytes += len(self._parts[-1])
        return len(self._parts[-1])

    def drained(self) -> bytes:
        data, self._parts = b"".join(self._parts), []
        return data


def _gathered(blocks: Iterator[Block]) -> Iterator[list[Block]]:
    held: list[Block] = []
    for block in blocks:
        held.append(block)
        if sum(len(one.steps_N) for one in held) >= ROW_GROUP_ROWS:
            yield held
            held = []
    if held:
        yield held


def _tensorboard(table: HistoryTable) -> Iterator[bytes]:
    """Yield an event a step (tensorflow/core/util/event.proto) with a scalar summary for each column.

    TensorBoard's own writer takes no stream and computes checksums in Python, 10 ms a step.
    """
    heads = [_value_head(name) for name in table.columns]
    yield _record(b"\x09" + struct.pack("<d", 0.0) + b"\x1a" + _sized(_FILE_VERSION))
    for block in table.blocks():
        with np.errstate(over="ignore"):
            floats = block.values_NC.astype("<f4")
        records = []
        for row, (step, at_ms) in enumerate(zip(block.steps_N.tolist(), block.at_ms_N.tolist(), strict=True)):
            data = floats[row].tobytes()
            known = np.flatnonzero(block.known_NC[row]).tolist()
            summary = b"".join([heads[index] + data[4 * index : 4 * index + 4] for index in known])
            event = b"\x09" + struct.pack("<d", at_ms / 1000.0) + b"\x10" + _varint(step) + b"\x2a" + _sized(summary)
            records.append(_record(event))
        yield b"".join(records)


def _value_head(tag: str) -> bytes:
    """`Summary.Value` up to the float: field 1 of the summary; in it the tag (1) and `simple_value` (2)."""
    name = b"\x0a" + _sized(tag.encode()) + b"\x15"
    return b"\x0a" + _varint(len(name) + 4) + name


def _record(data: bytes) -> bytes:
    """Encode a TFRecord."""
    length = struct.pack("<Q", len(data))
    return length + _masked_crc(length) + data + _masked_crc(data)


def _masked_crc(data: bytes) -> bytes:
    crc = crc32c.crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + _CRC_MASK) & 0xFFFFFFFF)


def _sized(data: bytes) -> bytes:
    return _varint(len(data)) + data


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _named(values: list[Any], block: Block) -> list[Any]:
    if np.isfinite(block.values_NC).all():
        return values
    return [finite_or_name(value) if isinstance(value, float) else value for value in values]


def _instant(at_ms: int) -> str:
    return timestamp(datetime.fromtimestamp(at_ms / 1000.0, UTC))


def _drained(text: io.StringIO) -> bytes:
    data = text.getvalue().encode()
    text.seek(0)
    text.truncate()
    return data
