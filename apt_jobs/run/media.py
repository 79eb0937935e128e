"""Images and tables of a user's script: a file in the job's folder, and an event that names it.

NumPy is loaded only by those who give an array; images of other kinds are taken as their libraries encode them.
"""

import io
import json
import math
import os
import secrets
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apt_jobs.errors import InvalidInput
from apt_jobs.jobs.media import (
    MAX_IMAGE_BYTES,
    MAX_JOB_BYTES,
    MAX_JOB_FILES,
    MAX_TABLE_BYTES,
    MAX_TABLE_COLUMNS,
    MAX_TABLE_ROWS,
    image_type,
)
from apt_jobs.run.event_file import printable_text

MAX_CELL_CHARS = 10_000
_PNG = b"\x89PNG\r\n\x1a\n"


class MediaFolder:
    """The files that one process of a run has written, among those of others."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._num_files: int | None = None  # None: not counted yet
        self._num_bytes = 0

    def add(self, content: bytes, suffix: str) -> str:
        """Write a file, synced by its rename; returns its name.

        Raises:
            InvalidInput: the job has as much as it may have.
            OSError: the disk does not take it.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._num_files is None:
            sizes = [file.stat().st_size for file in self._folder.iterdir()]
            self._num_files, self._num_bytes = len(sizes), sum(sizes)
        if self._num_files >= MAX_JOB_FILES or self._num_bytes + len(content) > MAX_JOB_BYTES:
            raise InvalidInput(f"a job has at most {MAX_JOB_FILES:,} images and tables of {MAX_JOB_BYTES >> 20:,} MB")
        name = f"{secrets.token_hex(12)}.{suffix}"
        temporary = self._folder / f".{name}"
        temporary.write_bytes(content)
        temporary.rename(self._folder / name)
        self._num_files += 1
        self._num_bytes += len(content)
        return name


def encoded_image(image: Any) -> tuple[bytes, str]:
    """Return an image as bytes, and its media type.

    Takes the path of a file, bytes, an image of Pillow, a figure of Matplotlib, or an array: of NumPy or torch, H x W,
    H x W x 3, H x W x 4 or 3 x H x W, of uint8, or of floats from 0 to 1.

    Raises:
        InvalidInput: it is none of these, or too large.
        OSError: the file cannot be read.
    """
    if isinstance(image, str | os.PathLike):
        with Path(image).open("rb") as file:
            content = file.read(MAX_IMAGE_BYTES + 1)
    elif isinstance(image, bytes | bytearray | memoryview):
        content = bytes(image)
    elif hasattr(image, "savefig"):
        content = _saved(lambda out: image.savefig(out, format="png"))
    elif hasattr(image, "save") and hasattr(image, "mode"):
        content = _saved(lambda out: image.save(out, format="PNG"))
    elif hasattr(image, "__array__") or hasattr(image, "detach"):
        content = _png_of_array(image)
    else:
        raise InvalidInput(
            f"an image is a path, bytes, a figure, a Pillow image or an array, not {type(image).__name__}"
        )
    kind = image_type(content)
    if kind is None:
        raise InvalidInput("an image is a PNG, a JPEG, a GIF or a WebP; this is none of them")
    if len(content) > MAX_IMAGE_BYTES:
        raise InvalidInput(f"an image has at most {MAX_IMAGE_BYTES >> 20} MB")
    return content, kind


def encoded_table(table: Any, columns: Sequence[str] | None) -> tuple[bytes, int, bool]:
    """Return a table as JSON (`{"columns": [...], "rows": [[...]]}`), its number of rows, and whether it was cut.

    Takes rows (dictionaries, or sequences and `columns`), a dictionary of columns, or a data frame.

    Raises:
        InvalidInput: it is none of these, or too large.
    """
    names, rows = _rows_of(table, columns)
    if len(names) > MAX_TABLE_COLUMNS:
        raise InvalidInput(f"a table has at most {MAX_TABLE_COLUMNS} columns, and this has {len(names):,}")
    kept = rows[:MAX_TABLE_ROWS]
    cells = [[_cell(value) for value in row] for row in kept]
    content = json.dumps({"columns": names, "rows": cells}, ensure_ascii=False, separators=(",", ":"))
    encoded = content.encode("utf-8", "replace")
    if len(encoded) > MAX_TABLE_BYTES:
        raise InvalidInput(f"a table has at most {MAX_TABLE_BYTES >> 20} MB; log fewer rows or shorter texts")
    return encoded, len(cells), len(rows) > len(kept)


def _rows_of(table: Any, columns: Sequence[str] | None) -> tuple[list[str], list[Sequence[Any]]]:
    if hasattr(table, "to_dict") and hasattr(table, "columns"):  # a data frame
        names = [str(name) for name in table.columns]
        table = {name: list(table[column]) for name, column in zip(names, table.columns, strict=True)}
    if isinstance(table, Mapping):
        names = [str(name) for name in table]
        return names, list(zip(*table.values(), strict=True)) if names else []
    if not isinstance(table, Sequence) or isinstance(table, str | bytes):
        raise InvalidInput(f"a table is rows, a dict of columns or a data frame, not {type(table).__name__}")
    if table and isinstance(table[0], Mapping):
        names = list(dict.fromkeys(str(name) for row in table for name in row))
        by_name = [{str(name): value for name, value in row.items()} for row in table]
        return names, [[row.get(name) for name in names] for row in by_name]
    if columns is None:
        raise InvalidInput("rows without names need columns=[...]")
    names = [str(name) for name in columns]
    for number, row in enumerate(table):
        if not isinstance(row, Sequence) or isinstance(row, str | bytes) or len(row) != len(names):
            raise InvalidInput(f"row {number} of the table does not have {len(names)} cells")
    return names, list(table)


def _cell(value: Any) -> str | int | float | bool | None:
    if value is None or isinstance(value, bool | int):
        return value if not isinstance(value, int) or abs(value) < 2**53 else str(value)
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, int):
        return _cell(int(value))
    text = printable_text(str(value))
    return text if len(text) <= MAX_CELL_CHARS else f"{text[:MAX_CELL_CHARS]}..."


def _saved(save: Any) -> bytes:
    out = io.BytesIO()
    save(out)
    return out.getvalue()


def _png_of_array(image: Any) -> bytes:
    """Encode an array without a library for images."""
    import numpy as np  # loaded already by whoever has an array

    array = np.asarray(image.detach().cpu().float() if hasattr(image, "detach") else image)
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)  # channels first, as torch has them
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))) or not array.size:
        raise InvalidInput(f"an image is H x W, H x W x 3 or H x W x 4, not {' x '.join(map(str, array.shape))}")
    if array.nbytes > 8 * MAX_IMAGE_BYTES:
        raise InvalidInput(f"an image of {' x '.join(map(str, array.shape))} is too large; make it smaller")
    if array.dtype == np.bool_ or np.issubdtype(array.dtype, np.floating):
        array = np.nan_to_num(array.astype(np.float64), posinf=1.0, neginf=0.0)
        if float(array.max()) <= 1.0:
            array = array * 255.0
    pixels = np.clip(array, 0, 255).round().astype(np.uint8)
    height, width = pixels.shape[:2]
    color = {2: 0, 3: 2}.get(pixels.ndim, 0) if pixels.ndim == 2 or pixels.shape[2] == 3 else 6
    lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)  # filter 0
    header = struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0)
    return _PNG + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(lines.tobytes())) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
