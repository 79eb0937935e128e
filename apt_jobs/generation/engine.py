"""The engine: one thread owns the models and generates for all concurrent requests at once.

A round: drop what was stopped, admit what waits, then one token for every row of every model. Rows join and leave
between tokens, so a short text never waits for a long one, and what a row becomes does not depend on its neighbours.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor

from apt_jobs.errors import AptJobsError, InvalidCheckpoint, Unavailable
from apt_jobs.generation.models import LoadedModel, fingerprint
from apt_jobs.generation.reference_batch import Batch
from apt_jobs.generation.request import Generated, Request, Row
from apt_jobs.generation.sampling import choose_tokens, draw
from apt_jobs.generation.warm_models import ModelKey, WarmModels
from apt_jobs.jobs.spec import GenerateSpec

logger = logging.getLogger(__name__)

MAX_ROWS = 64  # generated together, per model
MAX_WAITING_ROWS = 4_096
ADMISSION_WINDOW_S = 0.010  # an idle engine waits so long for company of the first request
MAX_PREFILL_TOKENS = 16_384  # read in one go, padding included; bounds how long running rows pause
CACHE_MEMORY_FRACTION = 0.5  # of what is free when a model's first row comes


class _Running:
    """The rows of one model."""

    def __init__(self, model: LoadedModel, max_rows: int) -> None:
        self.model = model
        self.batch = Batch(model)
        self.rows: list[Row] = []  # as in `batch`
        self.joining: deque[Row] = deque()  # admitted, their windows not read yet
        self._max_rows = max_rows if model.joinable else 1
        self._max_tokens = _tokens_that_fit(model)

    @property
    def num_rows(self) -> int:
        return len(self.rows) + len(self.joining)

    def has_room_for(self, row: Row) -> bool:
        """Whether the cache stays in memory even if all rows grow to their ends. One row is always admitted."""
        widths = [_final_width(each) for each in (row, *self.rows, *self.joining)]
        fits = max(widths) * len(widths) <= self._max_tokens and len(widths) <= self._max_rows
        return fits or len(widths) == 1

    def drop_ended(self) -> None:
        """Forget rows that are done, failed or stopped."""
        self.joining = deque(row for row in self.joining if not row.request.is_over())
        places = [place for place, row in enumerate(self.rows) if not row.ended and not row.request.is_over()]
        self.batch.keep(places)
        self.rows = [self.rows[place] for place in places]

    def read_joining(self) -> None:
        """Read the windows of rows that join, as many as may be read in one go, and give each its next token."""
        if not self.joining or (self.rows and not self.model.joinable):
            return
        rows = [self.joining.popleft()]
        while self.joining and self.model.joinable:
            width = max(len(row.window) for row in (*rows, self.joining[0]))
            if width * (len(rows) + 1) > MAX_PREFILL_TOKENS:
                break
            rows.append(self.joining.popleft())
        self.rows += rows
        self._take(rows, self.batch.join([row.window for row in rows]))

    def advance(self) -> None:
        """One token for each row. A row whose context is full has its window shortened and joins again."""
        full = [row for row in self.rows if row.make_room()]
        if full:
            self.joining.extend(full)
            places = [place for place, row in enumerate(self.rows) if row not in full]
            self.batch.keep(places)
            self.rows = [self.rows[place] for place in places]
        if self.rows:
            self._take(self.rows, self.batch.advance([row.window[-1] for row in self.rows]))

    def fail(self, error: AptJobsError) -> None:
        """Answer all requests with the error."""
        for row in (*self.rows, *self.joining):
            row.request.fail(error)

    def _take(self, rows: Sequence[Row], logits_BV: Tensor) -> None:
        tokens, finite = _choose(rows, logits_BV)
        for row, token, good in zip(rows, tokens, finite, strict=True):
            if not good:
                name = self.model.folder.name
                row.request.fail(
                    InvalidCheckpoint(f"model {name!r} gives NaN or infinity: its training diverged; choose another")
                )
                continue
            row.take(token, self.model.end_tokens)
            row.request.answer_if_done()


class Engine:
    """Thread-safe front of the thread. `device`: "auto", "cpu" or "cuda"."""

    def __init__(self, warm_models: int = 2, device: str = "auto", *, max_rows: int = MAX_ROWS) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._max_rows = max_rows
        self._warm = WarmModels(warm_models, torch.device(device))
        self._running: dict[ModelKey, _Running] = {}
        self._waiting: deque[Request] = deque()  # oldest first; guarded by `_changed`
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="generation engine", daemon=True)
        self._thread.start()

    def generate(self, model_dir: Path, spec: GenerateSpec) -> Generated:
        """Submit and wait; raises what the request's future raises."""
        return self.submit(model_dir, spec).future.result()

    def submit(self, model_dir: Path, spec: GenerateSpec) -> Request:
        """Queue a request. Its future gives `Generated`, or raises NotFound, InvalidCheckpoint, Unavailable or Stopped.

        Raises:
            NotFound: the folder is gone.
            Unavailable: too much waits already, or the engine is closed.
        """
        request = Request(ModelKey(model_dir, fingerprint(model_dir)), spec)
        with self._changed:
            if self._closing:
                raise Unavailable("the generation engine is shutting down")
            waiting = sum(len(other.spec.texts) - other.num_admitted for other in self._waiting)
            if waiting + len(spec.texts) > MAX_WAITING_ROWS:
                raise Unavailable(f"{waiting} texts wait for generation; at most {MAX_WAITING_ROWS}: try again later")
            self._waiting.append(request)
            self._changed.notify()
        return request

    def close(self) -> None:
        """Fail what is not done and free the models."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while self._wait_for_work():
            self._admit()
            for key, running in list(self._running.items()):
                self._guarded(running, running.drop_ended)
                self._guarded(running, running.read_joining)
                self._guarded(running, running.drop_ended)
                self._guarded(running, running.advance)
                self._guarded(running, running.drop_ended)
                if running.num_rows == 0:
                    del self._running[key]
        error = Unavailable("the generation engine was shut down")
        for running in self._running.values():
            running.fail(error)
        for request in self._waiting:
            request.fail(error)
        self._running.clear()
        self._warm.clear()

    def _wait_for_work(self) -> bool:
        """Block while there is nothing to do. False: the engine is closed."""
        with self._changed:
            if not self._running and not self._closing:
                if not self._waiting:
                    self._changed.wait_for(lambda: self._waiting or self._closing)
                until = time.monotonic() + ADMISSION_WINDOW_S
                while (left := until - time.monotonic()) > 0 and not self._closing:
                    self._changed.wait(left)
            return not self._closing

    def _admit(self) -> None:
        """Let rows in, oldest request first. A model that finds no free place holds back all younger requests, so that
        one will be free; a full batch holds back its own model's only."""
        with self._changed:
            requests = list(self._waiting)
        full: set[ModelKey] = set()
        for request in requests:
            if request.is_over() or request.key in full:
                continue
            running = self._place_for(request)
            if running is None:
                if request.is_over():
                    continue
                break
            while request.num_admitted < len(request.rows):
                row = request.rows[request.num_admitted]
                if not running.has_room_for(row):
                    full.add(request.key)
                    break
                running.joining.append(row)
                request.num_admitted += 1
        with self._changed:
            self._waiting = deque(
                request
                for request in self._waiting
                if not request.is_over() and (not request.rows or request.num_admitted < len(request.rows))
            )

    def _place_for(self, request: Request) -> _Running | None:
        """The running batch of the request's model, with its rows made. None: no place, or the request failed."""
        try:
            running = self._running.get(request.key)
            if running is None:
                model = self._warm.get(request.key, self._running.keys())
                if model is None:
                    return None
                running = _Running(model, self._max_rows)
            if not request.rows:
                request.open(running.model)
        except AptJobsError as exc:
            request.fail(exc)
            return None
        except Exception as exc:
            logger.exception("a request could not be prepared", extra={"model": request.key.folder.name})
            request.fail(InvalidCheckpoint(f"model {request.key.folder.name!r} cannot be used: {exc!r}"))
            return None
        self._running[request.key] = running
        return running

    def _guarded(self, running: _Running, act: Callable[[], None]) -> None:
        """The edge of the thread: whatever breaks in a model ends its requests, never the engine."""
        try:
            act()
        except torch.OutOfMemoryError as exc:
            self._fail(running, Unavailable(f"the GPU ran out of memory while {running.num_rows} texts grew: {exc}"))
        except Exception as exc:
            logger.exception("a model broke", extra={"model": running.model.folder.name})
            self._fail(running, InvalidCheckpoint(f"model {running.model.folder.name!r} broke: {exc!r}"))

    def _fail(self, running: _Running, error: AptJobsError) -> None:
        running.fail(error)
        running.rows, running.joining, running.batch = [], deque(), Batch(running.model)


