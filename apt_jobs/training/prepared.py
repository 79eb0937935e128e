"""Prepared data on disk: a folder of tokens that jobs share, and the pointer by which the ranks of an attempt find it.

`<data directory>/prepared/<key>/` appears by one rename and is never changed after it. Who uses it holds a shared lock
on `<key>.lock` beside it; who makes or removes it holds that lock alone. `artifacts/shared_space.py` removes.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apt_jobs.artifacts.conversations import RowKind

TOKENS, DOCUMENTS, ABOUT = "tokens.bin", "documents.bin", "about.json"
ANSWERS, ROWS = "answers.bin", "rows.bin"  # of examples: 1 for each token of an answer; the row of each example
_POINTER = "prepared.json"
VALIDATION = "prepared-validation.json"  # the pointer to a data set of its own


def mixed_pointer_name(number: int) -> str:
    """Return the name of the pointer to a data set of a mixture; 0 is the first."""
    return _POINTER if number == 0 else f"prepared-{number}.json"


def evaluation_pointer_name(name: str) -> str:
    """Return the name of the pointer to a data set that is evaluated by name."""
    return f"prepared-evaluation-{name}.json"


Tokens = np.ndarray[tuple[int], np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Examples:
    """Examples to fine-tune on, one after the other; of pairs the chosen one first. Only `bounds` is in memory."""

    tokens: Tokens
    answers: "np.ndarray[tuple[int], np.dtype[np.uint8]]"  # 1: a token of an answer
    bounds: "np.ndarray[tuple[int], np.dtype[np.int64]]"  # example i is `tokens[bounds[i] : bounds[i + 1]]`
    rows: "np.ndarray[tuple[int], np.dtype[np.uint64]]"  # of the data set, from 1

    @property
    def lengths(self) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        """Tokens of each example."""
        return np.diff(self.bounds)


@dataclass(frozen=True, slots=True)
class Pointer:
    """Where an attempt's tokens are, and what they are."""

    file: str
    dtype: str  # as NumPy writes it; "npy": the file says it itself
    num_tokens: int
    kind: RowKind = RowKind.TEXT

    def open_tokens(self) -> Tokens:
        """Map the tokens. Nothing is read before it is used."""
        if self.dtype == "npy":
            tokens: Tokens = np.load(self.file, mmap_mode="r", allow_pickle=False)
            return tokens
        if self.num_tokens == 0:
            return np.empty(0, dtype=self.dtype)
        return np.memmap(self.file, dtype=self.dtype, mode="r", shape=(self.num_tokens,))

    def open_starts(self) -> "np.ndarray[tuple[int], np.dtype[np.uint64]] | None":
        """Map where documents start; None: the tokens were uploaded, and nobody knows."""
        file = Path(self.file).parent / DOCUMENTS
        if Path(self.file).name != TOKENS or file.stat().st_size == 0:
            return None
        return np.memmap(file, dtype="<u8", mode="r")

    def open_examples(self) -> "Examples":
        """Map what there is of conversations, completions or pairs besides their tokens."""
        folder = Path(self.file).parent
        starts = np.memmap(folder / DOCUMENTS, dtype="<u8", mode="r")
        rows = np.memmap(folder / ROWS, dtype="<u8", mode="r")
        answers = np.memmap(folder / ANSWERS, dtype=np.uint8, mode="r")
        return Examples(
            self.open_tokens(), answers, np.append(starts, np.uint64(self.num_tokens)).astype(np.int64), rows
        )

    def write(self, run_dir: Path, name: str = _POINTER) -> None:
        """Let the other ranks find it. It appears whole."""
        temporary = run_dir / f".{name}"
        temporary.write_text(json.dumps(asdict(self)))
        temporary.rename(run_dir / name)


def has_pointer(run_dir: Path) -> bool:
    """Return whether rank 0 has prepared the data of this attempt."""
    return (run_dir / _POINTER).exists()


def read_pointer(run_dir: Path, name: str = _POINTER) -> Pointer:
    """Read what rank 0 wrote."""
    stored = json.loads((run_dir / name).read_text())
    return Pointer(**{**stored, "kind": RowKind(stored["kind"])})


def read_prepared(folder: Path) -> Pointer:
    """Return the pointer to what a prepared folder holds."""
    about = json.loads((folder / ABOUT).read_text())
    return Pointer(str(folder / TOKENS), about["dtype"], about["num_tokens"], RowKind(about.get("kind", RowKind.TEXT)))


def is_complete(folder: Path) -> bool:
    """Return whether nothing was cut off a prepared folder."""
    about = json.loads((folder / ABOUT).read_text())
    sizes = {TOKENS: about["num_tokens"] * np.dtype(about["dtype"]).itemsize}
    if about.get("kind", RowKind.TEXT) != RowKind.TEXT:
        per_example = about["num_documents"] * 8
        sizes |= {ANSWERS: about["num_tokens"], DOCUMENTS: per_example, ROWS: per_example}
    return all((folder / name).exists() and (folder / name).stat().st_size == size for name, size in sizes.items())


@contextmanager
def synced(path: Path) -> Iterator[Any]:
    """Open a file to write; when the block ends its bytes are on the disk."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def publish(temporary: Path, folder: Path) -> None:
    """Give a complete folder its name."""
    sync_folder(temporary)
    temporary.rename(folder)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Have the disk keep the names in a folder."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
