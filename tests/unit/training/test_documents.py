"""Documents of every format: cut at borders only, the same whatever the compression, wrong rows named by line."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from apt_jobs.artifacts import dataset_rows
from apt_jobs.artifacts.dataset_rows import Source
from apt_jobs.errors import InvalidDataset
from apt_jobs.jobs.dataset_format import DatasetFormat, compression_of, format_of_name, stored_suffix
from apt_jobs.training.documents import PIECE_CHARS, DocumentReader


def _documents(reader: DocumentReader) -> list[str]:
    found: list[str] = []
    ends = True
    for piece in reader.pieces():
        assert piece.begins_document == ends
        found = [*found, piece.text] if piece.begins_document else [*found[:-1], found[-1] + piece.text]
        ends = piece.ends_document
    assert ends
    return found


def _reader(file: Path, dataset_format: DatasetFormat = DatasetFormat.TEXT, column: str = "text") -> DocumentReader:
    return DocumentReader(Source("mine", file, dataset_format, column))


def _compressed(content: bytes, how: str) -> bytes:
    if how == "gzip":
        return gzip.compress(content)
    return pyarrow.compress(content, codec="zstd", asbytes=True) if how == "zstd" else content


@pytest.mark.parametrize("how", ["plain", "gzip", "zstd"])
@pytest.mark.parametrize(
    "text",
    [
        "words and lines\n" * 200_000,
        "words without any line " * 100_000,
        "一段很短的文字" * 300_000,
        "a\r\n\r\n  b\n\n\n" * 100_000,
        "\n" * 100_000 + "a",
        "x",
    ],
)
def test_a_text_is_one_document_with_every_character(tmp_path: Path, text: str, how: str) -> None:
    (tmp_path / "file").write_bytes(_compressed(text.encode(), how))
    assert _documents(_reader(tmp_path / "file")) == [text]


@pytest.mark.parametrize("border", ["\n", " ", "\r\n", "\n\n"])
def test_no_piece_ends_within_a_word(tmp_path: Path, border: str) -> None:
    (tmp_path / "file").write_text(border.join(["word"] * 300_000), newline="")
    pieces = [piece.text for piece in _reader(tmp_path / "file").pieces()]
    assert len(pieces) > 20
    assert all(piece.endswith("word") or piece.endswith("\n") for piece in pieces)
    assert all(piece.startswith(("word", " word")) for piece in pieces)
    assert max(map(len, pieces)) <= 3 * PIECE_CHARS


def test_jsonl_holds_texts_and_prompts_with_completions(tmp_path: Path) -> None:
    rows = [{"text": "one"}, {"prompt": "two ", "completion": "three", "id": 3}, {"text": "  "}, {"text": ""}]
    (tmp_path / "file").write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)))
    reader = _reader(tmp_path / "file", DatasetFormat.JSONL)
    assert _documents(reader) == ["one", "two three"]
    assert reader.num_empty == 2


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "cut', "line 4,711: not JSON"),
        (
            b'{"other": 1}',
            "line 4,711: no field 'prompt'; expected `text`, or `prompt` and `completion`; it has: 'other'",
        ),
        (b'{"prompt": "a"}', "line 4,711: no field 'completion'"),
        (b'{"text": null}', "line 4,711: field 'text' is a JSON null; expected a string"),
        (b'{"text": ["a"]}', "line 4,711: field 'text' is a JSON array"),
        (b'["text"]', "line 4,711: a JSON array; expected an object"),
        (b"\xff", "line 4,711: not JSON"),
        (rb'{"text": "\ud800"}', "line 4,711: not JSON"),
        (b"[" * 100_000, "line 4,711: not JSON"),
    ],
)
def test_a_wrong_row_is_named_by_its_line(tmp_path: Path, line: bytes, words: str) -> None:
    (tmp_path / "file").write_bytes(b'{"text": "fine"}\n' * 4710 + line + b'\n{"text": "fine"}\n')
    reader = _reader(tmp_path / "file", DatasetFormat.JSONL)
    assert len(_documents(reader)) == 4711
    with pytest.raises(InvalidDataset) as caught:
        reader.require_no_wrong_rows()
    assert words in str(caught.value)
    assert len(str(caught.value)) < 500


def test_all_wrong_rows_are_named_up_to_a_hundred(tmp_path: Path) -> None:
    (tmp_path / "file").write_text('{"text": "fine"}\nwrong\n' * 150)
    reader = _reader(tmp_path / "file", DatasetFormat.JSONL)
    _documents(reader)
    assert len(reader.wrong_rows) == 100
    with pytest.raises(InvalidDataset, match=r"at least 100 rows(?s:.*)line 2:(?s:.*)line 200:"):
        reader.require_no_wrong_rows()


def test_a_row_that_is_too_long_is_wrong_and_the_next_one_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_rows, "MAX_ROW_BYTES", 1_000)
    (tmp_path / "file").write_text(json.dumps({"text": "x" * 5_000}) + '\n{"text": "next"}\n')
    reader = _reader(tmp_path / "file", DatasetFormat.JSONL)
    assert _documents(reader) == ["next"]
    assert reader.wrong_rows == ["line 1: longer than 1,000 bytes"]


def test_parquet_is_read_by_its_column(tmp_path: Path) -> None:
    table = pyarrow.table({"body": ["one", None, "two", " "], "number": [1, 2, 3, 4]})
    pyarrow.parquet.write_table(table, tmp_path / "file")
    reader = _reader(tmp_path / "file", DatasetFormat.PARQUET, "body")
    assert _documents(reader) == ["one", "two"]
    assert reader.num_empty == 2
    with pytest.raises(InvalidDataset, match="no column 'text'; it has: 'body', 'number'"):
        _documents(_reader(tmp_path / "file", DatasetFormat.PARQUET))
    with pytest.raises(InvalidDataset, match="holds int64; expected strings"):
        _documents(_reader(tmp_path / "file", DatasetFormat.PARQUET, "number"))


@pytest.mark.parametrize(
    ("content", "dataset_format", "words"),
    [
        (gzip.compress(b"text\n" * 100_000, mtime=0)[:-50], DatasetFormat.TEXT, "cut or damaged gzip"),
        (pyarrow.compress(b"text\n" * 100_000, codec="zstd", asbytes=True)[:-5], DatasetFormat.TEXT, "cannot be read"),
        (b"PAR1 and no more", DatasetFormat.PARQUET, "cannot be read as Parquet"),
        (b"", DatasetFormat.PARQUET, "cannot be read as Parquet"),
        (b"text \xff", DatasetFormat.TEXT, "not UTF-8 text .byte 5"),
        (b"te\0xt", DatasetFormat.TEXT, "binary .byte 2 is zero"),
        (gzip.compress(b"te\0xt", mtime=0), DatasetFormat.TEXT, "binary .byte 2 is zero"),
    ],
)
def test_a_damaged_file_is_refused_in_words(
    tmp_path: Path, content: bytes, dataset_format: DatasetFormat, words: str
) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(InvalidDataset, match=words):
        _documents(_reader(tmp_path / "file", dataset_format))


def test_formats_are_known_by_names_and_first_bytes() -> None:
    names = {"a.txt": "text", "a.jsonl.gz": "jsonl", "A.NDJSON": "jsonl", "a.parquet": "parquet", "a.npy": "npy"}
    assert {name: format_of_name(name) for name in names} == names
    assert format_of_name("corpus.u16.bin") is DatasetFormat.UINT16
    assert stored_suffix(DatasetFormat.JSONL, gzip.compress(b"")) == "jsonl.gz"
    assert stored_suffix(DatasetFormat.PARQUET, b"PAR1") == "parquet"
    assert compression_of(b"text") is None
