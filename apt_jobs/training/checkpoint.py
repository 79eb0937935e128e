"""Checkpoints: a folder that is complete or not there, that `from_pretrained` loads, and from which a training goes on.

Written to a temporary folder, every file flushed to disk, then one rename to a name that was never used before. No
pickle: tensors are safetensors, the rest is JSON.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerFast

from apt_jobs.errors import InvalidCheckpoint, OutOfSpace
from apt_jobs.jobs.ids import new_checkpoint_id
from apt_jobs.training.ddp import Rank, barrier

MANIFEST, STATE, OPTIMIZER = "manifest.json", "training_state.json", "optimizer.safetensors"
RESERVE_BYTES = 16 << 20  # left free on the disk besides the checkpoint
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Saved:
    """A complete checkpoint."""

    checkpoint_id: str
    folder: Path
    size_bytes: int


def save_checkpoint(
    parent: Path,
    name: str,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    optimizer: Optimizer,
    state: dict[str, Any],
    rank: Rank,
) -> Saved | None:
    """Write `parent/name`. Called by all ranks; rank 0 gets the result.

    Raises:
        OutOfSpace: on rank 0, before anything was written.
    """
    temporary = parent / f".tmp-{name}"
    if rank.is_first:
        sweep(parent)
        _require_space(parent, model, optimizer)
        temporary.mkdir(parents=True)
    barrier()
    save_file(_rng_state(rank), temporary / _rng_file(rank.rank))
    barrier()
    if not rank.is_first:
        return None
    checkpoint_id = new_checkpoint_id()
    try:
        model.save_pretrained(temporary)  # type: ignore[operator]  # every model here is a PreTrainedModel
        tokenizer.save_pretrained(temporary)
        tensors, groups = _optimizer_parts(optimizer)
        save_file(tensors, temporary / OPTIMIZER)
        document = {**state, "checkpoint_id": checkpoint_id, "optimizer_groups": groups}
        (temporary / STATE).write_text(json.dumps(document, allow_nan=True))
        size_bytes = _seal(temporary)
        final = parent / name
        temporary.rename(final)
        _sync(parent)
    except OSError as exc:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OutOfSpace(f"the checkpoint cannot be written: {exc.strerror}; the one before is kept") from exc
    return Saved(checkpoint_id, final, size_bytes)


def verify_checkpoint(folder: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        InvalidCheckpoint: a file is missing, cut or changed.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        for name, expected in manifest["files"].items():
            if _sha256(folder / name) != expected["sha256"]:
                raise InvalidCheckpoint(f"{name} of checkpoint {folder.name!r} is damaged: its sha256 differs")
    except (OSError, ValueError, KeyError) as exc:
        raise InvalidCheckpoint(f"checkpoint {folder.name!r} is not complete: {exc}") from exc


def load_training_state(folder: Path, optimizer: Optimizer, rank: Rank) -> dict[str, Any]:
    """Restore optimizer and random generators; returns what `state` was when it was saved. Called by every rank."""
    document: dict[str, Any] = json.loads((folder / STATE).read_text())
    tensors = load_file(folder / OPTIMIZER)
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": document["optimizer_groups"]})
    rng_file = folder / _rng_file(rank.rank)
    if rng_file.exists():  # with another number of ranks the new ones begin with the seed's state
        _set_rng_state(load_file(rng_file), rank)
    return document


def delete_checkpoint(folder: Path) -> None:
    """Remove a checkpoint: first its name, then its files."""
    doomed = folder.with_name(f".del-{folder.name}")
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(parent: Path) -> None:
    """Remove what a save or a deletion left behind when it was killed."""
    for folder in [*parent.glob(".tmp-*"), *parent.glob(".del-*")]:
        shutil.rmtree(folder, ignore_errors=True)


def _seal(folder: Path) -> int:
    """Flush every file, write the manifest, flush it and the folder; returns the size of all files in bytes."""
    files = {}
    for path in sorted(folder.iterdir()):
        _sync(path)
        files[path.name] = {"sha256": _sha256(path), "size_bytes": path.stat().st_size}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": files}, indent=1))
    _sync(manifest)
    _sync(folder)
    return sum(path.stat().st_size for path in folder.iterdir())


def _require_space(parent: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """A full disk shows as many kinds of error while writing: ask first."""
    needed = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    needed += sum(tensor.numel() * tensor.element_size() for tensor in _optimizer_parts(optimizer)[0].values())
    free = shutil.disk_usage(parent).free
    if free < needed + RESERVE_BYTES:
        raise OutOfSpace(
            f"a checkpoint needs about {needed:,} bytes and {free:,} are free in {parent}; the one before is kept"
        )


def _optimizer_parts(optimizer: Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    whole = optimizer.state_dict()
    tensors = {
        f"{index}.{name}": torch.as_tensor(value).contiguous().cpu()
        for index, values in whole["state"].items()
        for name, value in values.items()
    }
    return tensors, whole["param_groups"]


def _rng_file(rank: int) -> str:
    return f"rng-{rank}.safetensors"


def _rng_state(rank: Rank) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if rank.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(rank.device)
    return state


def _set_rng_state(state: dict[str, Tensor], rank: Rank) -> None:
    torch.set_rng_state(state["cpu"])
    if rank.device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], rank.device)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
