"""The forms that a data set can have: what an upload names, a run file carries, and the preparation reads."""

import enum

DEFAULT_COLUMN = "text"  # field of JSONL and column of Parquet that holds the documents
GZIP_MAGIC, ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # neither can begin UTF-8 text
PARQUET_MAGIC, NPY_MAGIC = b"PAR1", b"\x93NUMPY"


class DatasetFormat(enum.StrEnum):
    """How the documents of a data set are written down."""

    TEXT = "text"  # UTF-8, the whole file one document; may be compressed with gzip or zstd
    JSONL = "jsonl"  # one JSON object a line, one document each; may be compressed with gzip or zstd
    PARQUET = "parquet"  # one document a row
    UINT16 = "uint16"  # token ids, little-endian, nothing else
    UINT32 = "uint32"  # the same, four bytes each
    NPY = "npy"  # token ids as a one-dimensional array of NumPy, uint16 or uint32

    @property
    def is_tokens(self) -> bool:
        """Whether it holds token ids instead of text."""
        return self in (DatasetFormat.UINT16, DatasetFormat.UINT32, DatasetFormat.NPY)

    @property
    def may_be_compressed(self) -> bool:
        """Whether gzip and zstd are recognized."""
        return self in (DatasetFormat.TEXT, DatasetFormat.JSONL)


_SUFFIXES = {
    DatasetFormat.TEXT: "txt",
    DatasetFormat.JSONL: "jsonl",
    DatasetFormat.PARQUET: "parquet",
    DatasetFormat.UINT16: "u16.bin",
    DatasetFormat.UINT32: "u32.bin",
    DatasetFormat.NPY: "npy",
}
_COMPRESSIONS = {GZIP_MAGIC: "gz", ZSTD_MAGIC: "zst"}


def compression_of(head: bytes) -> str | None:
    """Return `gz` or `zst` if the first bytes of a file say so."""
    return next((suffix for magic, suffix in _COMPRESSIONS.items() if head.startswith(magic)), None)


def stored_suffix(dataset_format: DatasetFormat, head: bytes) -> str:
    """Return how the name of a stored data set ends, from its format and its first bytes."""
    suffix = _SUFFIXES[dataset_format]
    compression = compression_of(head) if dataset_format.may_be_compressed else None
    return suffix if compression is None else f"{suffix}.{compression}"


def format_of_name(filename: str) -> DatasetFormat:
    """Return the format that a file's name suggests: text, unless its suffix says more."""
    name = filename.lower()
    for compression in _COMPRESSIONS.values():
        name = name.removesuffix(f".{compression}")
    by_suffix = {f".{suffix}": known for known, suffix in _SUFFIXES.items()}
    by_suffix[".ndjson"] = DatasetFormat.JSONL
    return next((known for suffix, known in by_suffix.items() if name.endswith(suffix)), DatasetFormat.TEXT)
