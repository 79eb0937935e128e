"""The beginning of a data set, as those who chose it want to see it before a job trains on it."""

import codecs
import pydoc_data.topics
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from apt_jobs.artifacts.conversations import (
    CHOSEN,
    REJECTED,
    Completion,
    Example,
    RowKind,
    columns_of,
    examples_of,
    row_kind_of,
)
from apt_jobs.artifacts.dataset_rows import Row, RowReader, Source, WrongRow, first_fields, where
from apt_jobs.artifacts.datasets import DatasetRecord
from apt_jobs.errors import InvalidDataset
from apt_jobs.jobs.dataset_format import DatasetFormat

MAX_PART_CHARS = 2_000  # shown of one text
SHOWN_TOKENS = 256  # of a part, or of a file of tokens
_DTYPES = {DatasetFormat.UINT16: "<u2", DatasetFormat.UINT32: "<u4"}


@dataclass(frozen=True, slots=True)
class Part:
    """A text of a row."""

    name: str  # of its field, or its role
    text: str  # its beginning
    is_cut: bool
    is_trained_on: bool


@dataclass(frozen=True, slots=True)
class PreviewRow:
    """A row, or what is wrong with it."""

    where: str
    parts: list[Part]
    fault: str | None = None


@dataclass(frozen=True, slots=True)
class Preview:
    """What a data set begins with."""

    kind: RowKind | None  # None: token ids
    rows: list[PreviewRow]
    token_ids: list[int]  # of a file of tokens


def source_of(datasets_dir: Path, name: str, record: DatasetRecord) -> Source:
    """Return where the documents of an uploaded data set are."""
    return Source(name, record.file(datasets_dir), record.format, record.column)


def preview(source: Source, num_rows: int) -> Preview:
    """Return the first rows of a data set; of a text its beginning, of the built-in data set its first documents.

    Raises:
        InvalidDataset: its content cannot be read as what it is said to be.
    """
    if source.file is None:
        texts = islice(sorted(pydoc_data.topics.topics.items()), num_rows)
        return Preview(RowKind.TEXT, [PreviewRow(name, [_part("text", text)]) for name, text in texts], [])
    if source.format.is_tokens:
        return Preview(None, [], _token_ids(source, source.file))
    if not source.has_rows:
        return Preview(RowKind.TEXT, [PreviewRow("", [_part("text", _beginning(source))])], [])
    fields = first_fields(source)
    objective = "dpo" if CHOSEN in fields and REJECTED in fields and source.column not in fields else "next_token"
    kind = row_kind_of(fields, source.column, source.name, objective)
    return Preview(kind, list(islice(_rows(source, kind), num_rows)), [])


def _rows(source: Source, kind: RowKind) -> Iterator[PreviewRow]:
    reader = RowReader(source)
    for row in reader.rows(lambda schema: columns_of(kind, source.column, schema.names)):
        yield from _wrong(reader)
        try:
            yield PreviewRow(where(source, row.number), _parts(row, kind, source.column))
        except WrongRow as exc:
            yield PreviewRow(where(source, row.number), [], str(exc))
    yield from _wrong(reader)


def _wrong(reader: RowReader) -> Iterator[PreviewRow]:
    """Yield the rows that could not be read since it was asked last."""
    for words in reader.wrong_rows:
        place, _, fault = words.partition(": ")
        yield PreviewRow(place, [], fault)
    reader.wrong_rows.clear()


def _parts(row: Row, kind: RowKind, column: str) -> list[Part]:
    if kind is RowKind.TEXT:
        text = row.fields.get(column)
        if not isinstance(text, str):
            raise WrongRow(f"no text in field {column!r}")
        return [_part(column, text)]
    examples = examples_of(row.fields, kind, column)
    if kind is not RowKind.PREFERENCE:
        return _parts_of(examples[0], "completion")
    chosen, rejected = (_parts_of(example, name) for example, name in zip(examples, (CHOSEN, REJECTED), strict=True))
    num_common = next((at for at, part in enumerate(chosen) if part.is_trained_on), 0)
    of_rejected = [Part(REJECTED, part.text, part.is_cut, part.is_trained_on) for part in rejected[num_common:]]
    return [*chosen[:num_common], *(Part(CHOSEN, p.text, p.is_cut, True) for p in chosen[num_common:]), *of_rejected]


def _parts_of(example: Example, name: str) -> list[Part]:
    if isinstance(example, Completion):
        return [_part("prompt", example.prompt, False), _part(name, example.completion)]
    answers = set(example.answers)
    return [
        _part(message["role"], message["content"], number in answers) for number, message in enumerate(example.messages)
    ]


def _part(name: str, text: str, is_trained_on: bool = True) -> Part:
    return Part(name, text[:MAX_PART_CHARS], len(text) > MAX_PART_CHARS, is_trained_on)


def _beginning(source: Source) -> str:
    reader = RowReader(source)
    with reader.opened() as file:
        head = reader.decompressed(file).read(4 * (MAX_PART_CHARS + 1))
    try:
        return codecs.getincrementaldecoder("utf-8-sig")().decode(head)
    except UnicodeDecodeError as exc:
        raise InvalidDataset(f"data set {source.name!r} is not UTF-8 text (byte {exc.start:,}: {exc.reason})") from exc


def _token_ids(source: Source, file: Path) -> list[int]:
    try:
        if source.format is DatasetFormat.NPY:
            tokens = np.load(file, mmap_mode="r", allow_pickle=False).reshape(-1)[:SHOWN_TOKENS]
        else:
            tokens = np.fromfile(file, _DTYPES[source.format], SHOWN_TOKENS)
    except (OSError, ValueError, EOFError) as exc:
        raise InvalidDataset(f"data set {source.name!r} cannot be read: {exc}") from exc
    return [int(token) for token in tokens]
