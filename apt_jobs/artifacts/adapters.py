"""Adapters: checkpoints with what was trained beside a base model, in peft's folder format. They name that model."""

import json
from pathlib import Path
from typing import Any

from apt_jobs.errors import InvalidCheckpoint
from apt_jobs.jobs.spec import NAME_PATTERN

ADAPTER_CONFIG = "adapter_config.json"
MAX_CONFIG_BYTES = 4 << 20
MAX_ADAPTERS = 8  # an adapter's base may be an adapter's checkpoint, and so on
# What of peft's configuration leaves an adapter two matrices a layer, whose product is added to the layer's weight.
_PLAIN = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")  # of training; others change the base model's weights


def is_adapter_dir(folder: Path) -> bool:
    """Return whether a folder holds an adapter and not a whole model."""
    return (folder / ADAPTER_CONFIG).is_file()


def adapter_config(folder: Path) -> dict[str, Any]:
    """Return peft's configuration of an adapter.

    Raises:
        InvalidCheckpoint: it cannot be read.
    """
    file = folder / ADAPTER_CONFIG
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise InvalidCheckpoint(f"{ADAPTER_CONFIG} of {folder.name!r} is longer than {MAX_CONFIG_BYTES:,} bytes")
        config = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as exc:
        raise InvalidCheckpoint(f"{ADAPTER_CONFIG} of {folder.name!r} cannot be read: {exc!r}") from exc
    if not isinstance(config, dict):
        raise InvalidCheckpoint(f"{ADAPTER_CONFIG} of {folder.name!r} holds {type(config).__name__}, no object")
    return config


def is_plain_lora(folder: Path) -> bool:
    """Return whether an adapter is LoRA without more: not DoRA, no layers trained whole, no ranks of single layers.

    Raises:
        InvalidCheckpoint: its configuration cannot be read.
    """
    config = adapter_config(folder)
    return (
        config.get("peft_type") == "LORA"
        and config.get("bias", "none") == "none"
        and config.get("init_lora_weights", True) in _PLAIN_STARTS
        and not config.get("rank_pattern")
        and not config.get("alpha_pattern")
        and not any(value for name, value in config.items() if name not in _PLAIN)
    )


def base_model_of(folder: Path) -> str:
    """Return the id of the model that an adapter was trained beside.

    Raises:
        InvalidCheckpoint: its configuration cannot be read, or names no id.
    """
    base = adapter_config(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not NAME_PATTERN.fullmatch(base):
        raise InvalidCheckpoint(
            f"{ADAPTER_CONFIG} of {folder.name!r} names {str(base)[:200]!r} as its base model, which is no id of "
            "GET /api/models"
        )
    return base
