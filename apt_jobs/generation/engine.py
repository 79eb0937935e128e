"""The engine: requests of texts in, texts out. It holds a few warm models, each at work in a thread of its own.

A model that is asked for is loaded beside the running ones; the least recently used one that has nothing to do leaves
for it. Requests whose model finds no place wait, and hold up nobody else.
"""

import logging
import threading
from collections import OrderedDict, deque
from dataclasses import dataclass
from pathlib import Path

import torch

from apt_jobs.errors import Unavailable
from apt_jobs.generation.adapter_bank import AdapterKey
from apt_jobs.generation.adapters import can_share
from apt_jobs.generation.model_engine import ModelEngine
from apt_jobs.generation.models import Fingerprint, LoadedModel, fingerprint, load_model
from apt_jobs.generation.probe import make_runner
from apt_jobs.generation.request import Generated, OnText, Request
from apt_jobs.generation.runner import Runner
from apt_jobs.jobs.spec import GenerateSpec

logger = logging.getLogger(__name__)

MAX_ROWS_CPU = 64  # generated together, per model
MAX_ROWS_GPU = 256
MAX_WAITING_ROWS = 4_096
MAX_REMEMBERED = 256


@dataclass(frozen=True, slots=True)
class ModelKey:
    """One version of a model's folders: a model that was replaced on disk is another model."""

    folder: Path
    fingerprint: Fingerprint
    adapters: tuple[Path, ...] = ()


