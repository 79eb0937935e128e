"""A folder as one data set: JSONL with a document of each text, or with the lines of all its JSONL files."""

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from apt_jobs.errors import InvalidInput

MAX_FILE_BYTES = 48 << 20  # of a text: a line of JSONL has at most 64 MiB, and JSON writes some signs longer
MAX_FILES = 1_000_000
_LINES = (".jsonl", ".ndjson")


def rows_of_folder(folder: Path) -> IO[bytes]:
    """Return JSONL of the files of a folder, in the order of their paths, as a file that is deleted when it is closed.

    Raises:
        InvalidInput: a file is no text, or the folder holds none, or texts and JSONL.
        OSError: something cannot be read, or the disk is full.
    """
    files = sorted(_files(folder))
    if not files:
        raise InvalidInput(f"{folder} has no file; hidden files and links are left out")
    with_lines = [file for file in files if file.suffix.lower() in _LINES]
    if with_lines and len(with_lines) < len(files):
        other = next(file for file in files if file not in set(with_lines))
        raise InvalidInput(
            f"{folder} holds JSONL ({with_lines[0].name}) and other files ({other.name}); upload one kind"
        )
    rows = tempfile.TemporaryFile()  # noqa: SIM115  # whoever uploads it closes it
    try:
        for file in files:
            _add_lines(file, rows) if with_lines else _add_text(file, folder, rows)
        rows.seek(0)
    except BaseException:
        rows.close()
        raise
    return rows


def _files(folder: Path) -> Iterator[Path]:
    number = 0
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            file = Path(place) / name
            if name.startswith(".") or file.is_symlink() or not file.is_file():
                continue
            number += 1
            if number > MAX_FILES:
                raise InvalidInput(f"{folder} has more than {MAX_FILES:,} files; write their texts as JSONL")
            yield file


def _add_text(file: Path, folder: Path, rows: IO[bytes]) -> None:
    size_bytes = file.stat().st_size
    if size_bytes > MAX_FILE_BYTES:
        raise InvalidInput(f"{file} has {size_bytes:,} bytes; a document of a folder has at most {MAX_FILE_BYTES:,}")
    content = file.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise InvalidInput(f"{file} is not UTF-8 text: byte {exc.start:,}: {exc.reason}") from exc
    if "\0" in text:
        raise InvalidInput(f"{file} is binary: character {text.index(chr(0)):,} is zero")
    row = {"text": text, "file": file.relative_to(folder).as_posix().encode("utf-8", "replace").decode()}
    rows.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def _add_lines(file: Path, rows: IO[bytes]) -> None:
    ends_line = True
    with file.open("rb") as lines:
        while part := lines.read(1 << 20):
            rows.write(part)
            ends_line = part.endswith(b"\n")
    if not ends_line:
        rows.write(b"\n")
