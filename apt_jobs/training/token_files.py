"""Data sets that are token ids already: checked whole before anything trains, then mapped where they lie."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from apt_jobs.artifacts.dataset_rows import Source
from apt_jobs.errors import InvalidDataset
from apt_jobs.jobs.dataset_format import DatasetFormat
from apt_jobs.training.prepared import Pointer, Tokens

CHECKED_TOKENS = 8 << 20  # at once
_DTYPES = {DatasetFormat.UINT16: "<u2", DatasetFormat.UINT32: "<u4"}


def token_file_pointer(
    source: Source, tokenizer: PreTrainedTokenizerFast | None, model_dir: Path, on_block: Callable[[], None]
) -> Pointer:
    """Check a file of tokens and return where it is. `on_block` is called now and then; it may raise.

    Raises:
        InvalidDataset: it is cut, of another type, or has ids that the vocabulary has not.
    """
    if tokenizer is None or source.file is None:
        raise InvalidDataset(
            f"data set {source.name!r} holds token ids, which mean nothing without their tokenizer: "
            "name the model whose tokenizer made them as base_model"
        )
    try:
        pointer = _npy_pointer(source, source.file) if source.format is DatasetFormat.NPY else _bin_pointer(source)
        tokens = pointer.open_tokens()
        vocab_size = _vocab_size(tokenizer, model_dir)
        for start in range(0, len(tokens), CHECKED_TOKENS):
            on_block()
            _check_block(source, tokens[start : start + CHECKED_TOKENS], start, vocab_size)
    except OSError as exc:
        raise InvalidDataset(f"data set {source.name!r} cannot be read: {exc.strerror or exc}") from exc
    return pointer


def _bin_pointer(source: Source) -> Pointer:
    assert source.file is not None
    dtype = _DTYPES[source.format]
    size_bytes, token_bytes = source.file.stat().st_size, np.dtype(dtype).itemsize
    if size_bytes % token_bytes:
        raise InvalidDataset(
            f"data set {source.name!r} is cut: {size_bytes:,} bytes are no whole number of {source.format} tokens of "
            f"{token_bytes} bytes"
        )
    return Pointer(str(source.file), dtype, size_bytes // token_bytes)


def _npy_pointer(source: Source, file: Path) -> Pointer:
    try:
        tokens = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as exc:
        raise InvalidDataset(f"data set {source.name!r} is no array of NumPy, or is cut: {exc}") from exc
    if tokens.ndim != 1 or tokens.dtype.str not in _DTYPES.values():
        raise InvalidDataset(
            f"data set {source.name!r} is an array of {tokens.dtype} with {tokens.ndim} dimensions; expected uint16 or "
            "uint32 with one"
        )
    return Pointer(str(file), "npy", len(tokens))


def _vocab_size(tokenizer: PreTrainedTokenizerFast, model_dir: Path) -> int:
    """Return how many ids the model knows: its embedding may be larger than the tokenizer's vocabulary."""
    fields, _ = PretrainedConfig.get_config_dict(model_dir)
    size: int = fields.get("vocab_size") or 0
    return max(size, 0) or len(tokenizer)


def _check_block(source: Source, tokens: Tokens, start: int, vocab_size: int) -> None:
    largest = int(tokens.max())
    if largest >= vocab_size:
        at = start + int(np.argmax(tokens >= vocab_size))
        raise InvalidDataset(
            f"data set {source.name!r} is of another vocabulary: token {at:,} is {int(tokens[at - start]):,}; the "
            f"model knows ids below {vocab_size:,}"
        )
