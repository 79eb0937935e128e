"""Where an uploaded data set lies, and what is known about it.

`<datasets>/<name>.<suffix>` is the content and `<datasets>/.about/<name>.json` the record. The record gives a data set
its name: it appears last and goes first. Content without a record, of an earlier version or copied there by an
operator, is text in `<name>.txt`.
"""

import hashlib
import os
import secrets
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from apt_jobs.errors import InvalidDataset, NotFound
from apt_jobs.jobs.dataset_format import DEFAULT_COLUMN, DatasetFormat
from apt_jobs.jobs.spec import NAME_PATTERN

_RECORDS, _TEXT_SUFFIX = ".about", ".txt"
_READ_BYTES = 1 << 20


class DatasetRecord(BaseModel):
    """What is known about the content of a data set."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    filename: str
    format: DatasetFormat = DatasetFormat.TEXT
    column: str = DEFAULT_COLUMN
    sha256: str | None = None  # None: not computed yet
    size_bytes: int
    modified_ns: int  # of the content: when it differs, somebody has changed the file
    created_at: datetime

    def file(self, datasets_dir: Path) -> Path:
        """Return the path of the content."""
        return datasets_dir / self.filename


def find_dataset(datasets_dir: Path, name: str) -> DatasetRecord:
    """Return the record of a data set; `sha256` is None where it is not known for the content that is there.

    Raises:
        NotFound: there is none of this name.
        OSError: the folder cannot be read.
    """
    if not NAME_PATTERN.fullmatch(name):  # one plain part; the operator may have linked it to another disk
        raise NotFound(f"there is no data set {name[:100]!r}")
    stored = _stored_record(datasets_dir, name)
    filename = stored.filename if stored is not None else f"{name}{_TEXT_SUFFIX}"
    try:
        status = (datasets_dir / filename).stat()
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise NotFound(f"there is no data set {name!r}") from exc
    if stored is not None and (stored.size_bytes, stored.modified_ns) == (status.st_size, status.st_mtime_ns):
        return stored
    values = stored.model_dump() if stored is not None else {}
    return DatasetRecord.model_validate(
        {
            **values,
            "filename": filename,
            "sha256": None,
            "size_bytes": status.st_size,
            "modified_ns": status.st_mtime_ns,
            "created_at": datetime.fromtimestamp(status.st_mtime, UTC),
        }
    )


def identify_dataset(datasets_dir: Path, name: str) -> DatasetRecord:
    """Return the record with its `sha256`, which is computed and kept if it is not known.

    Raises:
        NotFound: there is none of this name.
        InvalidDataset: its content cannot be read.
    """
    record = find_dataset(datasets_dir, name)
    if record.sha256 is not None:
        return record
    try:
        record = record.model_copy(update={"sha256": _sha256(record.file(datasets_dir))})
    except OSError as exc:
        raise InvalidDataset(f"data set {name!r} cannot be read: {exc.strerror}") from exc
    try:
        _write(datasets_dir, record).replace(_record_path(datasets_dir, name))
    except OSError:
        pass  # a read-only folder: it is computed again next time
    return record


def list_datasets(datasets_dir: Path) -> Iterator[tuple[str, DatasetRecord]]:
    """Yield every data set by name."""
    names = {path.name.removesuffix(_TEXT_SUFFIX) for path in datasets_dir.glob(f"*{_TEXT_SUFFIX}")}
    names = {name for name in names if not name.startswith(".")}
    records = {path.name.removesuffix(".json") for path in (datasets_dir / _RECORDS).glob("[!.]*.json")}
    for name in sorted(names | records):
        try:
            yield name, find_dataset(datasets_dir, name)
        except NotFound:  # deleted meanwhile
            continue


def add_dataset(datasets_dir: Path, name: str, content: Path, record: DatasetRecord) -> None:
    """Give a whole and synced file the name of a data set.

    Raises:
        FileExistsError: the name is taken.
    """
    if (datasets_dir / f"{name}{_TEXT_SUFFIX}").exists():
        raise FileExistsError(name)
    try:
        find_dataset(datasets_dir, name)
    except NotFound:
        _record_path(datasets_dir, name).unlink(missing_ok=True)  # of an upload that a crash cut short
    temporary = _write(datasets_dir, record)
    try:
        os.link(temporary, _record_path(datasets_dir, name))  # unlike a rename it never replaces a file
        content.replace(record.file(datasets_dir))  # what may be there has no record: nobody can name it
    finally:
        temporary.unlink(missing_ok=True)


def delete_dataset(datasets_dir: Path, name: str) -> None:
    """Delete a data set that `list_datasets` has yielded."""
    record = find_dataset(datasets_dir, name)
    _record_path(datasets_dir, name).unlink(missing_ok=True)
    record.file(datasets_dir).unlink(missing_ok=True)


def _record_path(datasets_dir: Path, name: str) -> Path:
    return datasets_dir / _RECORDS / f"{name}.json"


def _stored_record(datasets_dir: Path, name: str) -> DatasetRecord | None:
    try:
        record = DatasetRecord.model_validate_json(_record_path(datasets_dir, name).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError:
        return None  # damaged: the content counts
    return record if record.filename.startswith(f"{name}.") and "/" not in record.filename else None


def _write(datasets_dir: Path, record: DatasetRecord) -> Path:
    folder = datasets_dir / _RECORDS
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{secrets.token_hex(8)}"
    with temporary.open("w") as file:
        file.write(record.model_dump_json())
        file.flush()
        os.fsync(file.fileno())
    return temporary


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(_READ_BYTES):
            digest.update(part)
    return digest.hexdigest()
