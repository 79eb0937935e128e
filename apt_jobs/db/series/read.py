"""Read the series of a training at any resolution: at most so many buckets for a range of steps.

A resumed attempt does again what its predecessor had done after the checkpoint, and a trainer that was rolled back does
so within one attempt. The rule: nothing of an attempt counts after the earliest step that a later attempt resumed from,
and nothing of a segment beyond the step before a later one begins.

Of the levels that db/series/store.py keeps, the coarsest one with enough buckets is read; where the range or the
rule cuts a bucket, the finer ones below it, down to single steps. So what is read does not grow with the job.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from apt_jobs.db.models import Attempt, SeriesLevel, SeriesSegment
from apt_jobs.db.series.store import BLOCK_STEPS, FACTOR, LEADERS, WIDTHS, Steps, level_rows, read_steps
from apt_jobs.db.series.summaries import Summary
from apt_jobs.jobs.limits import MAX_STEP


@dataclass(frozen=True, slots=True)
class SegmentRange:
    """The steps of a segment that are wanted and count; both ends are included."""

    segment: SeriesSegment
    first_step: int
    last_step: int

    @property
    def estimated_num_steps(self) -> float:
        """Estimate how many steps the range has; exact if all steps count, or if they are evenly spaced."""
        segment = self.segment
        first, last = max(self.first_step, segment.first_step), min(self.last_step, segment.last_step)
        return segment.num_steps * (last - first + 1) / (segment.last_step - segment.first_step + 1)


def read_buckets(
    session: Session,
    job_id: str,
    kind: str,
    max_buckets: int,
    num_columns: int = 0,
    from_step: int = 0,
    to_step: int = MAX_STEP,
) -> Summary:
    """Return at most `max_buckets` buckets of the steps of a range that count, in order; one step each if they fit.

    `num_columns` is the number of layers; other series know theirs.
    """
    ranges = effective_ranges(session, job_id, kind, from_step, to_step)
    level = _level_for(sum(span.estimated_num_steps for span in ranges), max_buckets)
    parts = [part for span in ranges for part in _parts(session, span, level)]
    return Summary.concatenate(parts, WIDTHS[kind] or num_columns).downsample(max_buckets)


def block_seqs(session: Session, span: SegmentRange) -> list[tuple[int, int]]:
    """Return ranges of `seq` that hold all single steps of the range, about `BLOCK_STEPS` each, in order."""
    query = select(SeriesLevel.first_seq, SeriesLevel.last_seq).where(*level_rows(span.segment, 1))
    rows = session.execute(query.where(*_overlaps(span)).order_by(SeriesLevel.number)).all()
    blocks = [(row.first_seq, row.last_seq) for row in rows]
    segment = span.segment
    return [*blocks, (segment.open_seq, segment.last_seq)] if segment.open_seq <= segment.last_seq else blocks


def clip(steps: Steps, span: SegmentRange) -> Steps:
    """Keep the steps that belong to the range."""
    wanted = (steps.steps_N >= span.first_step) & (steps.steps_N <= span.last_step)
    return steps if wanted.all() else steps.select(wanted)


def effective_ranges(
    session: Session, job_id: str, kind: str, from_step: int = 0, to_step: int = MAX_STEP
) -> list[SegmentRange]:
    """Return what counts of a series, by segment, in order."""
    leader = LEADERS.get(kind, kind)
    query = select(SeriesSegment).where(SeriesSegment.job_id == job_id, SeriesSegment.kind.in_({kind, leader}))
    query = query.order_by(SeriesSegment.attempt, SeriesSegment.segment)
    segments = session.scalars(query.execution_options(populate_existing=True)).all()
    return counting_ranges(segments, _resumed(session, job_id), kind, from_step, to_step)


def counting_ranges(
    segments: Sequence[SeriesSegment],
    resumed: Sequence[tuple[int, int]],
    kind: str,
    from_step: int = 0,
    to_step: int = MAX_STEP,
) -> list[SegmentRange]:
    """Return what counts of a series of one job.

    Args:
        segments: Those of the kind and of its leader, in order.
        resumed: Attempts with the steps that they went on from.
        kind: Of the series.
        from_step: First step that is wanted.
        to_step: Last step that is wanted.
    """
    leader = LEADERS.get(kind, kind)
    begins = [  # (place, last step before it that counts)
        *((segment.attempt, segment.segment, segment.first_step - 1) for segment in segments if segment.kind == leader),
        *((attempt, -1, step) for attempt, step in resumed),
    ]
    ranges = []
    for segment in segments:
        if segment.kind == kind:
            place = segment.attempt, segment.segment
            limit = min([to_step, *(step for *later, step in begins if tuple(later) > place)])
            if max(segment.first_step, from_step) <= min(segment.last_step, limit):
                ranges.append(SegmentRange(segment, from_step, limit))
    return ranges


def _resumed(session: Session, job_id: str) -> Sequence[tuple[int, int]]:
    query = select(Attempt.attempt, Attempt.resumed_from_step)
    query = query.where(Attempt.job_id == job_id, Attempt.resumed_from_step.is_not(None))
    return [(row.attempt, row.resumed_from_step or 0) for row in session.execute(query)]


def _level_for(num_steps: float, max_buckets: int) -> int:
    """Choose the coarsest rollup level with at least `max_buckets` buckets; 0: single steps."""
    level = 0
    while num_steps >= max_buckets * FACTOR ** (level + 1):
        level += 1
    return level


def _parts(session: Session, span: SegmentRange, level: int) -> Iterator[Summary]:
    """Yield the buckets of one segment, in order: first those of `level`, then what no coarser row covers."""
    segment, num_covered = span.segment, 0
    for at in range(level, 0, -1):
        num_rows = segment.num_steps // (BLOCK_STEPS * FACTOR ** (at - 1))
        if num_covered < num_rows:
            yield from read_rows(session, span, at, num_covered, num_rows)
        num_covered = num_rows * FACTOR
    first_seq = segment.open_seq if level else _first_seq(session, span)
    if first_seq is not None and first_seq <= segment.last_seq:
        yield _single(session, span, first_seq, segment.last_seq if level else _last_seq(session, span))


def read_rows(session: Session, span: SegmentRange, level: int, begin: int, end: int) -> Iterator[Summary]:
    """Yield the buckets of rows `begin` to `end` (excluded) that count; of a bucket that the range cuts, finer ones."""
    query = (
        select(SeriesLevel.number, SeriesLevel.first_seq, SeriesLevel.last_seq, SeriesLevel.body)
        .where(*level_rows(span.segment, level), SeriesLevel.number >= begin, SeriesLevel.number < end)
        .where(*_overlaps(span))
        .order_by(SeriesLevel.number)
    )
    for number, first_seq, last_seq, body in session.execute(query).all():
        buckets = Summary.decode(body)
        overlaps = (buckets.last_steps_B >= span.first_step) & (buckets.first_steps_B <= span.last_step)
        inside = (buckets.first_steps_B >= span.first_step) & (buckets.last_steps_B <= span.last_step)
        if inside.all():
            yield buckets
            continue
        for index in np.flatnonzero(overlaps).tolist():
            if inside[index]:
                yield buckets.select(slice(index, index + 1))
            elif level > 1:
                child = number * FACTOR + index
                yield from read_rows(session, span, level - 1, child, child + 1)
            else:
                steps = read_steps(session, span.segment.job_id, span.segment.kind, first_seq, last_seq)
                steps = steps.select(slice(index * FACTOR, (index + 1) * FACTOR))
                yield clip(steps, span).summary()


def _single(session: Session, span: SegmentRange, first_seq: int, last_seq: int) -> Summary:
    segment = span.segment
    return clip(read_steps(session, segment.job_id, segment.kind, first_seq, last_seq), span).summary()


def _first_seq(session: Session, span: SegmentRange) -> int | None:
    """Return the `seq` at which the single steps of the range begin."""
    query = select(func.min(SeriesLevel.first_seq)).where(*level_rows(span.segment, 1), *_overlaps(span))
    first_seq = session.scalar(query)
    return span.segment.open_seq if first_seq is None else first_seq


def _last_seq(session: Session, span: SegmentRange) -> int:
    """Return the `seq` at which they end, or a little later: the end of a row of rollup level 1."""
    after = select(func.min(SeriesLevel.last_seq)).where(
        *level_rows(span.segment, 1), SeriesLevel.last_step > span.last_step
    )
    last_seq = session.scalar(after)
    return span.segment.last_seq if last_seq is None else last_seq


def _overlaps(span: SegmentRange) -> tuple[ColumnElement[bool], ...]:
    return SeriesLevel.last_step >= span.first_step, SeriesLevel.first_step <= span.last_step
