"""Prepared data on disk: a folder of tokens that jobs share, and the pointer by which the ranks of an attempt find it.

`<data directory>/prepared/<key>/` appears by one rename and is never changed after it. Who uses it holds a shared lock
on `<key>.lock` beside it; who makes or removes it holds that lock alone. `artifacts/prepared_space.py` removes.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

TOKENS, DOCUMENTS, ABOUT = "tokens.bin", "documents.bin", "about.json"
_POINTER = "prepared.json"

Tokens = np.ndarray[tuple[int], np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Pointer:
    """Where an attempt's tokens are, and what they are."""

    file: str
    dtype: str  # as NumPy writes it; "npy": the file says it itself
    num_tokens: int

    def open_tokens(self) -> Tokens:
        """Map the tokens. Nothing is read before it is used."""
        if self.dtype == "npy":
            tokens: Tokens = np.load(self.file, mmap_mode="r", allow_pickle=False)
            return tokens
        if self.num_tokens == 0:
            return np.empty(0, dtype=self.dtype)
        return np.memmap(self.file, dtype=self.dtype, mode="r", shape=(self.num_tokens,))

    def write(self, run_dir: Path) -> None:
        """Let the other ranks find it. It appears whole."""
        temporary = run_dir / f".{_POINTER}"
        temporary.write_text(json.dumps(asdict(self)))
        temporary.rename(run_dir / _POINTER)


def has_pointer(run_dir: Path) -> bool:
    """Return whether rank 0 has prepared the data of this attempt."""
    return (run_dir / _POINTER).exists()


def read_pointer(run_dir: Path) -> Pointer:
    """Read what rank 0 wrote."""
    return Pointer(**json.loads((run_dir / _POINTER).read_text()))


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
