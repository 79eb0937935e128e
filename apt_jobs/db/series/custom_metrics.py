"""Read the metrics that user scripts logged: a series for each name, with steps of its own.

They are rows of the event log (`metrics` events). Of a name that several ranks logged, the lowest rank counts. Where a
later attempt goes on from an earlier step, what the attempt before it logged from there on is left out.
"""

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import orjson
from numpy.typing import NDArray
from sqlalchemy import Row, select
from sqlalchemy.orm import Session

from apt_jobs.db.models import EventRow
from apt_jobs.jobs.limits import MAX_STEP

READ_ROWS = 5_000  # at a time


@dataclass(frozen=True, slots=True)
class CustomMetric:
    """One name, in order of step: N points."""

    name: str
    steps_N: NDArray[np.int64]
    values_N: NDArray[np.float64]
    at_ms_N: NDArray[np.int64]

    @property
    def last(self) -> float:
        """Return the value of the last step."""
        return float(self.values_N[-1])

    def min_max(self) -> tuple[float, float] | None:
        """Return the extremes of the finite values; None if there is none."""
        finite = self.values_N[np.isfinite(self.values_N)]
        return (float(finite.min()), float(finite.max())) if len(finite) else None

    def downsampled(self, max_points: int) -> "CustomMetric":
        """Return at most `max_points` points: of each run of neighbours one that is not finite, else the last one."""
        number = len(self.steps_N)
        if number <= max_points:
            return self
        ends = np.linspace(0, number, max_points + 1).astype(np.int64)[1:]
        chosen = ends - 1
        broken = np.flatnonzero(~np.isfinite(self.values_N))
        chosen[np.searchsorted(ends, broken, side="right")] = broken
        return CustomMetric(self.name, self.steps_N[chosen], self.values_N[chosen], self.at_ms_N[chosen])


@dataclass(frozen=True, slots=True)
class _Block:
    """Neighbouring events of one attempt and rank with the same names: N events, M names."""

    attempt: int
    rank: int
    names: tuple[str, ...]
    seqs_N: NDArray[np.int64]
    steps_N: NDArray[np.int64]
    at_ms_N: NDArray[np.int64]
    values_NM: NDArray[np.float64]

    @property
    def num_bytes(self) -> int:
        return self.seqs_N.nbytes * 3 + self.values_NM.nbytes + 1_000


class MetricLog:
    """All that a job logged, as far as it was read. Events are only appended: reading on reads the new ones."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        self.num_bytes = 0
        self.is_complete = True  # all that was there when it was read on was read
        self._last_seq = 0
        self._blocks: dict[str, list[tuple[_Block, int]]] = {}  # by name: the blocks that have it, and its column

    def read_on(self, session: Session, max_rows: int | None = None) -> int:
        """Read what was appended since the last call, or about the next `max_rows` of it. Returns how many it were."""
        query = (
            select(EventRow.seq, EventRow.attempt, EventRow.at, EventRow.payload)
            .where(EventRow.job_id == self.job_id, EventRow.kind == "metrics")
            .order_by(EventRow.seq)
            .limit(READ_ROWS)
        )
        num_read = 0
        while max_rows is None or num_read < max_rows:
            rows = session.execute(query.where(EventRow.seq > self._last_seq)).all()
            num_read += len(rows)
            self.is_complete = len(rows) < READ_ROWS
            if not rows:
                break
            for block in _blocks_of(rows):
                self.num_bytes += block.num_bytes
                for column, name in enumerate(block.names):
                    self._blocks.setdefault(name, []).append((block, column))
            self._last_seq = rows[-1].seq
            if self.is_complete:
                break
        return num_read

    def series(
        self, from_step: int = 0, to_step: int = MAX_STEP, names: Collection[str] | None = None
    ) -> dict[str, CustomMetric]:
        """Return the series of each name, in the order in which they appeared; those without a point are left out."""
        series = {}
        for name, blocks in self._blocks.items():
            if names is not None and name not in names:
                continue
            metric = _joined(name, blocks)
            first, last = np.searchsorted(metric.steps_N, [from_step, to_step + 1])
            if first < last:
                part = slice(int(first), int(last))
                series[name] = CustomMetric(name, metric.steps_N[part], metric.values_N[part], metric.at_ms_N[part])
        return series


class MetricLogs:
    """The logs of the jobs that were asked for last: a page asks for the same one every few seconds."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._logs: OrderedDict[str, MetricLog] = OrderedDict()
        self._lock = threading.Lock()

    def series(self, session: Session, job_id: str, from_step: int, to_step: int) -> dict[str, CustomMetric]:
        """Return the series of a job, as `custom_metrics`, after reading what is new."""
        with self._lock:  # one reads, the others find it read
            log = self._logs.pop(job_id, None) or MetricLog(job_id)
            log.read_on(session)
            self._keep(log)
            return log.series(from_step, to_step)

    def series_of_many(
        self, session: Session, job_ids: Sequence[str], names: Collection[str], max_rows: int
    ) -> tuple[dict[str, dict[str, CustomMetric]], bool]:
        """Return the series of some names, by job, after reading about `max_rows` of what is new.

        The second value is whether that was all of it: the next call goes on from there.
        """
        found, is_complete = {}, True
        with self._lock:
            for job_id in job_ids:
                log = self._logs.pop(job_id, None) or MetricLog(job_id)
                if max_rows > 0:
                    max_rows -= log.read_on(session, max_rows)
                    is_complete &= log.is_complete
                else:
                    is_complete = False
                self._keep(log)
                found[job_id] = log.series(names=names)
        return found, is_complete

    def _keep(self, log: MetricLog) -> None:
        self._logs[log.job_id] = log
        while len(self._logs) > 1 and sum(one.num_bytes for one in self._logs.values()) > self._max_bytes:
            self._logs.popitem(last=False)


