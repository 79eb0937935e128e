"""Adapters that share one model in memory: which are there, in which slots, and who leaves for another one.

An adapter is read beside the running texts and written into a slot between two steps. What two matrices a layer cannot
say (DoRA, layers trained whole), or a model that cannot tell its rows apart, is `NotShareable`: that adapter is merged
into a copy of its model.
"""

import math
import threading
from collections.abc import Sequence as Rows
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from apt_jobs.artifacts.adapters import adapter_config, is_plain_lora
from apt_jobs.errors import AptJobsError, InvalidCheckpoint, NotFound, Unavailable
from apt_jobs.generation.adapter_bank import (
    Adapter,
    AdapterBank,
    AdapterKey,
    Matrices,
    User,
    adapting_rows,
    reached_layers,
)
from apt_jobs.generation.memory import free_bytes
from apt_jobs.generation.models import LoadedModel, beside_adapters
from apt_jobs.generation.probe import relative_difference, tolerance
from apt_jobs.training.adapters import MAMBA_KINDS, PREFIX, WEIGHTS

MEMORY_FRACTION = 0.5  # of what is free, for the matrices of one more adapter
_A, _B = ".lora_A.weight", ".lora_B.weight"


class NotShareable(AptJobsError):
    """The adapter has to be merged into a model of its own."""


class Adapters:
    """The adapters of one model. All calls but `read` come from the model's thread."""

    def __init__(self, model: LoadedModel, max_adapters: int) -> None:
        self._model, self._max_adapters = model, max_adapters
        self._bank = AdapterBank(model.model)
        self._lock = threading.Lock()
        self._placed: list[Adapter] = []  # least recently used first

    @property
    def folders(self) -> list[Path]:
        """Return the folder of each adapter in memory; of several upon each other that of the last."""
        with self._lock:
            return [adapter.key.folders[-1] for adapter in self._placed]

    def find(self, key: AdapterKey) -> Adapter | None:
        """Return an adapter that is in memory."""
        return next((adapter for adapter in self._placed if adapter.key == key), None)

    def read(self, key: AdapterKey) -> Adapter:
        """Read an adapter, in any thread.

        Raises:
            NotFound: its folder is gone.
            InvalidCheckpoint: it is damaged, or none of this model.
            NotShareable: it has to be merged.
        """
        base = self._model
        if base.model.config.model_type in MAMBA_KINDS:
            raise NotShareable("its kernels read the weights and do not call the layers")
        described = beside_adapters(base, key.folders)
        return Adapter(key, described, _matrices(base.model, key.folders), self._bank)

    def place(self, adapter: Adapter, user: User) -> bool:
        """Give an adapter a slot for as long as the user is at work. False: all are taken by adapters at work.

        Raises:
            Unavailable: there is no memory for a single adapter.
            NotShareable: the model cannot be changed for single rows.
        """
        if adapter not in self._placed and not self._write(adapter):
            return False
        with self._lock:  # the one that was used last
            self._placed = [*(each for each in self._placed if each is not adapter), adapter]
        adapter.users.append(user)
        return True

    def close(self) -> None:
        """Free the memory."""
        with self._lock:
            self._placed = []
        self._bank.close()

    def _write(self, adapter: Adapter) -> bool:
        """Write an adapter into a free slot, or that of one that nobody uses."""
        for slot, idle in self._candidates():
            if self._bank.growth_bytes(slot, adapter.matrices) > MEMORY_FRACTION * free_bytes(self._model.device):
                continue
            if idle is not None:
                with self._lock:
                    self._placed.remove(idle)
                idle.slot = 0
            self._bank.write(slot, adapter.matrices)
            adapter.slot = slot
            _require_rows_apart(self._model, adapter)
            return True
        if self._placed and any(each.is_at_work for each in self._placed):
            return False
        raise Unavailable(f"no memory for the adapter {adapter.key.folders[-1].name!r}")

    def _candidates(self) -> list[tuple[int, Adapter | None]]:
        """Return slots for one more adapter, the best first: a free one, else that of the least recently used."""
        taken = {each.slot for each in self._placed}
        free = [slot for slot in range(1, self._max_adapters + 1) if slot not in taken][:1]
        idle = [each for each in self._placed if not each.is_at_work]
        return [(slot, None) for slot in free] + [(each.slot, each) for each in idle]


