"""Read the rows of a data set, in bounded memory: JSONL, plain or compressed, and Parquet.

Wrong rows are collected, not raised one by one: whoever uploaded them learns of all, up to `MAX_WRONG_ROWS`.
"""

import gzip
import io
import itertools
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import orjson

from apt_jobs.errors import InvalidDataset
from apt_jobs.jobs.dataset_format import DEFAULT_COLUMN, DatasetFormat, compression_of

MAX_ROW_BYTES = 64 << 20  # of one line of JSONL
MAX_WRONG_ROWS = 100  # named in the error
READ_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_PARQUET_ROWS = 256  # held at once
_PEEKED_ROWS = 100  # searched for one that shows what a data set holds
_SHOWN_CHARS = 100


@dataclass(frozen=True, slots=True)
class Source:
    """Where documents come from."""

    name: str  # of the data set, for messages
    file: Path | None  # None: the built-in data set
    format: DatasetFormat = DatasetFormat.TEXT
    column: str = DEFAULT_COLUMN

    @property
    def has_rows(self) -> bool:
        """Whether it is read by `RowReader`."""
        return self.file is not None and self.format in (DatasetFormat.JSONL, DatasetFormat.PARQUET)


@dataclass(frozen=True, slots=True)
class Row:
    """One row: a JSON object."""

    number: int  # from 1, as editors count lines
    fields: Mapping[str, Any]


class WrongRow(ValueError):
    """A row cannot be used; the message says why, without its number."""


class RowReader:
    """Reads the rows of one data set once, and collects what is wrong with them."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._position: Callable[[], int] = lambda: 0
        self.wrong_rows: list[str] = []  # at most `MAX_WRONG_ROWS`
        self.num_bytes = source.file.stat().st_size if source.file is not None else 0

    @property
    def num_bytes_read(self) -> int:
        """Bytes of the file, compressed as they are, that were read so far."""
        return self._position()

    @contextmanager
    def opened(self) -> Iterator[IO[bytes]]:
        """Open the file of the data set.

        Raises:
            InvalidDataset: it cannot be read; so of what is read within the block.
        """
        source = self.source
        assert source.file is not None
        try:
            with source.file.open("rb") as file:
                self._position = lambda: file.tell() if not file.closed else self.num_bytes
                yield file
        except (gzip.BadGzipFile, EOFError, zlib.error) as exc:
            raise InvalidDataset(f"data set {source.name!r} is cut or damaged gzip: {exc}") from exc
        except OSError as exc:
            raise InvalidDataset(f"data set {source.name!r} cannot be read: {exc.strerror or exc}") from exc

    def decompressed(self, file: IO[bytes]) -> IO[bytes]:
        """Return the content of a file that may be compressed."""
        head = file.read(4)
        file.seek(0, os.SEEK_SET)
        match compression_of(head):
            case "gz":
                return cast("IO[bytes]", gzip.GzipFile(fileobj=file))
            case "zst":
                arrow, _ = _pyarrow(self.source.name)
                stream: IO[bytes] = io.BufferedReader(arrow.input_stream(file, compression="zstd"), READ_BYTES)
                return stream
        return file

    def rows(self, columns: Callable[[Any], list[str]] | None = None) -> Iterator[Row]:
        """Yield the rows that can be read, until too many were wrong.

        Args:
            columns: Given the schema of a Parquet file, the columns to read; it may refuse. None: all.

        Raises:
            InvalidDataset: the file cannot be read as what it is said to be.
        """
        with self.opened() as file:
            if self.source.format is DatasetFormat.PARQUET:
                yield from self._of_parquet(file, columns)
            else:
                yield from self._of_jsonl(self.decompressed(file))

    def add_wrong(self, number: int, words: str) -> None:
        """Note what is wrong with a row."""
        if len(self.wrong_rows) < MAX_WRONG_ROWS:
            self.wrong_rows.append(f"{where(self.source, number)}: {words}")

    def require_no_wrong_rows(self) -> None:
        """Return if every row could be read.

        Raises:
            InvalidDataset: it names the wrong rows.
        """
        if not self.wrong_rows:
            return
        number, name = len(self.wrong_rows), self.source.name
        count = f"at least {number}" if number == MAX_WRONG_ROWS else f"{number}"
        rows = "row that is" if number == 1 else "rows that are"
        raise InvalidDataset(
            f"data set {name!r} has {count} {rows} wrong; mend and upload it again:\n" + "\n".join(self.wrong_rows)
        )

    def _of_jsonl(self, stream: IO[bytes]) -> Iterator[Row]:
        number = 0
        while line := stream.readline(MAX_ROW_BYTES + 1):
            number += 1
            if number == 1:
                line = line.removeprefix(_BOM)
            if len(line) > MAX_ROW_BYTES:
                self.add_wrong(number, f"longer than {MAX_ROW_BYTES:,} bytes")
                while line and not line.endswith(b"\n"):
                    line = stream.readline(READ_BYTES)
            elif line.strip() and (fields := self._object_of(line, number)) is not None:
                yield Row(number, fields)
            if len(self.wrong_rows) == MAX_WRONG_ROWS:
                return

    def _object_of(self, line: bytes, number: int) -> dict[str, Any] | None:
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as exc:
            self.add_wrong(number, f"not JSON ({exc.msg} at character {exc.pos + 1}): {shown(line)}")
            return None
        if isinstance(row, dict):
            return row
        self.add_wrong(number, f"a JSON {kind_of(row)}; expected an object")
        return None

    def _of_parquet(self, file: IO[bytes], columns: Callable[[Any], list[str]] | None) -> Iterator[Row]:
        arrow, parquet = _pyarrow(self.source.name)
        try:
            opened = parquet.ParquetFile(file)
            wanted = None if columns is None else columns(opened.schema_arrow)
            number = 0
            for batch in opened.iter_batches(_PARQUET_ROWS, columns=wanted):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(number, fields)
                    if len(self.wrong_rows) == MAX_WRONG_ROWS:
                        return
        except (arrow.ArrowException, UnicodeDecodeError) as exc:
            raise InvalidDataset(f"data set {self.source.name!r} cannot be read as Parquet: {shown(str(exc))}") from exc


def first_fields(source: Source) -> Mapping[str, Any]:
    """Return the fields of the first row that can be read; none if there is no such row among the first."""
    for row in itertools.islice(RowReader(source).rows(), _PEEKED_ROWS):
        return row.fields
    return {}


def where(source: Source, number: int) -> str:
    """Name a row as its owner finds it."""
    return f"{'row' if source.format is DatasetFormat.PARQUET else 'line'} {number:,}"


def kind_of(value: object) -> str:
    """Return what JSON calls the type of a value."""
    kinds = {bool: "boolean", int: "number", float: "number", str: "string", list: "array", dict: "object"}
    return kinds.get(type(value), "null")


def shown(text: str | bytes) -> str:
    """Return the beginning of what somebody else wrote, on one line."""
    words = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    words = "".join(sign if sign.isprintable() else " " for sign in words[: _SHOWN_CHARS + 1]).strip()
    return words if len(words) <= _SHOWN_CHARS else f"{words[:_SHOWN_CHARS]}..."


def _pyarrow(name: str):  # type: ignore[no-untyped-def]  # pyarrow has no types
    """Import what reads Parquet and zstd.

    Raises:
        InvalidDataset: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as exc:
        raise InvalidDataset(f"data set {name!r} needs pyarrow on the worker: pip install 'apt-jobs[export]'") from exc
    return pyarrow, pyarrow.parquet
