"""All rows of all tables as blocks of bytes, and back: the same on both databases, so that one restores the other.

A block ends behind a row whose key's checksum says so, not after a number of rows: a row more or less changes one
block, and the others are found again by their content.
"""

import base64
import json
import zlib
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

from sqlalchemy import JSON, Column, Connection, Table, func, insert, select, text
from sqlalchemy.orm import Session

from apt_jobs.db.models import Base
from apt_jobs.errors import InvalidInput

ROWS_AT_ONCE = 1_000
ROWS_A_BLOCK = 2_048  # on average
MAX_BLOCK_BYTES = 8 << 20  # before it is packed; a single row may be larger


def begin_snapshot(session: Session) -> None:
    """Fix what the session reads from now on, for however long that takes."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SET LOCAL statement_timeout = 0"))
        session.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
    session.execute(select(func.count()).select_from(Base.metadata.tables["service_values"]))


def dump_table(session: Session, table: Table) -> Iterator[tuple[bytes, int]]:
    """Yield the rows of a table in the order of its key: packed blocks, each with its number of rows."""
    keys = list(table.primary_key.columns)
    rows = session.execute(select(table).order_by(*keys).execution_options(yield_per=ROWS_AT_ONCE))
    indexes = [list(table.columns).index(key) for key in keys]
    lines, num_bytes = list[bytes](), 0
    for row in rows:
        values = [_to_json(column, value) for column, value in zip(table.columns, row, strict=True)]
        lines.append(json.dumps(values, separators=(",", ":")).encode())
        num_bytes += len(lines[-1])
        key = json.dumps([values[index] for index in indexes]).encode()
        if num_bytes >= MAX_BLOCK_BYTES or zlib.crc32(key) % ROWS_A_BLOCK == 0:
            yield _packed(lines), len(lines)
            lines, num_bytes = [], 0
    if lines:
        yield _packed(lines), len(lines)


def load_block(connection: Connection, table: Table, block: bytes) -> int:
    """Insert the rows of a block; returns how many.

    Raises:
        InvalidInput: it is no block of this table.
    """
    try:
        lines = zlib.decompress(block).split(b"\n")
        rows = [_row(table, json.loads(line)) for line in lines]
    except (ValueError, TypeError, KeyError, zlib.error) as exc:
        raise InvalidInput(f"a block of table {table.name} cannot be read: {exc}") from exc
    for begin in range(0, len(rows), ROWS_AT_ONCE):
        connection.execute(insert(table), rows[begin : begin + ROWS_AT_ONCE])
    return len(rows)


def tables() -> Iterable[Table]:
    """Return all tables, each behind those that its rows name. Counts are made again by the rows of `jobs`."""
    return [table for table in Base.metadata.sorted_tables if table.name != "job_counts"]


def _packed(lines: list[bytes]) -> bytes:
    return zlib.compress(b"\n".join(lines), level=1)


def _to_json(column: Column[Any], value: Any) -> Any:
    """Return a value as JSON that `_from_json` reads; documents, instants and bytes are objects of one key."""
    if value is None:
        return None
    if isinstance(column.type, JSON):
        return {"document": value}
    if isinstance(value, datetime):
        return {"at": value.isoformat()}
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    return value


def _from_json(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    match kind:
        case "document":
            return inner
        case "at":
            return datetime.fromisoformat(inner)
        case "base64":
            return base64.b64decode(inner)
    raise ValueError(f"{kind!r} is no kind of value")


def _row(table: Table, values: list[Any]) -> dict[str, Any]:
    return {column.name: _from_json(value) for column, value in zip(table.columns, values, strict=True)}
