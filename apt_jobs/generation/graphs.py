"""CUDA graphs of a decode step, one for each number of rows, width of the cache and way of sampling.

A new size is captured at once and runs; behind it a thread has the same step compiled (half a minute), and the graph is
captured again with the compiled kernels as soon as they are there. What cannot be captured or compiled runs without.
"""

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from apt_jobs.generation.cache import SlotCache
from apt_jobs.generation.memory import free_bytes
from apt_jobs.generation.row_state import RowState, Sampling

logger = logging.getLogger(__name__)

RUNS_BEFORE_COMPILING = 8  # sizes that are passed through on the way to others are not worth half a minute
MAX_COMPILED_SIZES = 64
TUNED_ROWS = 1  # with so few rows a product with a weight is a reduction, which the compiler fuses with its neighbours

SMALLEST_PREFILL, LARGEST_PREFILL = 64, 512  # tokens

Step = Callable[[Cache, RowState, Sampling], None]


@dataclass(frozen=True, slots=True)
class GraphKey:
    """What is fixed in a graph."""

    num_rows: int
    num_columns: int
    sampling: Sampling


@dataclass(slots=True)
class _Entry:
    graph: torch.cuda.CUDAGraph | None = None  # none: the step cannot be captured
    num_runs: int = 0
    compiled: bool = False


class GraphPool:
    """Graphs that share their memory. All calls but those of its own compiler come from one thread."""

    def __init__(self, step: Step, *, compile_graphs: bool) -> None:
        self._step = step
        self._entries: dict[GraphKey, _Entry] = {}
        self._memory: Any = None  # torch's handle of a memory pool
        self._compiler = _Compiler(step) if compile_graphs else None

    def run(self, cache: SlotCache, state: RowState, key: GraphKey) -> None:
        """Run a step over the first rows of the cache."""
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(self._captured(self._step, cache, state, key))
        entry.num_runs += 1
        may_compile = entry.graph is not None and not entry.compiled and not key.sampling.adapters
        if self._compiler is not None and may_compile:
            self._compile(entry, cache, state, key)
        if entry.graph is not None:
            entry.graph.replay()
        else:
            rows = state.first(key.num_rows)
            self._step(cache.rows(0, key.num_rows, key.num_columns, rows.position_B), rows, key.sampling)

    @property
    def num_compiled(self) -> int:
        return sum(entry.compiled for entry in self._entries.values())

    @property
    def is_compiling(self) -> bool:
        return self._compiler is not None and self._compiler.is_busy

    def clear(self) -> None:
        """Forget the graphs: the cache has moved."""
        self._entries.clear()
        self._memory = None

    def close(self) -> None:
        """Forget the graphs and stop compiling."""
        if self._compiler is not None:
            self._compiler.close()
        self.clear()

    def _compile(self, entry: _Entry, cache: SlotCache, state: RowState, key: GraphKey) -> None:
        """Ask for the compiled step in time, and swap it in when it is there."""
        assert self._compiler is not None
        if entry.num_runs == RUNS_BEFORE_COMPILING:
            self._compiler.ask(key, cache, state)
        with self._compiler.compiled(key) as step:
            if step is None:
                return
            entry.compiled = True  # tried, whatever comes of it
            graph = self._captured(step, cache, state, key, warm_up=False)
        if graph is not None:
            entry.graph = graph
            logger.info("a compiled step runs", extra={"rows": key.num_rows, "columns": key.num_columns})

    def _captured(
        self, step: Step, cache: SlotCache, state: RowState, key: GraphKey, *, warm_up: bool = True
    ) -> torch.cuda.CUDAGraph | None:
        rows = state.first(key.num_rows)
        try:
            if warm_up:
                _warm_up(step, cache, rows, key)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
                step(cache.rows(0, key.num_rows, key.num_columns, rows.position_B), rows, key.sampling)
        except torch.OutOfMemoryError:
            raise
        except Exception as exc:  # whatever a model does in its forward that a graph cannot hold
            logger.warning("a step cannot be captured", extra={"rows": key.num_rows, "why": repr(exc)})
            return None
        self._memory = graph.pool()
        return graph


