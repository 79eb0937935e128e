"""Read a data set as documents, in bounded memory: text, JSONL and Parquet, plain or compressed.

A document arrives in pieces that end at line borders, never inside a word, so that pieces can be tokenised in parallel
and the result does not depend on how they were cut. Wrong rows are collected, not raised one by one.
"""

import codecs
import pydoc_data.topics
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

from apt_jobs.artifacts.dataset_rows import READ_BYTES, RowReader, Source, WrongRow, kind_of, shown
from apt_jobs.errors import InvalidDataset
from apt_jobs.jobs.dataset_format import DEFAULT_COLUMN, DatasetFormat

PIECE_CHARS = 16_384  # about as long as a piece is
MAX_PIECE_CHARS = 1 << 20  # of a word that has no end
_ANY_BORDER = re.compile(r"(?<=\n)(?=\S)|(?<=\S)(?= \S)")


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a document."""

    text: str
    begins_document: bool
    ends_document: bool


class DocumentReader(RowReader):
    """Reads one data set once."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self.num_empty = 0  # documents that were skipped

    def pieces(self) -> Iterator[Piece]:
        """Yield the documents, in order.

        Raises:
            InvalidDataset: the file cannot be read as what it is said to be.
        """
        if self.source.file is None:
            for _, text in sorted(pydoc_data.topics.topics.items()):
                yield from self._pieces_of(text)
        elif self.source.has_rows:
            yield from self._of_rows()
        else:
            with self.opened() as file:
                yield from self._of_text(self.decompressed(file))

    def _of_rows(self) -> Iterator[Piece]:
        column = self.source.column
        is_parquet = self.source.format is DatasetFormat.PARQUET
        for row in self.rows(self._parquet_columns):
            if is_parquet and row.fields[column] is None:
                self.num_empty += 1
                continue
            try:
                text = _text_of(row.fields, column)
            except WrongRow as exc:
                self.add_wrong(row.number, str(exc))
                continue
            yield from self._pieces_of(text)

    def _parquet_columns(self, schema: Any) -> list[str]:
        name, column = self.source.name, self.source.column
        if column not in schema.names:
            raise InvalidDataset(
                f"data set {name!r} has no column {column!r}; it has: {', '.join(map(repr, schema.names[:50]))}; "
                "upload it again with `column`"
            )
        kind = schema.field(column).type
        if str(kind) not in ("string", "large_string"):
            raise InvalidDataset(f"column {column!r} of data set {name!r} holds {kind}; expected strings")
        return [column]

    def _of_text(self, stream: IO[bytes]) -> Iterator[Piece]:
        """Read the whole file as one document."""
        name, decoder, held = self.source.name, codecs.getincrementaldecoder("utf-8")(), ""
        num_decoded, begins, is_over = 0, True, False
        while not is_over:
            part = stream.read(READ_BYTES)
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

    def _pieces_of(self, text: str) -> Iterator[Piece]:
        """Cut a whole document."""
        if not text.strip():
            self.num_empty += 1
            return
        parts = _cut(text, is_whole=True)
        for number, part in enumerate(parts):
            yield Piece(part, number == 0, number == len(parts) - 1)


def _text_of(row: Mapping[str, Any], column: str) -> str:
    """Return the document of a row.

    Raises:
        WrongRow: it has none.
    """
    fields = [column] if column in row or column != DEFAULT_COLUMN else ["prompt", "completion"]
    if missing := [field for field in fields if field not in row]:
        expected = f"field {column!r}" if column != DEFAULT_COLUMN else "`text`, or `prompt` and `completion`"
        has = ", ".join(map(repr, list(row)[:10])) or "none"
        raise WrongRow(f"no field {missing[0]!r}; expected {expected}; it has: {shown(has)}")
    for field in fields:
        if not isinstance(row[field], str):
            raise WrongRow(f"field {field!r} is a JSON {kind_of(row[field])}; expected a string")
    return "".join(row[field] for field in fields)


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
