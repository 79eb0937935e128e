"""Read the full histories of a job as a table, block by block: a row for each step that counts, a column a number.

What is exported is what counts when the export begins. Each block is read in a session of its own, so a slow reader
holds no transaction open; memory is bounded by a block of each series.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apt_jobs.db.engine import Database
from apt_jobs.db.jobs import get_job
from apt_jobs.db.series.custom_metrics import CustomMetric, custom_metrics
from apt_jobs.db.series.histories import layer_names
from apt_jobs.db.series.read import SegmentRange, block_seqs, clip, effective_ranges
from apt_jobs.db.series.store import CURVES, Steps, read_steps

SERIES = ("metric", "validation", "gradient")  # in the order of their columns; custom metrics follow


@dataclass(frozen=True, slots=True)
class Block:
    """Rows in order of step. A value that is not known was not recorded; one that is not finite was."""

    steps_N: NDArray[np.int64]
    at_ms_N: NDArray[np.int64]
    values_NC: NDArray[np.float64]
    known_NC: NDArray[np.bool_]


class HistoryTable:
    """The histories of one job as a table.

    Raises:
        NotFound: there is no such job.
    """

    def __init__(self, database: Database, job_id: str) -> None:
        self._database, self.job_id = database, job_id
        with database.read() as session:
            get_job(session, job_id)
            self.layers = layer_names(session, job_id)
            ranges = {kind: effective_ranges(session, job_id, kind) for kind in SERIES}
            session.expunge_all()
            self._custom = custom_metrics(session, job_id)
        self._ranges: dict[str, list[SegmentRange]] = ranges
        own = [*CURVES, "val_loss", *(f"gradients/{name}" for name in self.layers)]
        taken = {"step", "at", *own}
        self.columns = [*own, *(f"custom/{name}" if name in taken else name for name in self._custom)]

    @property
    def are_layers(self) -> list[bool]:
        """Whether each column is the gradient norm of a layer."""
        first = len(CURVES) + 1
        return [first <= index < first + len(self.layers) for index in range(len(self.columns))]

    def blocks(self) -> Iterator[Block]:
        """Yield the table, a few hundred rows at a time."""
        series = [_Series(self._steps_of(kind)) for kind in SERIES]
        series += [_Series(iter([_as_steps(metric)])) for metric in self._custom.values()]
        widths = [len(CURVES), 1, len(self.layers), *(1 for _ in self._custom)]
        first, ends = np.cumsum([0, *widths[:-1]]).tolist(), np.cumsum(widths).tolist()
        while True:
            waiting = [one for one in series if one.fill()]
            if not waiting:
                return
            last_step = min(one.last_step for one in waiting)
            parts = [one.pop_until(last_step) for one in series]
            steps_N = np.unique(np.concatenate([part.steps_N for part in parts if part is not None]))
            block = _empty(steps_N, len(self.columns))
            for part, column, end in zip(parts, first, ends, strict=True):
                if part is not None:
                    _fill_columns(block, part, column, end)
            yield block

    def _steps_of(self, kind: str) -> Iterator[Steps]:
        for segment_range in self._ranges[kind]:
            with self._database.read() as session:
                seq_ranges = block_seqs(session, segment_range)
            for first_seq, last_seq in seq_ranges:
                with self._database.read() as session:
                    steps = clip(read_steps(session, self.job_id, kind, first_seq, last_seq), segment_range)
                if len(steps.seqs_N):
                    yield steps


class _Series:
    """Steps of one series that were read and are not in a block yet."""

    def __init__(self, source: Iterator[Steps]) -> None:
        self._source = source
        self._steps: Steps | None = None

    @property
    def last_step(self) -> int:
        assert self._steps is not None  # `fill` was asked first
        return int(self._steps.steps_N[-1])

    def fill(self) -> bool:
        """Read more if nothing is left; False at the end of the series."""
        if self._steps is None:
            self._steps = next(self._source, None)
        return self._steps is not None

    def pop_until(self, last_step: int) -> Steps | None:
        """Remove and return the steps up to `last_step`; None if there are none."""
        if self._steps is None:
            return None
        count = int(np.searchsorted(self._steps.steps_N, last_step, side="right"))
        popped, rest = self._steps.select(slice(count)), self._steps.select(slice(count, None))
        self._steps = rest if len(rest.seqs_N) else None
        return popped if count else None


def _as_steps(metric: CustomMetric) -> Steps:
    number = len(metric.steps_N)
    no_anomaly = np.zeros((number, 1), bool)
    return Steps(np.zeros(number, np.int64), metric.steps_N, metric.at_ms_N, metric.values_N[:, None], no_anomaly)


def _empty(steps_N: NDArray[np.int64], num_columns: int) -> Block:
    shape = len(steps_N), num_columns
    return Block(steps_N, np.zeros(len(steps_N), np.int64), np.zeros(shape), np.zeros(shape, bool))


def _fill_columns(block: Block, steps: Steps, column: int, end: int) -> None:
    rows = np.searchsorted(block.steps_N, steps.steps_N)
    width = min(steps.values_NL.shape[1], end - column)
    block.values_NC[rows, column : column + width] = steps.values_NL[:, :width]
    block.known_NC[rows, column : column + width] = True
    block.at_ms_N[rows] = np.maximum(block.at_ms_N[rows], steps.at_ms_N)


def plain_rows(block: Block, missing: Any) -> Iterator[tuple[int, int, list[Any]]]:
    """Yield step, time in Unix ms and values of each row; `missing` for what was not recorded."""
    everything = block.known_NC.all()
    for step, at_ms, values, known in zip(
        block.steps_N.tolist(), block.at_ms_N.tolist(), block.values_NC.tolist(), block.known_NC, strict=True
    ):
        if not everything:
            values = [value if is_known else missing for value, is_known in zip(values, known.tolist(), strict=True)]
        yield step, at_ms, values