def _choose(rows: Sequence[Row], logits_BV: Tensor) -> tuple[list[int], list[bool]]:
    """The next token of each row, and whether its logits were numbers."""
    device = logits_BV.device
    logits_BV = logits_BV.float()
    finite_B = logits_BV.max(dim=-1).values.isfinite() & ~logits_BV.isnan().any(dim=-1)  # -inf is a ban, not a fault
    logits_BV = logits_BV.masked_fill(~finite_B[:, None], 0.0)
    options = [(row.request.spec.temperature, row.request.spec.top_p) for row in rows]
    draws = [0.0 if row.generator is None else draw(row.generator) for row in rows]
    chosen_B = choose_tokens(
        logits_BV,
        torch.tensor([temperature for temperature, _ in options], device=device, dtype=torch.float64),
        torch.tensor([top_p for _, top_p in options], device=device, dtype=torch.float64),
        torch.tensor(draws, device=device, dtype=torch.float64),
    )
    both = torch.stack([chosen_B, finite_B.long()]).tolist()  # one wait for the device
    return both[0], [bool(good) for good in both[1]]


def _final_width(row: Row) -> int:
    remaining = row.request.spec.max_length - row.num_new
    return min(row.context_tokens, len(row.window) + remaining)


def _tokens_that_fit(model: LoadedModel) -> int:
    """Tokens of key/value cache that there is memory for."""
    config = model.model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bytes_per_token: int = 2 * config.num_hidden_layers * heads * head_size * model.model.dtype.itemsize
    if model.device.type == "cuda":
        free_bytes = torch.cuda.mem_get_info(model.device)[0]
    else:
        free_bytes = psutil.virtual_memory().available
    return max(1, int(free_bytes * CACHE_MEMORY_FRACTION / bytes_per_token))
