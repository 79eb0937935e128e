"""Read one series of many jobs at low resolution, in a handful of queries: what a comparison draws and summarises.

`read.py` reads one job exactly as far as a range cuts it, with a few queries a job. Here all jobs are read together:
whole rows of rollup levels and what none covers yet, decoded by layout (`events/many_columns.py`). Where a resumed
attempt cuts a row, that row alone is read as `read.py` reads it, so the same steps count.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from sqlalchemy import Select, and_, or_, select
from sqlalchemy.orm import Session

from apt_jobs.db.models import Attempt, EventChunk, EventRow, SeriesLevel, SeriesSegment
from apt_jobs.db.series.read import SegmentRange, counting_ranges, read_rows
from apt_jobs.db.series.store import BLOCK_STEPS, CURVES, FACTOR, LEADERS, WIDTHS
from apt_jobs.db.series.summaries import Floats, Integers, Summary
from apt_jobs.events.columns import COLUMN_TYPES, Array
from apt_jobs.events.kinds import StepTrained
from apt_jobs.events.many_columns import unpack_many

_CHUNK_ARRAYS = 4 + len(CURVES)  # seq, at, step, epoch, and the curves
_STATISTICS = ("last_steps_B", "num_steps_B", "last_at_ms_B", "min_BL", "max_BL", "mean_BL", "num_nonfinite_BL")
_STATISTIC_NUMBERS = [list(Summary.__slots__).index(name) for name in _STATISTICS]
_Place = tuple[str, int, int]  # job, attempt, segment
_SAME_SEGMENT = [
    getattr(SeriesLevel, name) == getattr(SeriesSegment, name) for name in ("job_id", "kind", "attempt", "segment")
]
_PLACE = (SeriesSegment.job_id, SeriesSegment.attempt, SeriesSegment.segment)


@dataclass(frozen=True, slots=True)
class ManyPoints:
    """Buckets of one series of many jobs, in no order: R buckets, C columns."""

    jobs_R: Integers  # index of the job
    last_steps_R: Integers
    num_steps_R: Integers
    last_at_ms_R: Integers
    min_RC: Floats  # NaN in both: no value was finite
    max_RC: Floats
    mean_RC: Floats
    num_nonfinite_RC: Integers

    @classmethod
    def concatenate(cls, parts: Sequence["ManyPoints"], num_columns: int) -> "ManyPoints":
        empty, empty_C = np.zeros(0, np.int64), np.zeros((0, num_columns))
        nothing = cls(empty, empty, empty, empty, empty_C, empty_C, empty_C, empty_C.astype(np.int64))
        return cls(*(np.concatenate([getattr(part, name) for part in [nothing, *parts]]) for name in cls.__slots__))


@dataclass(frozen=True, slots=True)
class _Reading:
    """What is read: the steps that count, by segment, and the rollup level of each job."""

    session: Session
    kind: str
    spans: dict[_Place, SegmentRange]
    levels: dict[str, int]  # by job; 0: single steps
    indices: dict[str, int]  # of the jobs

    def jobs_at(self, condition: Callable[[int], bool]) -> list[str]:
        return [job_id for job_id, level in self.levels.items() if condition(level)]


def read_many(session: Session, job_ids: Sequence[str], kind: str, max_points: int) -> ManyPoints:
    """Return the steps that count of a series of many jobs, as buckets.

    A bucket has at most twice as many steps as one of `max_points` points over the job with the most steps.
    """
    ranges = _ranges_of_many(session, job_ids, kind)
    spans = {(one.segment.job_id, one.segment.attempt, one.segment.segment): one for own in ranges for one in own}
    indices = {job_id: index for index, job_id in enumerate(job_ids)}
    reading = _Reading(session, kind, spans, _levels(job_ids, ranges, max_points), indices)
    parts = [part for level in range(1, max(reading.levels.values(), default=0) + 1) for part in _rows(reading, level)]
    parts.append(_single_chunks(reading) if kind in COLUMN_TYPES else _single_rows(reading))
    return ManyPoints.concatenate(parts, WIDTHS[kind])


def read_many_steps(session: Session, job_ids: Sequence[str], first_step: int, last_step: int) -> ManyPoints:
    """Return single steps of the curves of many jobs that count, from a short range."""
    ranges = _ranges_of_many(session, job_ids, StepTrained.kind)
    spans = {(one.segment.job_id, one.segment.attempt, one.segment.segment): one for own in ranges for one in own}
    indices = {job_id: index for index, job_id in enumerate(job_ids)}
    reading = _Reading(session, StepTrained.kind, spans, {}, indices)
    query = _chunks_of(reading).where(SeriesSegment.job_id.in_(job_ids), SeriesSegment.first_step <= last_step)
    in_row = and_(*_SAME_SEGMENT, EventChunk.last_seq.between(SeriesLevel.first_seq, SeriesLevel.last_seq))
    overlaps = SeriesLevel.first_step <= last_step, SeriesLevel.last_step >= first_step
    rows = list(session.execute(query.join(SeriesLevel, in_row).where(SeriesLevel.level == 1, *overlaps)))
    is_open = EventChunk.last_seq >= SeriesSegment.open_seq, SeriesSegment.last_step >= first_step
    rows += list(session.execute(query.where(*is_open)))
    found = _of_chunks(reading, rows)
    wanted_R = (found.last_steps_R >= first_step) & (found.last_steps_R <= last_step)
    return ManyPoints(*(getattr(found, name)[wanted_R] for name in ManyPoints.__slots__))


def _ranges_of_many(session: Session, job_ids: Sequence[str], kind: str) -> list[list[SegmentRange]]:
    kinds = {kind, LEADERS.get(kind, kind)}
    query = select(SeriesSegment).where(SeriesSegment.job_id.in_(job_ids), SeriesSegment.kind.in_(kinds))
    query = query.order_by(SeriesSegment.job_id, SeriesSegment.attempt, SeriesSegment.segment)
    segments = defaultdict(list)
    for segment in session.scalars(query.execution_options(populate_existing=True)):
        segments[segment.job_id].append(segment)
    attempts = select(Attempt.job_id, Attempt.attempt, Attempt.resumed_from_step)
    attempts = attempts.where(Attempt.job_id.in_(job_ids), Attempt.resumed_from_step.is_not(None))
    resumed = defaultdict(list)
    for job_id, attempt, step in session.execute(attempts):
        resumed[job_id].append((attempt, step or 0))
    return [counting_ranges(segments[job_id], resumed[job_id], kind) for job_id in job_ids]


def _levels(job_ids: Sequence[str], ranges: Sequence[Sequence[SegmentRange]], max_points: int) -> dict[str, int]:
    lasts = [max((min(one.last_step, one.segment.last_step) for one in own), default=0) for own in ranges]
    width = max(lasts, default=0) / max_points  # steps of a point
    levels = {}
    for job_id, own, last in zip(job_ids, ranges, lasts, strict=True):
        num_recorded, level = sum(one.estimated_num_steps for one in own), 0
        while FACTOR ** (level + 1) <= 2 * width * num_recorded / max(last, 1):  # recorded steps of a bucket
            level += 1
        levels[job_id] = level
    return levels


def _rows(reading: _Reading, level: int) -> Iterator[ManyPoints]:
    """Yield the rows of a level that no coarser one covers; of jobs with this level, all of it."""
    num_covering = SeriesSegment.num_steps.op("/")(BLOCK_STEPS * FACTOR**level)  # of integers: rows of the next level
    finer = reading.jobs_at(lambda own: own > level)
    is_wanted = or_(
        SeriesSegment.job_id.in_(reading.jobs_at(lambda own: own == level)),
        and_(SeriesSegment.job_id.in_(finer), SeriesLevel.number >= num_covering * FACTOR),
    )
    columns = (SeriesLevel.job_id, SeriesLevel.attempt, SeriesLevel.segment, SeriesLevel.number)
    query = select(*columns, SeriesLevel.first_step, SeriesLevel.last_step, SeriesLevel.body)
    query = query.join(SeriesSegment, and_(*_SAME_SEGMENT)).where(SeriesSegment.kind == reading.kind)
    whole: list[tuple[int, bytes]] = []
    for row in reading.session.execute(query.where(SeriesLevel.level == level, is_wanted)).all():
        span, index = reading.spans.get((row.job_id, row.attempt, row.segment)), reading.indices[row.job_id]
        if span is None or row.first_step > span.last_step:
            continue
        if row.last_step <= span.last_step:
            whole.append((index, row.body))
            continue
        for cut in read_rows(reading.session, span, level, row.number, row.number + 1):
            yield ManyPoints(np.full(cut.num_buckets, index), *(getattr(cut, name) for name in _STATISTICS))
    if whole:
        arrays, counts = unpack_many([body for _, body in whole], len(Summary.__slots__), _STATISTIC_NUMBERS)
        shaped = [
            column.reshape(-1, WIDTHS[reading.kind]) if name.endswith("_BL") else column
            for name, column in zip(_STATISTICS, arrays, strict=True)
        ]
        yield ManyPoints(np.repeat(np.array([index for index, _ in whole]), counts), *shaped)


def _single_chunks(reading: _Reading) -> ManyPoints:
    """Return the steps that no row of a level covers, and all steps of jobs that are read step by step."""
    query = _chunks_of(reading)
    rows: list[Any] = []
    for job_ids, first_seq in (
        (reading.jobs_at(lambda level: level == 0), SeriesSegment.first_seq),
        (reading.jobs_at(lambda level: level > 0), SeriesSegment.open_seq),
    ):
        own = query.where(SeriesSegment.job_id.in_(job_ids), EventChunk.last_seq >= first_seq)
        rows += reading.session.execute(own).all() if job_ids else []
    return _of_chunks(reading, rows)


def _chunks_of(reading: _Reading) -> Select[str, int, int, bytes]:
    same = and_(EventChunk.job_id == SeriesSegment.job_id, EventChunk.kind == SeriesSegment.kind)
    query = select(*_PLACE, EventChunk.body).join_from(SeriesSegment, EventChunk, same)
    return query.where(SeriesSegment.kind == reading.kind, EventChunk.last_seq <= SeriesSegment.last_seq)


def _of_chunks(reading: _Reading, rows: Sequence[Any]) -> ManyPoints:
    rows = [row for row in rows if tuple(row[:3]) in reading.spans]
    arrays, counts = unpack_many([row.body for row in rows], _CHUNK_ARRAYS, [1, 2, *range(4, _CHUNK_ARRAYS)])
    values_RC = np.stack([column.astype(np.float64) for column in arrays[2:]], axis=1)
    return _of_steps(reading, rows, counts, arrays[1], arrays[0], values_RC)


def _single_rows(reading: _Reading) -> ManyPoints:
    """Return the same of a series whose events are rows: validations."""
    seq = EventRow.seq + 0  # not by the primary key, which has the events of all kinds
    same = and_(EventRow.job_id == SeriesSegment.job_id, EventRow.kind == SeriesSegment.kind)
    query = select(*_PLACE, EventRow.at, EventRow.payload).join(EventRow, same)
    query = query.where(SeriesSegment.kind == reading.kind, SeriesSegment.job_id.in_(list(reading.levels)))
    query = query.where(seq.between(SeriesSegment.first_seq, SeriesSegment.last_seq))
    whole = SeriesSegment.job_id.in_(reading.jobs_at(lambda level: level == 0))
    rows = reading.session.execute(query.where(or_(whole, seq >= SeriesSegment.open_seq))).all()
    rows = [row for row in rows if tuple(row[:3]) in reading.spans]
    payloads = [orjson.loads(row.payload) for row in rows]
    # The name of a number that is not finite is read as that number.
    values_RC = np.array([float(payload["val_loss"]) for payload in payloads], np.float64).reshape(-1, 1)
    steps_R = np.array([payload["step"] for payload in payloads], np.int64)
    at_ms_R = np.array([round(row.at.timestamp() * 1000) for row in rows], np.int64)
    return _of_steps(reading, rows, np.ones(len(rows), np.int64), steps_R, at_ms_R, values_RC)


def _of_steps(
    reading: _Reading, rows: Sequence[Any], counts: Integers, steps_R: Array, at_ms_R: Array, values_RC: Floats
) -> ManyPoints:
    """Return one bucket for each step that counts. Each row has `counts` of them."""
    limits = np.array([reading.spans[tuple(row[:3])].last_step for row in rows], np.int64)
    jobs_R = np.repeat(np.array([reading.indices[row.job_id] for row in rows], np.int64), counts)
    wanted_R = steps_R <= np.repeat(limits, counts)
    values_RC = values_RC[wanted_R]
    is_finite = np.isfinite(values_RC)
    known_RC = np.where(is_finite, values_RC, np.nan)
    steps_R = steps_R[wanted_R].astype(np.int64)
    return ManyPoints(
        jobs_R=jobs_R[wanted_R],
        last_steps_R=steps_R,
        num_steps_R=np.ones_like(steps_R),
        last_at_ms_R=at_ms_R[wanted_R].astype(np.int64),
        min_RC=known_RC,
        max_RC=known_RC,
        mean_RC=values_RC,
        num_nonfinite_RC=(~is_finite).astype(np.int64),
    )
