"""The models in memory: a few, the least recently used goes first. Owned by the engine's thread."""

import gc
import logging
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from apt_jobs.errors import Unavailable
from apt_jobs.generation.models import Fingerprint, LoadedModel, load_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelKey:
    """One version of a folder: a model that was replaced on disk is another model."""

    folder: Path
    fingerprint: Fingerprint


class WarmModels:
    """At most `capacity` models. Not thread-safe."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._capacity, self._device = capacity, device
        self._models: OrderedDict[ModelKey, LoadedModel] = OrderedDict()  # least recently used first

    def get(self, key: ModelKey, busy: Collection[ModelKey]) -> LoadedModel | None:
        """The model, loaded if need be. None: every place is taken by a `busy` model; ask again when one is free.

        Raises:
            NotFound, InvalidCheckpoint, Unavailable: as `load_model`.
        """
        if key in self._models:
            self._models.move_to_end(key)
            return self._models[key]
        if len(self._models) >= self._capacity and not self._evict(busy):
            return None
        try:
            model = load_model(key.folder, self._device)
        except Unavailable:
            if not self._evict(busy):
                raise
            return self.get(key, busy)  # with more room; ends when nothing is left to evict
        self._models[key] = model
        logger.info("model loaded", extra={"model": key.folder.name, "num_warm": len(self._models)})
        return model

    def __len__(self) -> int:
        return len(self._models)

    def clear(self) -> None:
        """Free the memory of all."""
        self._models.clear()
        self._free()

    def _evict(self, busy: Collection[ModelKey]) -> bool:
        for key in self._models:
            if key not in busy:
                del self._models[key]
                self._free()
                return True
        return False

    def _free(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