class PrefillGraphs:
    """Graphs that read a whole short prompt, one for each power of two of tokens, into a slot of their own.

    Without one the first token of a single text waits for a thousand launches of small kernels.
    """

    def __init__(self, read: Callable[[Tensor, Cache, Tensor], Tensor], staging: Callable[[], SlotCache]) -> None:
        self._read, self._staging = read, staging
        self._entries: dict[int, _Prefill | None] = {}  # none: it cannot be captured

    def run(self, tokens: list[int]) -> tuple[Tensor, SlotCache] | None:
        """Return the logits (1, V) behind the tokens and the cache whose first slot holds them; none: read eagerly."""
        size = SMALLEST_PREFILL
        while size < len(tokens):
            size *= 2
        if size > LARGEST_PREFILL:
            return None
        if size not in self._entries:
            self._entries[size] = self._captured(size)
        entry = self._entries[size]
        if entry is None:
            return None
        host = torch.tensor([*tokens, *[0] * (size - len(tokens)), len(tokens) - 1]).pin_memory()
        entry.input.copy_(host, non_blocking=True)
        entry.graph.replay()
        return entry.logits_1V, entry.cache

    def clear(self) -> None:
        """Forget the graphs."""
        self._entries.clear()

    def _captured(self, size: int) -> "_Prefill | None":
        cache = self._staging()
        cache.reserve(1, size)
        data = torch.zeros(size + 1, dtype=torch.long, device=cache.device)  # the tokens and the last one's place
        start_1 = torch.zeros(1, dtype=torch.long, device=cache.device)

        def read() -> Tensor:
            return self._read(data[None, :size], cache.rows(0, 1, size, start_1), data[size:])

        try:
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # the library's
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                read()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                logits_1V = read()
        except torch.OutOfMemoryError:
            raise
        except Exception as exc:  # as above
            logger.warning("a prefill cannot be captured", extra={"tokens": size, "why": repr(exc)})
            return None
        return _Prefill(graph, data, logits_1V, cache, start_1)


@dataclass(slots=True)
class _Prefill:
    graph: torch.cuda.CUDAGraph
    input: Tensor
    logits_1V: Tensor
    cache: SlotCache
    start_1: Tensor  # kept, since the graph reads it


def _warm_up(step: Step, cache: SlotCache, rows: RowState, key: GraphKey) -> None:
    """Run once on a copy of the state: what it writes to the cache is what the step itself will write there."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # the library's
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        copy = rows.clone()
        step(cache.rows(0, key.num_rows, key.num_columns, copy.position_B), copy, key.sampling)
    torch.cuda.current_stream().wait_stream(stream)


class _Asked:
    """A step that is being compiled: what to run it on."""

    def __init__(self, key: GraphKey, cache: SlotCache, state: RowState) -> None:
        self.key, self.cache = key, cache
        self.state = state.first(key.num_rows).clone()


class _Compiled:
    """The compiled step of a key for as long as the compiler stands still, or none."""

    def __init__(self, step: Step | None, lock: threading.Lock) -> None:
        self._step, self._lock = step, lock

    def __enter__(self) -> Step | None:
        if self._step is None or not self._lock.acquire(blocking=False):
            self._step = None
            return None
        self._stance = torch.compiler.set_stance("fail_on_recompile")  # a pause of half a minute would be worse
        self._stance.__enter__()
        return self._step

    def __exit__(self, *exc: object) -> None:
        if self._step is not None:
            self._stance.__exit__(*exc)
            self._lock.release()


class _Compiler:
    """Compiles steps in a thread, one after another, on rows that are nobody's."""

    def __init__(self, step: Step) -> None:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_COMPILED_SIZES)
        torch._dynamo.config.accumulated_recompile_limit = max(
            torch._dynamo.config.accumulated_recompile_limit, 4 * MAX_COMPILED_SIZES
        )
        self._plain: Step = torch.compile(step, dynamic=False)
        self._tuned: Step = torch.compile(step, dynamic=False, options={"coordinate_descent_tuning": True})
        self._done: set[GraphKey] = set()
        self._asked: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        self._busy = threading.Lock()
        self._num_asked = self._num_ended = 0
        self._thread = threading.Thread(target=self._run, name="step compiler", daemon=True)
        self._thread.start()

    def ask(self, key: GraphKey, cache: SlotCache, state: RowState) -> None:
        """Have a step compiled."""
        if key not in self._done and len(self._done) < MAX_COMPILED_SIZES:
            self._num_asked += 1
            self._asked.put(_Asked(key, cache, state))

    def compiled(self, key: GraphKey) -> _Compiled:
        """Return the step once it is compiled, and while nothing else is."""
        return _Compiled(self._step_of(key) if key in self._done else None, self._busy)

    @property
    def is_busy(self) -> bool:
        return self._num_asked > self._num_ended

    def close(self) -> None:
        """End after the step that is being compiled; nobody waits for it."""
        self._asked.put(None)

    def _run(self) -> None:
        while (asked := self._asked.get()) is not None:
            try:
                with self._busy, torch.inference_mode():
                    self._compile(asked)
            except Exception as exc:  # no compiler on this host, or a model that it cannot compile
                logger.warning("a step is not compiled", extra={"rows": asked.key.num_rows, "why": repr(exc)[:2_000]})
            finally:
                self._num_ended += 1

    def _compile(self, asked: _Asked) -> None:
        key = asked.key
        if asked.cache.scratch_bytes(key.num_rows) > free_bytes(asked.state.token_B.device) // 2:
            logger.warning("no memory to compile a step", extra={"rows": key.num_rows})
            return
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # the library's
        with torch.cuda.stream(stream):
            state = asked.state
            cache = asked.cache.scratch(key.num_rows, key.num_columns, state.position_B)
            self._step_of(key)(cache, state, key.sampling)
        stream.synchronize()
        self._done.add(key)

    def _step_of(self, key: GraphKey) -> Step:
        return self._tuned if key.num_rows <= TUNED_ROWS else self._plain