def custom_metrics(
    session: Session, job_id: str, from_step: int = 0, to_step: int = MAX_STEP
) -> dict[str, CustomMetric]:
    """Return the whole series of each name, in the order in which they appeared; those without a point are left out."""
    log = MetricLog(job_id)
    log.read_on(session)
    return log.series(from_step, to_step)


def _blocks_of(rows: Sequence[Row[int, int, datetime, bytes]]) -> Iterator[_Block]:
    """Group events by who logged which names: numbers are then columns of NumPy, not Python objects."""
    groups: dict[tuple[int, int, tuple[str, ...]], tuple[list[int], list[float | str]]] = {}
    for seq, attempt, at, payload in rows:
        event = orjson.loads(payload)
        values = event["values"]
        key = attempt, event["rank"], tuple(values)
        places, numbers = groups.get(key) or groups.setdefault(key, ([], []))
        places += (seq, event["step"], round(at.timestamp() * 1000))
        numbers += values.values()
    for (attempt, rank, names), (places, numbers) in groups.items():
        places_N3 = np.array(places, np.int64).reshape(-1, 3)
        yield _Block(
            attempt=attempt,
            rank=rank,
            names=names,
            seqs_N=places_N3[:, 0],
            steps_N=places_N3[:, 1],
            at_ms_N=places_N3[:, 2],
            # The name of a number that is not finite is read as that number.
            values_NM=np.array(numbers, np.float64).reshape(-1, len(names)),
        )


def _joined(name: str, blocks: Sequence[tuple[_Block, int]]) -> CustomMetric:
    """Join the blocks of the lowest rank: a later attempt replaces what it does again, the last value wins."""
    rank = min(block.rank for block, _ in blocks)
    chosen = [(block, column) for block, column in blocks if block.rank == rank]
    seqs_N = np.concatenate([block.seqs_N for block, _ in chosen])
    steps_N = np.concatenate([block.steps_N for block, _ in chosen])
    values_N = np.concatenate([block.values_NM[:, column] for block, column in chosen])
    at_ms_N = np.concatenate([block.at_ms_N for block, _ in chosen])
    attempts_N = np.concatenate([np.full(len(block.seqs_N), block.attempt) for block, _ in chosen])
    if np.any(np.diff(seqs_N) < 0):
        order = np.argsort(seqs_N)
        steps_N, values_N, at_ms_N, attempts_N = steps_N[order], values_N[order], at_ms_N[order], attempts_N[order]
    if np.any(np.diff(steps_N) <= 0):
        kept = _kept(steps_N, attempts_N)
        steps_N, values_N, at_ms_N = steps_N[kept], values_N[kept], at_ms_N[kept]
    return CustomMetric(name, steps_N, values_N, at_ms_N)


def _kept(steps_N: NDArray[np.int64], attempts_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the indices of the points that count, in order of step."""
    counts_N = np.ones(len(steps_N), bool)
    first_again = MAX_STEP + 1  # the lowest step at which a later attempt went on
    for attempt in np.unique(attempts_N)[::-1]:
        of_attempt = np.flatnonzero(attempts_N == attempt)
        counts_N[of_attempt] = steps_N[of_attempt] < first_again
        first_again = min(first_again, int(steps_N[of_attempt[0]]))
    indices = np.flatnonzero(counts_N)[::-1]  # the last one of a step first
    _, firsts = np.unique(steps_N[indices], return_index=True)
    return indices[firsts]