def can_share(folders: Rows[Path]) -> bool:
    """Return whether the configurations of adapters leave nothing but two matrices a layer.

    Raises:
        NotFound, InvalidCheckpoint: one cannot be read.
    """
    for folder in folders:
        if not folder.is_dir():
            raise NotFound(f"model {folder.name!r} was deleted")
    return all(is_plain_lora(folder) for folder in folders)


def _matrices(model: nn.Module, folders: Rows[Path]) -> Matrices:
    """Read adapters; those of one layer, one upon the other, are one of the sum of their ranks."""
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for folder in folders:
        for name, pair in _read(model, folder).items():
            parts.setdefault(name, []).append(pair)
    return {
        name: (torch.cat([a_IR for a_IR, _ in pairs], dim=1), torch.cat([b_RO for _, b_RO in pairs]))
        for name, pairs in parts.items()
    }


def _read(model: nn.Module, folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    config = adapter_config(folder)
    try:
        weights = load_file(folder / WEIGHTS)
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, ZeroDivisionError) as exc:
        raise InvalidCheckpoint(f"adapter {folder.name!r} cannot be read: {exc!r}") from exc
    names = {name.removesuffix(_A) for name in weights if name.endswith(_A)}
    if not names or set(weights) != {name + end for name in names for end in (_A, _B)}:
        raise NotShareable("it holds more than two matrices a layer")
    found = {}
    for full_name in sorted(names):
        name = full_name.removeprefix(PREFIX)
        a_RI, b_OR = weights[full_name + _A], weights[full_name + _B]
        sizes = _sizes(model, name, folder)
        if a_RI.shape != (rank, sizes[0]) or b_OR.shape != (sizes[1], rank):
            raise InvalidCheckpoint(
                f"adapter {folder.name!r} does not fit its base model: {name} has {sizes[0]} inputs and {sizes[1]} "
                f"outputs, and its matrices {tuple(a_RI.shape)} and {tuple(b_OR.shape)} for r={rank}"
            )
        found[name] = (a_RI.float().T.contiguous(), b_OR.float().T.contiguous() * scale)
    return found


def _sizes(model: nn.Module, name: str, folder: Path) -> tuple[int, int]:
    """Return the inputs and outputs of a layer."""
    try:
        layer = model.get_submodule(name)
    except AttributeError as exc:
        raise InvalidCheckpoint(f"adapter {folder.name!r} does not fit its base model, which has no {name}") from exc
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if layer is head:
        raise NotShareable("it changes the output layer, whose weight may be that of the input, too")
    if isinstance(layer, Conv1D):
        return layer.weight.shape[0], layer.weight.shape[1]
    if type(layer) is not nn.Linear or ".experts." in name:  # an expert sees the tokens of some rows only
        raise NotShareable(f"{name} is {type(layer).__name__}, no layer that all tokens pass")
    return layer.in_features, layer.out_features


def _require_rows_apart(model: LoadedModel, adapter: Adapter) -> None:
    """Compare rows with and without an adapter, side by side and among their like.

    Raises:
        NotShareable: they differ, or layers that the adapter changes are not passed.
    """
    try:
        mixed, adapted, plain = (
            _logits_2V(model, adapter, slots) for slots in ([adapter.slot, 0], [adapter.slot] * 2, [0, 0])
        )
    except (AptJobsError, torch.OutOfMemoryError):
        raise
    except Exception as exc:  # a model's forward raises whatever comes to it
        raise NotShareable(f"rows of different adapters break the model: {exc!r}") from exc
    difference = max(relative_difference(mixed[0], adapted[0]), relative_difference(mixed[1], plain[1]))
    if difference > tolerance(model):
        raise NotShareable(f"an adapter of one row changes the logits of others by {difference:.3g}")


@torch.inference_mode()
def _logits_2V(model: LoadedModel, adapter: Adapter, slots: list[int]) -> Tensor:
    """Return the logits behind two short rows."""
    tokens_2Q = torch.tensor([[5, 3, 1], [2, 4, 6]], device=model.device) % model.vocabulary_size
    with adapting_rows(slots, model.device), reached_layers() as reached:
        logits_2V: Tensor = model.model(input_ids=tokens_2Q, use_cache=False).logits[:, -1].float()
    if slots[0] and (missed := set(adapter.matrices) - reached):
        raise NotShareable(f"the model does not pass {min(missed)} for every token")
    return logits_2V
