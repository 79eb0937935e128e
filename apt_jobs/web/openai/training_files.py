"""From an uploaded file to a data set that a training job reads: which lines train, and the name that it gets.

What trains is said here alone: `text`, or `prompt` and `completion`. Everything else is refused by its line.
"""

import os
import secrets
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from apt_jobs.artifacts.datasets import DatasetRecord, add_dataset, delete_dataset
from apt_jobs.artifacts.files import file_path
from apt_jobs.errors import InvalidInput, NotFound
from apt_jobs.jobs.dataset_format import DatasetFormat, stored_suffix
from apt_jobs.settings import Settings
from apt_jobs.web.openai.json_lines import json_lines

_FORMS = (("text",), ("prompt", "completion"))


def check_training_lines(file: Path) -> None:
    """Return if every line can train.

    Raises:
        InvalidInput: one cannot; the message names it.
    """
    for line in json_lines(file):
        fault = line.fault if line.value is None else _fault_of(line.value)
        if fault:
            raise InvalidInput(f"line {line.number:,}: {fault}")


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


def _fault_of(row: dict[str, Any]) -> str | None:
    if "messages" in row:
        return "chats (`messages`) do not train yet; send `text`, or `prompt` and `completion`"
    fields = next((form for form in _FORMS if all(field in row for field in form)), None)
    if fields is None:
        has = ", ".join(map(repr, list(row)[:10])) or "none"
        return f"expected `text`, or `prompt` and `completion`; it has: {has[:200]}"
    wrong = next((field for field in fields if not isinstance(row[field], str)), None)
    return None if wrong is None else f"{wrong} is a JSON {type(row[wrong]).__name__}; expected a string"
