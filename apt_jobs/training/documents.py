"""Read a data set as documents, in bounded memory: text, JSONL and Parquet, plain or compressed.

A document arrives in pieces that end at line borders, never inside a word, so that pieces can be tokenised in parallel
and the result does not depend on how they were cut. Wrong rows are collected, not raised one by one.
"""

import codecs
import gzip
import io
import os
import pydoc_data.topics
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import orjson

from apt_jobs.errors import InvalidDataset
from apt_jobs.jobs.dataset_format import DEFAULT_COLUMN, DatasetFormat, compression_of

PIECE_CHARS = 16_384  # about as long as a piece is
MAX_PIECE_CHARS = 1 << 20  # of a word that has no end
MAX_ROW_BYTES = 64 << 20  # of one line of JSONL
MAX_WRONG_ROWS = 100  # named in the error
_READ_BYTES = 1 << 20
_PARQUET_ROWS = 256  # held at once
_SHOWN_CHARS = 100
_ANY_BORDER = re.compile(r"(?<=\n)(?=\S)|(?<=\S)(?= \S)")


@dataclass(frozen=True, slots=True)
class Source:
    """Where documents come from."""

    name: str  # of the data set, for messages
    file: Path | None  # None: the built-in data set
    format: DatasetFormat = DatasetFormat.TEXT
    column: str = DEFAULT_COLUMN


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a document."""

    text: str
    begins_document: bool
    ends_document: bool


class DocumentReader:
    """Reads one data set once."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._position: Callable[[], int] = lambda: 0
        self.num_empty = 0  # documents that were skipped
        self.wrong_rows: list[str] = []  # at most `MAX_WRONG_ROWS`
        self.num_bytes = source.file.stat().st_size if source.file is not None else 0

    @property
    def num_bytes_read(self) -> int:
        """Bytes of the file, compressed as they are, that were read so far."""
        return self._position()

    def pieces(self) -> Iterator[Piece]:
        """Yield the documents, in order.

        Raises:
            InvalidDataset: the file cannot be read as what it is said to be.
        """
        source = self._source
        if source.file is None:
            for _, text in sorted(pydoc_data.topics.topics.items()):
                yield from self._pieces_of(text)
            return
        try:
            with source.file.open("rb") as file:
                self._position = lambda: file.tell() if not file.closed else self.num_bytes
                if source.format is DatasetFormat.PARQUET:
                    yield from self._of_parquet(file)
                elif source.format is DatasetFormat.JSONL:
                    yield from self._of_jsonl(_decompressed(file, source.name))
                else:
                    yield from self._of_text(_decompressed(file, source.name))
        except (gzip.BadGzipFile, EOFError, zlib.error) as exc:
            raise InvalidDataset(f"data set {source.name!r} is cut or damaged gzip: {exc}") from exc
        except OSError as exc:
            raise InvalidDataset(f"data set {source.name!r} cannot be read: {exc.strerror or exc}") from exc

    def require_no_wrong_rows(self) -> None:
        """Return if every row could be read.

        Raises:
            InvalidDataset: it names the wrong rows.
        """
        if not self.wrong_rows:
            return
        number, name = len(self.wrong_rows), self._source.name
        count = f"at least {number}" if number == MAX_WRONG_ROWS else f"{number}"
        rows = "row that is" if number == 1 else "rows that are"
        raise InvalidDataset(
            f"data set {name!r} has {count} {rows} wrong; mend and upload it again:\n" + "\n".join(self.wrong_rows)
        )

    def _of_text(self, stream: IO[bytes]) -> Iterator[Piece]:
        """Read the whole file as one document."""
        name, decoder, held = self._source.name, codecs.getincrementaldecoder("utf-8")(), ""
        num_decoded, begins, is_over = 0, True, False
        while not is_over:
            part = stream.read(_READ_BYTES)
            is_over = not part
            if num_decoded == 0:
                part = part.removeprefix(codecs.BOM_UTF8)
            if (zero := part.find(b"\0")) >= 0:
                raise InvalidDataset(f"data set {name!r} is binary (byte {num_decoded + zero:,} is zero)")
            waiting = len(decoder.getstate()[0])
            try:
                held += decoder.decode(part, is_over)
            except UnicodeDecodeError as exc:
                at = num_decoded - waiting + exc.start
                raise InvalidDataset(f"data set {name!r} is not UTF-8 text (byte {at:,}: {exc.reason})") from exc
            num_decoded += len(part)
            *pieces, held = _cut(held, is_whole=is_over)
            for text in pieces:
                yield Piece(text, begins, ends_document=False)
                begins = False
        if begins and not held.strip():
            self.num_empty += 1
            return
        yield Piece(held, begins, ends_document=True)

    def _of_jsonl(self, stream: IO[bytes]) -> Iterator[Piece]:
        number = 0
        while line := stream.readline(MAX_ROW_BYTES + 1):
            number += 1
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if len(line) > MAX_ROW_BYTES:
                self._add_wrong(f"line {number:,}: longer than {MAX_ROW_BYTES:,} bytes")
                while line and not line.endswith(b"\n"):
                    line = stream.readline(_READ_BYTES)
            elif line.strip():
                yield from self._of_row(line, f"line {number:,}")
            if len(self.wrong_rows) == MAX_WRONG_ROWS:
                return

    def _of_row(self, line: bytes, where: str) -> Iterator[Piece]:
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as exc:
            self._add_wrong(f"{where}: not JSON ({exc.msg} at character {exc.pos + 1}): {_shown(line)}")
            return
        text, fault = _text_of(row, self._source.column)
        if fault is not None:
            self._add_wrong(f"{where}: {fault}")
            return
        yield from self._pieces_of(text)

    def _of_parquet(self, file: IO[bytes]) -> Iterator[Piece]:
        name, column = self._source.name, self._source.column
        arrow, parquet = _pyarrow(name)
        try:
            opened = parquet.ParquetFile(file)
            columns = opened.schema_arrow.names
            if column not in columns:
                raise InvalidDataset(
                    f"data set {name!r} has no column {column!r}; it has: {', '.join(map(repr, columns[:50]))}; "
                    "upload it again with `column`"
                )
            kind = opened.schema_arrow.field(column).type
            if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)):
                raise InvalidDataset(f"column {column!r} of data set {name!r} holds {kind}; expected strings")
            number = 0
            for batch in opened.iter_batches(_PARQUET_ROWS, columns=[column]):
                for value in batch.column(0):
                    number += 1
                    if value.is_valid:
                        yield from self._pieces_of(value.as_py())
                    else:
                        self.num_empty += 1
        except (arrow.ArrowException, UnicodeDecodeError) as exc:
            raise InvalidDataset(f"data set {name!r} cannot be read as Parquet: {_shown(str(exc))}") from exc

    def _pieces_of(self, text: str) -> Iterator[Piece]:
        """Cut a whole document."""
        if not text.strip():
            self.num_empty += 1
            return
        parts = _cut(text, is_whole=True)
        for number, part in enumerate(parts):
            yield Piece(part, number == 0, number == len(parts) - 1)

    def _add_wrong(self, words: str) -> None:
        if len(self.wrong_rows) < MAX_WRONG_ROWS:
            self.wrong_rows.append(words)


