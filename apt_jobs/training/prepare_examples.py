"""Prepare a fine-tuning data set: rows become tokens and answers on disk, and each is held against the context."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from apt_jobs.artifacts.conversations import RowKind, columns_of, contents_of, examples_of
from apt_jobs.artifacts.dataset_rows import MAX_WRONG_ROWS, Row, RowReader, Source, WrongRow, where
from apt_jobs.errors import InvalidDataset
from apt_jobs.jobs.data_options import DataOptions
from apt_jobs.training.example_encoding import EncodedExamples, ExampleEncoder
from apt_jobs.training.prepared import ABOUT, ANSWERS, DOCUMENTS, ROWS, TOKENS, Examples, Pointer, synced

BATCH_CHARS = 1 << 20  # written and tokenised at once; offsets of tokens cost more than the tokens
MAX_BATCH_ROWS = 4_096


class ExampleFiles:
    """Writes the files of one prepared data set, and what it holds."""

    def __init__(self, source: Source, kind: RowKind, tokenizer: PreTrainedTokenizerFast) -> None:
        """Prepare to write.

        Raises:
            InvalidInput: rows are conversations, and there is no template for them.
        """
        self._source, self._kind = source, kind
        self._encoder = ExampleEncoder(tokenizer, kind, source.column)

    def write(self, folder: Path, on_batch: Callable[[int], None]) -> tuple[int, int]:
        """Write all rows, a batch at a time, reading one while another is encoded; returns examples and tokens.

        Args:
            folder: Where the files are to be.
            on_batch: Called with the bytes read so far before each batch; it may raise.

        Raises:
            InvalidDataset: rows are wrong, all of which are named, or there are none.
        """
        reader = RowReader(self._source)
        num_tokens = num_examples = 0
        with (
            synced(folder / TOKENS) as tokens,
            synced(folder / ANSWERS) as answers,
            synced(folder / DOCUMENTS) as starts,
            synced(folder / ROWS) as rows,
            ThreadPoolExecutor(1, "encode") as executor,
        ):

            def write(encoded: EncodedExamples) -> None:
                nonlocal num_tokens, num_examples
                for number, words in encoded.wrong:
                    reader.add_wrong(number, words)
                tokens.write(encoded.ids.astype(self._encoder.dtype).tobytes())
                answers.write(encoded.mask.tobytes())
                starts.write((encoded.starts + np.uint64(num_tokens)).astype("<u8").tobytes())
                rows.write(encoded.rows.astype("<u8").tobytes())
                num_tokens += len(encoded.ids)
                num_examples += len(encoded.rows)

            pending: Future[EncodedExamples] | None = None
            for batch in _batches(row_iterator(reader, self._kind)):
                on_batch(reader.num_bytes_read)
                encoding = executor.submit(self._encoder.encode, batch)
                if pending is not None:
                    write(pending.result())
                pending = encoding
            if pending is not None:
                write(pending.result())
        reader.wrong_rows.sort(key=_row_number)
        reader.require_no_wrong_rows()
        if num_examples == 0:
            raise InvalidDataset(f"data set {self._source.name!r} is empty")
        about = {"dtype": self._encoder.dtype.str, "num_tokens": num_tokens, "num_documents": num_examples}
        with synced(folder / ABOUT) as file:
            file.write(json.dumps({**about, "kind": self._kind}).encode())
        return num_examples, num_tokens


def row_iterator(reader: RowReader, kind: RowKind) -> Iterator[Row]:
    """Yield the rows, with the columns that this kind needs."""
    return reader.rows(lambda schema: columns_of(kind, reader.source.column, schema.names))


def texts_of(source: Source, kind: RowKind) -> Iterator[str]:
    """Yield the texts of all rows that can be used, for a vocabulary to be learned from."""
    for row in row_iterator(RowReader(source), kind):
        try:
            examples = examples_of(row.fields, kind, source.column)
        except WrongRow:
            continue  # it is named when the rows are encoded
        for example in examples:
            yield from contents_of(example)


def check_lengths(pointer: Pointer, source: Source, options: DataOptions, context: int) -> str | None:
    """Hold every example against the context; returns what is to be logged about those that are longer.

    Raises:
        InvalidDataset: some are longer, which the job wants to know before it trains; or all are.
    """
    examples = pointer.open_examples()
    lengths = examples.lengths
    longer = np.flatnonzero(lengths > context)
    if not len(longer):
        return None
    rows = np.unique(examples.rows[longer])
    if options.longer_than_context == "refuse":
        raise InvalidDataset(_too_long(examples, longer, source, context, len(rows)))
    if options.longer_than_context == "skip":
        return f"{len(rows):,} rows of data set {source.name!r} are longer than {context:,} tokens and are skipped"
    return f"{len(rows):,} rows of data set {source.name!r} are cut after {context:,} tokens"


def require_alike(kind: RowKind, other: RowKind, field: str, words: str) -> None:
    """Return if the rows of a data set, which `field` names, go with those that are trained on.

    Raises:
        InvalidDataset: they do not.
    """
    comparable = {RowKind.CONVERSATION, RowKind.COMPLETION}
    if kind is not other and not {kind, other} <= comparable:
        raise InvalidDataset(f"{field}: {words} holds {other} rows, the training has {kind} rows")


def _too_long(examples: Examples, longer: np.ndarray, source: Source, context: int, num_rows: int) -> str:
    lines = [
        f"{where(source, int(examples.rows[one]))}: {int(examples.lengths[one]):,} tokens"
        for one in longer[:MAX_WRONG_ROWS]
    ]
    return (
        f"data set {source.name!r} has {num_rows:,} rows that are longer than the {context:,} tokens of "
        "model.max_seq_len and the model; raise model.max_seq_len, shorten them, or set data.longer_than_context to "
        "'skip' or 'truncate':\n" + "\n".join(lines)
    )


def _row_number(words: str) -> int:
    return int(words.split(":", 1)[0].rsplit(" ", 1)[-1].replace(",", ""))


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    num_chars = 0
    for row in rows:
        batch.append(row)
        num_chars += _num_chars(row)
        if num_chars >= BATCH_CHARS or len(batch) >= MAX_BATCH_ROWS:
            yield batch
            batch, num_chars = [], 0
    yield batch


def _num_chars(row: Row) -> int:
    """Return about how long the texts of a row are."""
    num_chars = 0
    for value in islice(row.fields.values(), 16):
        if isinstance(value, str):
            num_chars += len(value)
        elif isinstance(value, list):
            num_chars += sum(len(str(one.get("content", ""))) for one in value if isinstance(one, dict))
    return num_chars