class Engine:
    """Thread-safe.

    Args:
        warm_models: at most so many are in memory.
        device: "auto", "cpu" or "cuda".
        max_rows: texts of a model that are generated together; none: as many as suit the device.
        compile_graphs: on a GPU, compile what runs often.
        num_threads: of a CPU's computations; none: as they are set.
        warm_adapters: of one model at most so many are in memory beside it.
        memory_fraction: of a GPU's memory, which others may share.
    """

    def __init__(
        self,
        warm_models: int = 2,
        device: str = "auto",
        *,
        max_rows: int | None = None,
        compile_graphs: bool = True,
        num_threads: int | None = None,
        warm_adapters: int = 8,
        memory_fraction: float = 1.0,
    ) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and memory_fraction < 1:
            torch.cuda.set_per_process_memory_fraction(memory_fraction)
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self._device = torch.device(device)
        self._max_rows = max_rows or (MAX_ROWS_GPU if device == "cuda" else MAX_ROWS_CPU)
        self._capacity, self._compile_graphs = warm_models, compile_graphs
        self._max_adapters = warm_adapters
        self._merged: deque[AdapterKey] = deque(maxlen=MAX_REMEMBERED)  # adapters that need a model of their own
        self._lock = threading.RLock()
        self._warm: OrderedDict[ModelKey, ModelEngine] = OrderedDict()  # least recently used first
        self._waiting: deque[tuple[ModelKey, Request]] = deque()  # for a place for their model
        self._closing = False

    def generate(self, model_dir: Path, spec: GenerateSpec) -> Generated:
        """Submit and wait; raises what the request's future raises."""
        return self.submit(model_dir, spec).future.result()

    def submit(
        self,
        model_dir: Path,
        spec: GenerateSpec,
        on_text: OnText | None = None,
        *,
        adapters: tuple[Path, ...] = (),
    ) -> Request:
        """Queue a request. Its future gives `Generated`, or raises an `AptJobsError`: what a model or a text lacks.

        Args:
            model_dir: the model's folder.
            spec: texts and how to continue them.
            on_text: receives what is added to an output, in the engine's thread: be quick.
            adapters: folders of adapters to add to the model, in their order; those of several requests share it.

        Raises:
            NotFound: a folder is gone.
            InvalidCheckpoint: the configuration of an adapter cannot be read.
            Unavailable: too much waits already, or the engine is closed.
        """
        request = Request(spec, on_text=on_text)
        key = ModelKey(model_dir, fingerprint(model_dir))
        if adapters:
            adapter_key = AdapterKey(adapters, _fingerprint_of(adapters))
            if can_share(adapters) and adapter_key not in self._merged:
                request.adapter_key = adapter_key
            else:
                key = _merged_key(key, adapter_key)
        with self._lock:
            if self._closing:
                raise Unavailable("the generation engine is shutting down")
            waiting = sum(other.spec.num_sequences for _, other in self._waiting)
            waiting += sum(engine.num_waiting for engine in self._warm.values())
            if waiting + spec.num_sequences > MAX_WAITING_ROWS:
                raise Unavailable(f"{waiting} texts wait for generation; at most {MAX_WAITING_ROWS}: try again later")
            self._waiting.append((key, request))
            self._place_waiting()
        return request

    def model(self, model_dir: Path) -> ModelEngine:
        """Return a model at work, for callers that have tokens: `submit`, `abort`.

        Raises:
            NotFound: the folder is gone.
            Unavailable: all places are taken by models at work.
        """
        with self._lock:
            engine = self._place_for(ModelKey(model_dir, fingerprint(model_dir)))
        if engine is None:
            raise Unavailable("all places for models are taken by models at work: try again later")
        return engine

    @property
    def warm_folders(self) -> list[Path]:
        """The folders of the models that are loaded; of one with adapters that of the last adapter."""
        with self._lock:
            warm = [(key, engine) for key, engine in self._warm.items() if engine.model is not None]
        folders = [[key.folder, *key.adapters][-1] for key, _ in warm]
        return folders + [folder for _, engine in warm for folder in engine.adapter_folders]

    def close(self) -> None:
        """Fail what is not done and free the models."""
        error = Unavailable("the generation engine was shut down")
        with self._lock:
            self._closing = True
            engines, waiting = list(self._warm.values()), list(self._waiting)
            self._waiting.clear()
        for _, request in waiting:
            request.fail(error)
        for engine in engines:
            engine.close(error)
        for engine in engines:
            engine.join()
        self._warm.clear()

    def _place_waiting(self) -> None:
        """Hand requests to their models, the oldest first."""
        left: deque[tuple[ModelKey, Request]] = deque()
        for key, request in self._waiting:
            if request.is_over:
                continue
            engine = self._place_for(key)
            if engine is None:
                left.append((key, request))
            else:
                engine.add(request)
        self._waiting = left

    def _place_for(self, key: ModelKey) -> ModelEngine | None:
        """Return the model's engine, started if need be. None: all places are taken by models at work."""
        engine = self._warm.get(key)
        if engine is not None and engine.error is None:
            self._warm.move_to_end(key)
            return engine
        self._warm.pop(key, None)
        if len(self._warm) >= self._capacity and self._evict() is None:
            return None
        engine = ModelEngine(
            key.folder.name,
            lambda: self._load(key),
            self._on_idle,
            max_adapters=self._max_adapters,
            on_not_shareable=lambda request: self._serve_merged(key, request),
        )
        self._warm[key] = engine
        return engine

    def _serve_merged(self, key: ModelKey, request: Request) -> None:
        """Have an adapter that cannot share its model merged into a copy of it. Called in the model's threads."""
        adapter_key, request.adapter_key, request.adapter = request.adapter_key, None, None
        assert adapter_key is not None
        with self._lock:
            self._merged.append(adapter_key)
            if not self._closing:
                self._waiting.append((_merged_key(key, adapter_key), request))
                self._place_waiting()
                return
        request.fail(Unavailable("the generation engine was shut down"))

    def _load(self, key: ModelKey) -> tuple[LoadedModel, Runner]:
        while True:
            try:
                model = load_model(key.folder, self._device, key.adapters)
                runner = make_runner(model, max_rows=self._max_rows, compile_graphs=self._compile_graphs)
            except Unavailable:
                with self._lock:
                    evicted = self._evict()
                if evicted is None:
                    raise
                evicted.join()  # without the lock, which its thread needs to end
                continue
            except torch.OutOfMemoryError as exc:
                raise Unavailable(f"no memory for model {key.folder.name!r}: {exc}") from exc
            logger.info("model loaded", extra={"model": key.folder.name, "runner": type(runner).__name__})
            return model, runner

    def _evict(self) -> ModelEngine | None:
        """Let the least recently used model leave that has nothing to do; its memory is free once it is joined."""
        for key, engine in self._warm.items():
            if engine.model is not None and engine.is_idle:
                del self._warm[key]
                engine.close()
                return engine
        return None

    def _on_idle(self, engine: ModelEngine) -> None:
        """Give a model's place to another one when it has nothing to do or is gone. It runs in the model's thread."""
        with self._lock:
            if engine.error is not None:
                for key in [key for key, other in self._warm.items() if other is engine]:
                    del self._warm[key]
            if self._waiting and not self._closing:
                self._place_waiting()


def _fingerprint_of(folders: tuple[Path, ...]) -> Fingerprint:
    return tuple(entry for folder in folders for entry in fingerprint(folder))


def _merged_key(key: ModelKey, adapters: AdapterKey) -> ModelKey:
    """Return the key of a copy of a model with adapters merged into it."""
    return ModelKey(key.folder, key.fingerprint + adapters.fingerprint, adapters.folders)
