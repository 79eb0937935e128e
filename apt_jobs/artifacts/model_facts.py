"""What a model's folder says of it without loading it: whether it can generate, and how large it is.

Weights are read no further than the header of their safetensors files, which has each tensor's type and shape.
"""

import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

NEEDED_FILES = ("config.json", "tokenizer.json")
WEIGHTS = "model*.safetensors"
MAX_JSON_BYTES = 64 << 20
TOKENIZER_CONFIG = "tokenizer_config.json"
_READ = (*NEEDED_FILES, TOKENIZER_CONFIG, "chat_template.jinja")
_SIZE_BYTES = 8  # of a header's length
_UNLIMITED = 1 << 30  # tokenizers that know no limit say 1e30


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is None is not said."""

    why_not: str | None = None  # it cannot generate
    context_tokens: int | None = None
    num_parameters: int | None = None
    size_bytes: int | None = None  # of the weights
    dtype: str | None = None  # of most of the weights, as in safetensors: F32, BF16
    is_chat: bool = False  # it has a template for chats


def why_not_whole(folder: Path) -> str | None:
    """Return which files a model's folder lacks to generate; None: it has all."""
    lacking = [name for name in NEEDED_FILES if not (folder / name).is_file()]
    if not any(folder.glob(WEIGHTS)):
        lacking.append("model.safetensors")
    if not lacking:
        return None
    return (
        f"model {folder.name!r} lacks {', '.join(lacking)}; a model folder holds config.json, tokenizer.json and "
        "weights as safetensors (pickled weights are not read)"
    )


def model_facts(folder: Path) -> ModelFacts:
    """Read a folder, or return what was read while its files are the same."""
    try:
        files = sorted(
            (entry.name, entry.stat().st_size, entry.stat().st_mtime_ns)
            for entry in os.scandir(folder)
            if entry.name in _READ or entry.name.endswith(".safetensors")
        )
    except OSError as exc:
        return ModelFacts(why_not=f"its folder cannot be read: {exc.strerror}")
    return _read(folder, tuple(files))


@lru_cache(maxsize=1_000)
def _read(folder: Path, _files: tuple[tuple[str, int, int], ...]) -> ModelFacts:
    if (lacks := why_not_whole(folder)) is not None:
        return ModelFacts(why_not=lacks)
    try:
        config, tokenizer = _json(folder / NEEDED_FILES[0]), _json(folder / TOKENIZER_CONFIG)
        tensors = [tensor for file in sorted(folder.glob(WEIGHTS)) for tensor in _tensors(file)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        return ModelFacts(why_not=f"its files cannot be read: {type(exc).__name__}: {exc}"[:300])
    num_bytes: Counter[str] = Counter()
    for dtype, _, size in tensors:
        num_bytes[dtype] += size
    return ModelFacts(
        context_tokens=_context_tokens(config, tokenizer),
        num_parameters=sum(count for _, count, _ in tensors),
        size_bytes=num_bytes.total(),
        dtype=max(num_bytes, key=num_bytes.__getitem__, default=None),
        is_chat=bool(tokenizer.get("chat_template")) or (folder / "chat_template.jinja").is_file(),
    )


def _tensors(file: Path) -> list[tuple[str, int, int]]:
    """Return type, number of values and bytes of each tensor."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(_SIZE_BYTES), "little")
        if length > MAX_JSON_BYTES:
            raise ValueError(f"{file.name} is no safetensors file")
        header = json.loads(opened.read(length))
    rows = [row for name, row in header.items() if name != "__metadata__"]
    return [(row["dtype"], math.prod(row["shape"]), row["data_offsets"][1] - row["data_offsets"][0]) for row in rows]


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    with file.open("rb") as opened:
        document = json.loads(opened.read(MAX_JSON_BYTES))
    return dict(document)


def _context_tokens(config: dict[str, Any], tokenizer: dict[str, Any]) -> int | None:
    of_text = {**config, **(config.get("text_config") or {})}
    limit = of_text.get("max_position_embeddings") or of_text.get("n_positions") or tokenizer.get("model_max_length")
    return int(limit) if isinstance(limit, int | float) and 0 < limit < _UNLIMITED else None
