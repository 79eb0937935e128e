"""Checkpoints: a folder that is complete or not there, that `from_pretrained` loads, and from which a training goes on.

All ranks take a snapshot together; rank 0 writes it, in any thread, while training goes on: to a temporary folder,
every file flushed to disk, then one rename to a name that was never used before. No pickle: tensors are safetensors,
the rest is JSON. Tensors are whole and named by parameter: a checkpoint can be resumed with other ranks or another
sharding. Of an adapter it has the adapter alone, as peft's `from_pretrained` loads it.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerFast

from apt_jobs.artifacts.folders import TEMPORARY_PREFIX, sweep
from apt_jobs.artifacts.manifest import MANIFEST, manifest_of
from apt_jobs.errors import OutOfSpace
from apt_jobs.jobs.checkpoint_state import CheckpointState, read_checkpoint_state, write_checkpoint_state
from apt_jobs.jobs.ids import new_checkpoint_id
from apt_jobs.training.adapters import adapter_parameters, has_adapter, write_adapter
from apt_jobs.training.byte_collectives import gather_bytes
from apt_jobs.training.ddp import Rank
from apt_jobs.training.ema import WeightAverage

OPTIMIZER = "optimizer.safetensors"
TRAINED = "trained_weights.safetensors"  # where the model of the checkpoint is their average
RESERVE_BYTES = 16 << 20  # left free on the disk besides the checkpoint


@dataclass(frozen=True, slots=True)
class Saved:
    """A complete checkpoint."""

    checkpoint_id: str
    folder: Path
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A training at one step, in memory of rank 0: nothing of it changes when training goes on."""

    weights: dict[str, Tensor]  # of the model that the checkpoint is
    optimizer: dict[str, Tensor]  # "parameter/value"
    optimizer_groups: list[dict[str, Any]]
    generators: list[bytes]  # random generators of each rank, as a safetensors file
    trained: dict[str, Tensor] | None = None  # of which the model is an average; None: the model itself is trained

    @property
    def size_bytes(self) -> int:
        """About what it takes on disk."""
        tensors = (*self.weights.values(), *(self.trained or {}).values(), *self.optimizer.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def take_snapshot(
    model: nn.Module, optimizers: Sequence[Optimizer], rank: Rank, average: WeightAverage | None = None
) -> Snapshot | None:
    """Copy what a checkpoint needs. Called by all ranks; rank 0 gets the result."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, trained = _copied_weights(model, rank), None
    if average is not None:
        trained = weights
        with average.applied():
            weights = _copied_weights(model, rank)
    whole = get_optimizer_state_dict(model, optimizers, options=options)
    generators = gather_bytes(save(_rng_state(rank)), rank.device)
    if generators is None:
        return None
    states: Any = whole["state"]
    groups: Any = whole["param_groups"]
    is_own = _is_own(rank)
    return Snapshot(
        weights=weights,
        trained=trained,
        optimizer={
            f"{parameter}/{name}": _copied(torch.as_tensor(value).cpu(), is_own)
            for parameter, values in states.items()
            for name, value in values.items()
        },
        optimizer_groups=groups,
        generators=generators,
    )


def _copied_weights(model: nn.Module, rank: Rank) -> dict[str, Tensor]:
    """Copy the weights that a checkpoint has: of an adapter those alone. All ranks take part; rank 0 gets them."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=has_adapter(model))
    weights: Any = get_model_state_dict(model, options=options)
    if has_adapter(model):
        frozen = {name: value for name, value in adapter_parameters(model).items() if not value.requires_grad}
        weights |= {name: _whole(value) for name, value in frozen.items()}
    tied = getattr(model, "all_tied_weights_keys", {})  # names under which other parameters appear again
    return {name: _copied(tensor, _is_own(rank)) for name, tensor in weights.items() if name not in tied}


def _whole(parameter: Tensor) -> Tensor:
    """Return a parameter on the CPU, all of a sharded one. All ranks take part."""
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().cpu()


def _is_own(rank: Rank) -> bool:
    """Return whether what the offload returns are the training's own tensors."""
    return rank.device.type == "cpu"


def write_checkpoint(
    parent: Path,
    name: str,
    snapshot: Snapshot,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    state: CheckpointState,
) -> Saved:
    """Write `parent/name`. Of `model` only the configuration is read. Called by rank 0 alone.

    Raises:
        OutOfSpace: the disk has no room or refuses to write; what was there before is as it was.
    """
    temporary = parent / f"{TEMPORARY_PREFIX}{name}"
    sweep(parent)
    _require_space(parent, snapshot.size_bytes)
    checkpoint_id = new_checkpoint_id()
    try:
        temporary.mkdir(parents=True)
        _write_weights(temporary, model, snapshot.weights)
        tokenizer.save_pretrained(temporary)
        save_file(snapshot.optimizer, temporary / OPTIMIZER)
        if snapshot.trained is not None:
            save_file(snapshot.trained, temporary / TRAINED)
        for number, generators in enumerate(snapshot.generators):
            (temporary / _rng_file(number)).write_bytes(generators)
        known_now = {"checkpoint_id": checkpoint_id, "optimizer_groups": snapshot.optimizer_groups}
        write_checkpoint_state(temporary, state.model_copy(update=known_now))
        size_bytes = _seal(temporary)
        final = parent / name
        temporary.rename(final)
        _sync(parent)
    except (OSError, SafetensorError, RuntimeError) as exc:  # a full disk shows as each of them
        shutil.rmtree(temporary, ignore_errors=True)
        raise OutOfSpace(f"the checkpoint {name!r} cannot be written: {exc}; the one before is kept") from exc
    return Saved(checkpoint_id, final, size_bytes)


def _write_weights(folder: Path, model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Write the whole model, or the adapter that is trained."""
    if has_adapter(model):
        write_adapter(folder, model, weights)
    else:
        model.save_pretrained(folder, state_dict=weights)  # type: ignore[operator]  # a PreTrainedModel


def load_training_state(folder: Path, model: nn.Module, optimizers: Sequence[Optimizer], rank: Rank) -> CheckpointState:
    """Restore optimizer and random generators; returns what `state` was when it was saved. Called by every rank."""
    state = read_checkpoint_state(folder)
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / OPTIMIZER).items():
        parameter, _, name = key.rpartition("/")
        states.setdefault(parameter, {})[name] = tensor
    whole: Any = {"state": states, "param_groups": state.optimizer_groups}
    set_optimizer_state_dict(model, optimizers, whole, options=StateDictOptions(full_state_dict=True))
    rng_file = folder / _rng_file(rank.rank)
    if rng_file.exists():  # with another number of ranks the new ones begin with the seed's state
        _set_rng_state(load_file(rng_file), rank)
    return state


def _seal(folder: Path) -> int:
    """Flush every file, write the manifest, flush it and the folder; returns the size of all files in bytes."""
    for path in sorted(folder.iterdir()):
        _sync(path)
    manifest = folder / MANIFEST
    manifest.write_text(manifest_of(folder).model_dump_json(indent=1))
    _sync(manifest)
    _sync(folder)
    return sum(path.stat().st_size for path in folder.iterdir())


def _require_space(parent: Path, needed: int) -> None:
    """Ask for room first: a full disk shows as many kinds of error while writing."""
    free = shutil.disk_usage(parent).free
    if free < needed + RESERVE_BYTES:
        raise OutOfSpace(
            f"a checkpoint needs about {needed:,} bytes and {free:,} are free in {parent}; the one before is kept"
        )


def _copied(tensor: Tensor, is_own: bool) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format) if is_own else tensor.contiguous()


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


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
