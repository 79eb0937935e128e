"""A folder as one data set."""

import json
from pathlib import Path

import pytest

from apt_jobs.commands.dataset_folder import rows_of_folder
from apt_jobs.errors import InvalidInput


def test_every_text_is_a_document_in_the_order_of_paths(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_bytes(b"\0")
    (tmp_path / "c.md").write_text("\ufeffthree\nlines\n一", encoding="utf-8")
    (tmp_path / "b" / "a.txt").write_text("two")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    with rows_of_folder(tmp_path) as rows:
        found = [json.loads(line) for line in rows]
    assert [(row["file"], row["text"]) for row in found] == [
        ("a.txt", "one"),
        ("b/a.txt", "two"),
        ("c.md", "three\nlines\n一"),
    ]


def test_lines_of_all_files_are_put_together(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"text": "three"}')
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}')
    with rows_of_folder(tmp_path) as rows:
        assert [json.loads(line)["text"] for line in rows] == ["one", "two", "three"]


def test_what_a_folder_cannot_hold_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="has no file"):
        rows_of_folder(tmp_path)
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "b.txt").write_bytes(b"ok")
    with pytest.raises(InvalidInput, match=r"a\.jsonl.*b\.txt"):
        rows_of_folder(tmp_path)
    (tmp_path / "a.jsonl").unlink()
    for content, words in ((b"a\xff", r"b\.txt is not UTF-8 text: byte 1"), (b"a\0", r"b\.txt is binary")):
        (tmp_path / "b.txt").write_bytes(content)
        with pytest.raises(InvalidInput, match=words):
            rows_of_folder(tmp_path)
