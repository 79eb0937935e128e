"""One model at work: a thread that loads it and runs its scheduler. The seam behind which engines can be exchanged.

`submit(prompt_ids, params)` gives a handle with deltas, `abort(id)` ends one. Each warm model has its own thread, so a
model that is loaded, or broken, holds up no other.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Rows
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from apt_jobs.errors import AptJobsError, InvalidCheckpoint, InvalidInput, Unavailable
from apt_jobs.generation.adapters import Adapters, NotShareable
from apt_jobs.generation.embeddings import Embedder
from apt_jobs.generation.models import LoadedModel
from apt_jobs.generation.request import Request
from apt_jobs.generation.runner import Runner
from apt_jobs.generation.scheduler import Scheduler
from apt_jobs.generation.sequences import Delta, Handle, Priority, SamplingParams, Sequence

logger = logging.getLogger(__name__)

_CPU_PREFILL = (2_048, 256)  # tokens read in a step: when nothing is decoded, and beside decoded rows
_GPU_PREFILL = (16_384, 2_048)


class ModelEngine:
    """All public methods are thread-safe.

    Args:
        name: of the model, for errors.
        load: reads the model and makes its runner; called in the thread.
        on_idle: called in the thread when nothing is left to do.
        max_adapters: at most so many are in memory beside the model.
        on_not_shareable: receives requests whose adapter needs a model of its own; called in any thread.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[], tuple[LoadedModel, Runner]],
        on_idle: Callable[["ModelEngine"], None] = lambda _: None,
        *,
        max_adapters: int = 1,
        on_not_shareable: Callable[[Request], None] = lambda _: None,
    ) -> None:
        self._name, self._load, self._on_idle = name, load, on_idle
        self.model: LoadedModel | None = None  # none: not loaded yet
        self.error: AptJobsError | None = None  # why it cannot be loaded
        self._changed = threading.Condition()
        self._requests: list[Request] = []  # not opened yet
        self._submitted: list[tuple[Handle, list[int], SamplingParams, Priority]] = []
        self._sequences: dict[int, Sequence] = {}
        self._aborted: list[Request | int] = []
        self._max_adapters, self._on_not_shareable = max_adapters, on_not_shareable
        self._adapters: Adapters | None = None
        self._waiting_for_adapter: deque[Request] = deque()  # for a slot of one
        self._beside = ThreadPoolExecutor(1, thread_name_prefix=f"beside {name}")  # its thread starts when needed
        self._num_beside = 0  # requests whose grammar or adapter is prepared there
        self._scheduler: Scheduler | None = None
        self._embedder: Embedder | None = None
        self._closing = False
        self._ended: AptJobsError | None = None  # why nobody serves what is queued from now on
        self._thread = threading.Thread(target=self._run, name=f"generation {name}", daemon=True)
        self._thread.start()

    def submit(
        self, prompt_ids: Rows[int], params: SamplingParams, priority: Priority = Priority.INTERACTIVE
    ) -> Handle:
        """Queue a sequence; its handle yields what it becomes."""
        handle = Handle()
        with self._changed:
            if self._ended is None:
                self._submitted.append((handle, list(prompt_ids), params, priority))
                self._changed.notify()
                return handle
        handle.fail(self._ended)
        return handle

    def abort(self, handle_id: int) -> None:
        """End a sequence before its next token; its handle raises `Aborted`."""
        with self._changed:
            self._aborted.append(handle_id)
            self._changed.notify()

    def add(self, request: Request) -> None:
        """Queue a request of texts."""
        request.on_stop = lambda: self._abort_request(request)
        with self._changed:
            if self._ended is None:
                self._requests.append(request)
                self._changed.notify()
                return
        request.fail(self._ended)

    @property
    def is_idle(self) -> bool:
        """Say whether nothing is asked of it."""
        with self._changed:
            return self._is_idle()

    @property
    def num_waiting(self) -> int:
        """Return the texts that have no slot yet."""
        with self._changed:
            queued = (*self._requests, *self._waiting_for_adapter)
            unopened = sum(request.spec.num_sequences for request in queued) + len(self._submitted)
            return unopened + (0 if self._scheduler is None else self._scheduler.num_waiting)

    @property
    def adapter_folders(self) -> list[Path]:
        """Return the folders of adapters in memory; of several upon each other that of the last."""
        adapters = self._adapters
        return [] if adapters is None else adapters.folders

    def close(self, error: AptJobsError | None = None) -> None:
        """Fail what is not done, free the model. Does not wait: see `join`."""
        with self._changed:
            self.error = self.error or error or Unavailable("the generation engine was shut down")
            self._closing = True
            self._changed.notify()

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self.model, runner = self._load()
        except AptJobsError as exc:
            self.close(exc)
        except Exception as exc:
            logger.exception("a model could not be loaded", extra={"model": self._name})
            self.close(InvalidCheckpoint(f"model {self._name!r} cannot be used: {exc!r}"))
        else:
            gpu = self.model.device.type == "cuda"
            beside = _GPU_PREFILL if gpu else _CPU_PREFILL
            scheduler = Scheduler(runner, self._name, prefill_tokens=beside[0], prefill_tokens_beside=beside[1])
            self._scheduler, self._embedder = scheduler, Embedder(self.model)
            self._adapters = Adapters(self.model, self._max_adapters)
            self._serve(scheduler, self._embedder)
            runner.close()
            self._adapters.close()
        self._end()

    def _serve(self, scheduler: Scheduler, embedder: Embedder) -> None:
        while True:
            with self._changed:
                idle = self._is_idle()
            if idle:
                self._on_idle(self)
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._has_work())
                if self._closing:
                    return
                requests, self._requests = self._requests, []
                submitted, self._submitted = self._submitted, []
                aborted, self._aborted = self._aborted, []
            self._open_waiting(scheduler, embedder)
            for request in requests:
                self._open(scheduler, embedder, request)
            for each in submitted:
                self._accept(scheduler, *each)
            for one in aborted:
                self._abort(scheduler, one)
            if embedder.has_work:
                embedder.step()
            scheduler.step()

    def _open_waiting(self, scheduler: Scheduler, embedder: Embedder) -> None:
        """Try again those that wait for a slot of an adapter, the oldest first."""
        while self._waiting_for_adapter:
            request = self._waiting_for_adapter[0]
            placed = None if request.is_over else self._place_adapter(request)
            if placed is False:
                return
            self._waiting_for_adapter.popleft()
            if placed:
                self._start(scheduler, embedder, request)

    def _open(self, scheduler: Scheduler, embedder: Embedder, request: Request) -> None:
        assert self.model is not None
        if request.is_over:
            return
        if request.adapter_key is not None:
            assert self._adapters is not None
            request.adapter = self._adapters.find(request.adapter_key) or request.adapter
            if request.adapter is None:
                self._prepare_beside(request, partial(self._read_adapter, request))
                return
        if request.needs_grammar:
            model = self.model if request.adapter is None else request.adapter.model
            self._prepare_beside(request, partial(request.compile, model))
            return
        placed: bool | None = True
        if request.adapter is not None:
            placed = False if self._waiting_for_adapter else self._place_adapter(request)
        if placed is False:
            self._waiting_for_adapter.append(request)
        elif placed:
            self._start(scheduler, embedder, request)

    def _start(self, scheduler: Scheduler, embedder: Embedder, request: Request) -> None:
        """Hand a request that is prepared to those that compute it."""
        assert self.model is not None
        model = self.model if request.adapter is None else request.adapter.model
        if request.spec.embed is not None:
            self._prepares(request, partial(embedder.add, request))
        elif self._prepares(request, partial(request.open, model)):
            for text in request.texts:
                scheduler.submit(text.sequence)

    def _prepare_beside(self, request: Request, prepare: Callable[[], object]) -> None:
        """Prepare a request beside the running texts, then queue it again."""

        def run() -> None:
            again = [request] if not request.is_over and self._prepares(request, prepare) else []
            with self._changed:
                self._num_beside -= 1
                ended = self._ended
                if ended is None:
                    self._requests += again
                self._changed.notify()
            if ended is not None:
                request.fail(ended)

        with self._changed:
            self._num_beside += 1
        self._beside.submit(run)

    def _read_adapter(self, request: Request) -> None:
        assert self._adapters is not None
        assert request.adapter_key is not None
        request.adapter = self._adapters.read(request.adapter_key)

    def _place_adapter(self, request: Request) -> bool | None:
        """Say whether a request has its adapter in a slot; none: it cannot have it, and is not ours any more."""
        adapters, read = self._adapters, request.adapter
        assert adapters is not None
        assert read is not None
        request.adapter = adapter = adapters.find(read.key) or read
        placed: list[bool] = []
        return placed[0] if self._prepares(request, lambda: placed.append(adapters.place(adapter, request))) else None

    def _prepares(self, request: Request, prepare: Callable[[], object]) -> bool:
        try:
            prepare()
        except NotShareable as exc:
            logger.info("an adapter needs a model of its own: %s", exc, extra={"model": self._name})
            self._on_not_shareable(request)
        except AptJobsError as exc:
            request.fail(exc)
        except Exception as exc:
            logger.exception("a request could not be prepared", extra={"model": self._name})
            request.fail(InvalidCheckpoint(f"model {self._name!r} cannot be used: {exc!r}"))
        else:
            return True
        return False

    def _accept(
        self, scheduler: Scheduler, handle: Handle, prompt_ids: list[int], params: SamplingParams, priority: Priority
    ) -> None:
        assert self.model is not None
        if not 0 < len(prompt_ids) < self.model.context_tokens:
            most = self.model.context_tokens - 1
            handle.fail(InvalidInput(f"a prompt for this model has 1 to {most} tokens, not {len(prompt_ids)}"))
            return

        def receive(delta: Delta) -> None:
            if delta.is_last:
                self._sequences.pop(handle.id, None)
            handle.push(delta)

        sequence = Sequence(
            prompt_ids, params, self.model.context_tokens, receive, priority, group=handle, id=handle.id
        )
        self._sequences[sequence.id] = sequence
        scheduler.submit(sequence)

    def _abort_request(self, request: Request) -> None:
        with self._changed:
            self._aborted.append(request)
            self._changed.notify()

    def _abort(self, scheduler: Scheduler, what: Request | int) -> None:
        if isinstance(what, Request):
            for text in what.texts:
                scheduler.abort(text.sequence)
        elif (sequence := self._sequences.get(what)) is not None:
            scheduler.abort(sequence)

    def _is_idle(self) -> bool:
        return not (self._has_work() or self._num_beside)

    def _has_work(self) -> bool:
        running = self._scheduler is not None and self._scheduler.has_work
        embeds = self._embedder is not None and self._embedder.has_work
        return bool(
            self._requests or self._submitted or self._aborted or self._waiting_for_adapter or running or embeds
        )

    def _end(self) -> None:
        """Answer everybody."""
        with self._changed:
            requests, submitted = self._requests, self._submitted
            self._requests, self._submitted = [], []
            error = self.error
            assert error is not None
            self._ended = error
        self._beside.shutdown(wait=False, cancel_futures=False)
        if self._scheduler is not None:
            self._scheduler.fail_all(error)
        if self._embedder is not None:
            self._embedder.fail_all(error)
        for request in (*requests, *self._waiting_for_adapter):
            request.fail(error)
        self._waiting_for_adapter.clear()
        for handle, *_ in submitted:
            handle.fail(error)
        self.model = self._scheduler = self._embedder = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._on_idle(self)
