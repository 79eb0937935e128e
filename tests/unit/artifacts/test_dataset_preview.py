"""The beginning of data sets of every form: what is trained on, what is wrong, and nothing without a bound."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apt_jobs.artifacts.dataset_preview import MAX_PART_CHARS, SHOWN_TOKENS, Preview, preview
from apt_jobs.artifacts.dataset_rows import Source
from apt_jobs.errors import InvalidDataset
from apt_jobs.jobs.dataset_format import DatasetFormat

QUESTION = {"role": "user", "content": "one?"}
ANSWER = {"role": "assistant", "content": "two"}


def _preview(folder: Path, content: bytes, dataset_format: DatasetFormat, num_rows: int = 5) -> Preview:
    (folder / "file").write_bytes(content)
    return preview(Source("mine", folder / "file", dataset_format), num_rows)


def _lines(*rows: Any) -> bytes:
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows).encode()


@pytest.mark.parametrize(
    ("row", "kind", "parts"),
    [
        ({"text": "one"}, "text", [("text", "one", True)]),
        ({"messages": [QUESTION, ANSWER]}, "conversation", [("user", "one?", False), ("assistant", "two", True)]),
        ({"prompt": "a", "completion": "b"}, "completion", [("prompt", "a", False), ("completion", "b", True)]),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "preference",
            [("prompt", "a", False), ("chosen", "b", True), ("rejected", "c", True)],
        ),
        (
            {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "no"}]},
            "preference",
            [("user", "one?", False), ("chosen", "two", True), ("rejected", "no", True)],
        ),
    ],
)
def test_rows_show_what_is_trained_on(tmp_path: Path, row: Any, kind: str, parts: list[Any]) -> None:
    found = _preview(tmp_path, _lines(row, row), DatasetFormat.JSONL)
    assert found.kind == kind
    assert [row.where for row in found.rows] == ["line 1", "line 2"]
    assert [(part.name, part.text, part.is_trained_on) for part in found.rows[1].parts] == parts


def test_wrong_rows_are_shown_in_their_place(tmp_path: Path) -> None:
    found = _preview(tmp_path, _lines({"text": "a"}, "{", {"text": 1}, {"text": "b"}, "["), DatasetFormat.JSONL)
    assert [(row.where, row.fault is not None) for row in found.rows] == [
        ("line 1", False),
        ("line 2", True),
        ("line 3", True),
        ("line 4", False),
        ("line 5", True),
    ]


def test_a_text_is_shown_up_to_a_limit_plain_or_compressed(tmp_path: Path) -> None:
    text = ("some words 一段文字 " * 1_000).encode()
    for content in (text, gzip.compress(text)):
        ((part,),) = (row.parts for row in _preview(tmp_path, content, DatasetFormat.TEXT).rows)
        assert part.is_cut
        assert part.text == text.decode()[:MAX_PART_CHARS]


@pytest.mark.parametrize("dataset_format", [DatasetFormat.UINT16, DatasetFormat.NPY])
def test_files_of_tokens_show_the_first_ones(tmp_path: Path, dataset_format: DatasetFormat) -> None:
    tokens = np.arange(1_000, dtype="<u2")
    content = tokens.tobytes()
    if dataset_format is DatasetFormat.NPY:
        np.save(tmp_path / "a.npy", tokens)
        content = (tmp_path / "a.npy").read_bytes()
    found = _preview(tmp_path, content, dataset_format)
    assert (found.kind, found.rows, found.token_ids) == (None, [], list(range(SHOWN_TOKENS)))


def test_the_built_in_data_set_shows_its_documents() -> None:
    assert len(preview(Source("pydoc-topics", None), 3).rows) == 3


@pytest.mark.parametrize(
    ("content", "dataset_format"),
    [(b"\xff\xfe", DatasetFormat.TEXT), (b"PAR1", DatasetFormat.PARQUET), (b"\x93NUMPY", DatasetFormat.NPY)],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, content: bytes, dataset_format: DatasetFormat) -> None:
    with pytest.raises(InvalidDataset, match="data set 'mine'"):
        _preview(tmp_path, content, dataset_format)
