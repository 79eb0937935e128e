"""Adapters: checkpoints with what was trained beside a base model, in peft's folder format. They name that model."""

import json
from pathlib import Path

from apt_jobs.errors import InvalidCheckpoint
from apt_jobs.jobs.spec import NAME_PATTERN

ADAPTER_CONFIG = "adapter_config.json"
MAX_CONFIG_BYTES = 4 << 20
MAX_ADAPTERS = 8  # an adapter's base may be an adapter's checkpoint, and so on


def is_adapter_dir(folder: Path) -> bool:
    """Return whether a folder holds an adapter and not a whole model."""
    return (folder / ADAPTER_CONFIG).is_file()


def base_model_of(folder: Path) -> str:
    """Return the id of the model that an adapter was trained beside.

    Raises:
        InvalidCheckpoint: its configuration cannot be read, or names no id.
    """
    file = folder / ADAPTER_CONFIG
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise InvalidCheckpoint(f"{ADAPTER_CONFIG} of {folder.name!r} is longer than {MAX_CONFIG_BYTES:,} bytes")
        base = json.loads(file.read_bytes())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as exc:
        raise InvalidCheckpoint(f"{ADAPTER_CONFIG} of {folder.name!r} cannot be read: {exc!r}") from exc
    if not isinstance(base, str) or not NAME_PATTERN.fullmatch(base):
        raise InvalidCheckpoint(
            f"{ADAPTER_CONFIG} of {folder.name!r} names {str(base)[:200]!r} as its base model, which is no id of "
            "GET /api/models"
        )
    return base