def _decompressed(file: IO[bytes], name: str) -> IO[bytes]:
    head = file.read(4)
    file.seek(0, os.SEEK_SET)
    match compression_of(head):
        case "gz":
            return cast("IO[bytes]", gzip.GzipFile(fileobj=file))
        case "zst":
            arrow, _ = _pyarrow(name)
            stream: IO[bytes] = io.BufferedReader(arrow.input_stream(file, compression="zstd"), _READ_BYTES)
            return stream
    return file


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


def _text_of(row: object, column: str) -> tuple[str, str | None]:
    """Return the document of a row, or what is wrong with the row."""
    if not isinstance(row, dict):
        return "", f"a JSON {_kind_of(row)}; expected an object"
    fields = [column] if column in row or column != DEFAULT_COLUMN else ["prompt", "completion"]
    if missing := [field for field in fields if field not in row]:
        expected = f"field {column!r}" if column != DEFAULT_COLUMN else "`text`, or `prompt` and `completion`"
        has = ", ".join(map(repr, list(row)[:10])) or "none"
        return "", f"no field {missing[0]!r}; expected {expected}; it has: {_shown(has)}"
    for field in fields:
        if not isinstance(row[field], str):
            return "", f"field {field!r} is a JSON {_kind_of(row[field])}; expected a string"
    return "".join(row[field] for field in fields), None


def _kind_of(value: object) -> str:
    kinds = {bool: "boolean", int: "number", float: "number", str: "string", list: "array", dict: "object"}
    return kinds.get(type(value), "null")


def _shown(text: str | bytes) -> str:
    """Return the beginning of what somebody else wrote, on one line."""
    words = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    words = "".join(sign if sign.isprintable() else " " for sign in words[: _SHOWN_CHARS + 1]).strip()
    return words if len(words) <= _SHOWN_CHARS else f"{words[:_SHOWN_CHARS]}..."


def _cut(text: str, *, is_whole: bool) -> list[str]:
    """Cut a text at borders; the last part is what is left, and longer if more may come."""
    parts, start = [], 0
    most = PIECE_CHARS if is_whole else MAX_PIECE_CHARS + PIECE_CHARS
    while len(text) - start > most or (not is_whole and len(text) - start > 2 * PIECE_CHARS):
        end = _border(text, start)
        if end is None:
            break
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


def _border(text: str, start: int) -> int | None:
    """Return where a piece that begins at `start` may end: at a line border, else before a space between words."""
    end = start + PIECE_CHARS
    for is_border in (_is_clean_line_border, _is_line_border):
        at = text.rfind("\n", start + 1, min(end, len(text) - 1)) + 1
        while at > start:
            if is_border(text, at):
                return at
            at = text.rfind("\n", start + 1, at - 1) + 1
    at = text.rfind(" ", start + 1, min(end, len(text) - 1))
    while at > start:
        if _is_word_border(text, at):
            return at
        at = text.rfind(" ", start + 1, at)
    return _later_border(text, end, start + MAX_PIECE_CHARS)


def _later_border(text: str, begin: int, limit: int) -> int | None:
    """Return the first border after `begin`; the limit itself if there is none before it; None: more text is needed."""
    if (found := _ANY_BORDER.search(text, begin, limit)) is not None:
        return found.start()
    return limit if limit < len(text) else None


def _is_line_border(text: str, at: int) -> bool:
    return text[at - 1] == "\n" and not text[at].isspace()


def _is_clean_line_border(text: str, at: int) -> bool:
    """Return whether no tokenizer joins what is around it: a single newline between two words."""
    return at >= 2 and _is_line_border(text, at) and not text[at - 2].isspace()


def _is_word_border(text: str, at: int) -> bool:
    """Return whether a word and its space begin here: tokenizers keep the space with the word."""
    return text[at] == " " and not text[at - 1].isspace() and not text[at + 1].isspace()
