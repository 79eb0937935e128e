"""From an uploaded file to a data set that a training job reads: which lines train, and the name that it gets.

What trains is what `artifacts/conversations.py` reads, by the first line. Everything else is refused by its line.
"""

import os
import secrets
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from apt_jobs.artifacts.conversations import RowKind, examples_of, row_kind_of
from apt_jobs.artifacts.dataset_rows import WrongRow, kind_of
from apt_jobs.artifacts.datasets import DatasetRecord, add_dataset, delete_dataset
from apt_jobs.artifacts.files import file_path
from apt_jobs.errors import InvalidDataset, InvalidInput, NotFound
from apt_jobs.jobs.dataset_format import DEFAULT_COLUMN, DatasetFormat, stored_suffix
from apt_jobs.settings import Settings
from apt_jobs.web.openai.json_lines import json_lines


def check_training_lines(file: Path) -> RowKind:
    """Return what the lines hold, if every one can train.

    Raises:
        InvalidInput: one cannot; the message names it.
    """
    kind: RowKind | None = None
    for line in json_lines(file):
        if line.value is None:
            raise InvalidInput(f"line {line.number:,}: {line.fault}")
        try:
            kind = kind or row_kind_of(line.value, DEFAULT_COLUMN, file.name, "next_token")
            _require_trainable(line.value, kind)
        except (WrongRow, InvalidDataset) as exc:
            raise InvalidInput(f"line {line.number:,}: {exc}") from exc
    return kind or RowKind.TEXT


def publish_dataset(settings: Settings, file_id: str) -> str:
    """Make a checked file the data set of its own id, for jobs to name; returns the name. Repeating changes nothing."""
    content = file_path(settings, file_id)
    settings.datasets_dir.mkdir(parents=True, exist_ok=True)
    temporary = settings.datasets_dir / f".upload-{secrets.token_hex(8)}"
    try:
        _link_or_copy(content, temporary)  # it stays while a job trains on it, whatever becomes of the file
        status = temporary.stat()
        record = DatasetRecord(
            filename=f"{file_id}.{stored_suffix(DatasetFormat.JSONL, b'')}",
            format=DatasetFormat.JSONL,
            size_bytes=status.st_size,
            modified_ns=status.st_mtime_ns,
            created_at=datetime.now(UTC),
        )
        add_dataset(settings.datasets_dir, file_id, temporary, record)
    except FileExistsError:
        pass
    finally:
        temporary.unlink(missing_ok=True)
    return file_id


def delete_published(settings: Settings, file_id: str) -> None:
    """Delete the data set of a file that is deleted, if there is one."""
    try:
        delete_dataset(settings.datasets_dir, file_id)
    except NotFound:
        pass


def _link_or_copy(content: Path, target: Path) -> None:
    try:
        os.link(content, target)
    except OSError:  # the folder of data sets is on another disk
        shutil.copyfile(content, target)


def _require_trainable(row: dict[str, Any], kind: RowKind) -> None:
    if kind is not RowKind.TEXT:
        examples_of(row, kind, DEFAULT_COLUMN)
        return
    if DEFAULT_COLUMN not in row:
        has = ", ".join(map(repr, list(row)[:10])) or "none"
        raise WrongRow(f"expected `messages`, `text`, or `prompt` and `completion`; it has: {has[:200]}")
    if not isinstance(row[DEFAULT_COLUMN], str):
        raise WrongRow(f"text is a JSON {kind_of(row[DEFAULT_COLUMN])}; expected a string")
