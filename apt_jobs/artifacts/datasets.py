"""Data sets: from a name to a file of UTF-8 text in the data directory."""

import os
from dataclasses import dataclass
from pathlib import Path

from apt_jobs.errors import InvalidInput, NotFound
from apt_jobs.jobs.spec import BUILTIN_DATASET, NAME_PATTERN
from apt_jobs.settings import Settings

SUFFIX = ".txt"


@dataclass(frozen=True, slots=True)
class StoredDataset:
    """A data set that was uploaded."""

    name: str
    size_bytes: int


def dataset_file(settings: Settings, name: str) -> Path:
    """Return where a data set of that name is, or would be.

    Raises:
        InvalidInput: it is no name of a data set that can be uploaded.
    """
    if name == BUILTIN_DATASET:
        raise InvalidInput(f"{BUILTIN_DATASET!r} is built in; choose another name")
    if not NAME_PATTERN.fullmatch(name):  # one plain part; the operator may have linked it to another disk
        raise InvalidInput(f"{name[:100]!r} is no name of a data set: letters, digits, '.', '_' and '-', at most 100")
    return settings.datasets_dir / (name + SUFFIX)


def dataset_size_bytes(settings: Settings, name: str) -> int | None:
    """Return the size of an uploaded data set; None: there is none of that name.

    Raises:
        InvalidInput: its file cannot be read.
    """
    try:
        return dataset_file(settings, name).stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        raise InvalidInput(f"the data set {name!r} cannot be read: {exc.strerror}") from exc


def list_datasets(settings: Settings) -> list[StoredDataset]:
    """Return the uploaded data sets, by name."""
    folder = settings.datasets_dir
    if not folder.is_dir():
        return []
    files = [path for path in sorted(folder.glob(f"*{SUFFIX}")) if path.is_file()]
    return [StoredDataset(path.stem, path.stat().st_size) for path in files]


def publish_dataset(settings: Settings, name: str, uploaded: Path) -> None:
    """Give a file in the folder of data sets its name.

    Raises:
        FileExistsError: there is a data set of that name: it is never replaced.
    """
    os.link(uploaded, dataset_file(settings, name))  # unlike a rename it never replaces a file


def delete_dataset(settings: Settings, name: str) -> None:
    """Delete a data set.

    Raises:
        NotFound: there is no uploaded one of that name.
    """
    names = {row.name for row in list_datasets(settings)}
    if name not in names:  # compared with what is there, so that no path is made from what came
        raise NotFound(f"there is no uploaded data set {name!r}")
    dataset_file(settings, name).unlink(missing_ok=True)
