"""Store the series of a training: numbers of every step in chunks, and buckets of steps at several rollup levels.

A batch adds its chunks, whatever its size. When `FACTOR ** 2` steps of a segment are there, one row of level 1 is
written for them: `FACTOR` buckets of `FACTOR` steps. `FACTOR` such rows give one row of level 2, and so on. A row is
written once, from rows that are there, so a step costs the same however long the job is; what no row covers yet is at
most `FACTOR ** 2` steps and `FACTOR` rows of each level.

Steps only grow within a segment. A step that is not beyond the last one, or has other layers, begins a new one: the
trainer was rolled back. Validations and anomalies belong to the segment that their steps were trained in.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from apt_jobs.db.models import EventChunk, EventRow, SeriesLevel, SeriesSegment
from apt_jobs.db.series.summaries import Summary
from apt_jobs.events.codec import LoggedEvent, decode_payload
from apt_jobs.events.columns import COLUMN_TYPES, Columns, decode_columns, encode_columns
from apt_jobs.events.kinds import (
    ANOMALY_KINDS,
    EVENT_TYPES,
    AnomaliesFound,
    GradientsRecorded,
    StepTrained,
    StoredEvent,
    Validated,
)

FACTOR = 16
BLOCK_STEPS = FACTOR**2  # of a row of level 1; no chunk has steps of two
MAX_CHUNK_VALUES = 1 << 18  # 1 MB
_READ_CHUNKS = 4  # at a time: few readers need more
_SERIES = {cls.kind: cls.series for cls in EVENT_TYPES if cls.series is not None}
CURVES = _SERIES[StepTrained.kind].columns
WIDTHS = {kind: len(series.columns) for kind, series in _SERIES.items()}  # 0: as many as layers
LEADERS = {kind: series.leader for kind, series in _SERIES.items() if series.leader is not None}


@dataclass(frozen=True, slots=True)
class Steps:
    """Numbers of single steps, in order of `seq`: N steps, L columns."""

    seqs_N: NDArray[np.int64]
    steps_N: NDArray[np.int64]
    at_ms_N: NDArray[np.int64]
    values_NL: NDArray[Any]
    anomalous_NL: NDArray[np.bool_]

    def summary(self) -> Summary:
        return Summary.of_steps(self.steps_N, self.at_ms_N, self.values_NL, self.anomalous_NL)

    def select(self, which_N: NDArray[np.bool_] | slice) -> "Steps":
        return Steps(*(getattr(self, name)[which_N] for name in self.__slots__))


def store_series(session: Session, stored: Sequence[StoredEvent]) -> None:
    """Add events of one job, one attempt and one transaction, in order of `seq`: chunks, segments and levels."""
    by_kind: dict[str, list[StoredEvent]] = {}
    for event in stored:
        by_kind.setdefault(event.event.kind, []).append(event)
    known = by_kind.keys() & WIDTHS.keys()
    wanted = known | {LEADERS[kind] for kind in known if kind in LEADERS}
    newest = _newest_segments(session, stored[0].job_id, stored[0].attempt, wanted) if wanted else {}
    begun: dict[str, list[tuple[int, int]]] = {}  # by kind, segments of this batch with their first seq
    for kind in [*(kind for kind in by_kind if kind not in LEADERS), *(kind for kind in by_kind if kind in LEADERS)]:
        if kind not in WIDTHS:
            if kind in COLUMN_TYPES:
                _insert_chunks(session, by_kind[kind], 0)
            continue
        for run in _runs(by_kind[kind], newest, begun):
            _add(session, run, newest)


def read_steps(session: Session, job_id: str, kind: str, first_seq: int, last_seq: int) -> Steps:
    """Read the steps of a series whose events lie in a range of `seq` in which no segment or chunk begins or ends."""
    if kind in COLUMN_TYPES:
        query = select(EventChunk.body).where(EventChunk.job_id == job_id, EventChunk.kind == kind)
        query = query.where(EventChunk.last_seq.between(first_seq, last_seq)).order_by(EventChunk.last_seq)
        parts = [_steps_of(decode_columns(kind, body)) for body in session.scalars(query)]
    else:
        rows = select(EventRow.seq, EventRow.step, EventRow.at, EventRow.payload)
        rows = rows.where(EventRow.job_id == job_id, EventRow.kind == kind, EventRow.seq.between(first_seq, last_seq))
        parts = [_steps_of_rows(kind, list(session.execute(rows.order_by(EventRow.seq))))]
    return Steps(*(np.concatenate([getattr(part, name) for part in parts]) for name in Steps.__slots__))


def chunked_events(
    session: Session, job_id: str, kind: str, after: int, limit: int, last_seq: int | None = None
) -> list[LoggedEvent]:
    """Return at most `limit` events of one of `COLUMN_TYPES` with `seq > after`, up to `last_seq` if that is given."""
    query = (
        select(EventChunk.first_seq, EventChunk.attempt, EventChunk.body)
        .where(EventChunk.job_id == job_id, EventChunk.kind == kind, EventChunk.last_seq > after)
        .order_by(EventChunk.last_seq)
        .limit(limit)
        .execution_options(yield_per=_READ_CHUNKS)
    )
    found: list[LoggedEvent] = []
    with session.execute(query) as result:
        for first_seq, attempt, body in result:
            if len(found) >= limit or (last_seq is not None and first_seq > last_seq):
                break
            columns = decode_columns(kind, body)
            begin = int(np.searchsorted(columns.seqs, after, side="right"))
            end = begin + limit - len(found)
            if last_seq is not None:
                end = min(end, int(np.searchsorted(columns.seqs, last_seq, side="right")))
            found += columns.logged(attempt, slice(begin, end))
    return found


@dataclass(frozen=True, slots=True)
class _Run:
    """Consecutive events of one segment."""

    segment: int
    is_new: bool
    width: int
    events: list[StoredEvent]


def _newest_segments(session: Session, job_id: str, attempt: int, kinds: set[str]) -> dict[str, SeriesSegment]:
    query = (
        select(SeriesSegment)
        .where(SeriesSegment.job_id == job_id, SeriesSegment.kind.in_(kinds), SeriesSegment.attempt == attempt)
        .order_by(SeriesSegment.segment)
        .execution_options(populate_existing=True)
    )
    return {segment.kind: segment for segment in session.scalars(query)}


def _runs(
    events: list[StoredEvent], newest: dict[str, SeriesSegment], begun: dict[str, list[tuple[int, int]]]
) -> Iterator[_Run]:
    """Cut a kind's events where a segment begins; note in `begun` where."""
    kind = events[0].event.kind
    known = newest.get(kind)
    segment, last_step = (known.segment, known.last_step) if known else (-1, -1)
    width, leader = (known.num_columns if known else -1), LEADERS.get(kind)
    led_by = newest[leader].segment if leader in newest else 0
    starts = list(begun.get(leader, ())) if leader else []
    run: list[StoredEvent] = []
    is_new = False
    for event in events:
        step: int = event.event.step  # type: ignore[attr-defined]  # all these kinds have one
        its_width = WIDTHS[kind] or len(event.event.norms)  # type: ignore[attr-defined]  # only gradients have 0
        if leader:
            while starts and starts[0][1] < event.seq:
                led_by = max(led_by, starts.pop(0)[0])
            begins = led_by != segment
        else:
            led_by = segment + 1
            begins = step <= last_step or its_width != width or segment < 0
        if begins:
            if run:
                yield _Run(segment, is_new, width, run)
            segment, width, is_new, run = led_by, its_width, True, []
            begun.setdefault(kind, []).append((segment, event.seq))
        run.append(event)
        last_step = step
    yield _Run(segment, is_new, width, run)


def _add(session: Session, run: _Run, newest: dict[str, SeriesSegment]) -> None:
    """Store the events of one segment, and each row of `series_levels` that they complete."""
    first, last = run.events[0], run.events[-1]
    kind = first.event.kind
    steps = [event.event.step for event in run.events]  # type: ignore[attr-defined]  # all these kinds have one
    before = 0 if run.is_new else newest[kind].num_steps
    if kind in COLUMN_TYPES:
        _insert_chunks(session, run.events, before)
    key = {"job_id": first.job_id, "kind": kind, "attempt": first.attempt, "segment": run.segment}
    if run.is_new:
        segment = SeriesSegment(
            **key,
            num_columns=run.width,
            num_steps=0,
            first_step=min(steps),
            last_step=max(steps),
            first_seq=first.seq,
            last_seq=last.seq,
            open_seq=first.seq,
        )
    else:
        segment = newest[kind]
    segment.num_steps = before + len(steps)
    segment.first_step, segment.last_step = min(segment.first_step, *steps), max(segment.last_step, *steps)
    segment.last_seq = last.seq
    newest[kind] = segment
    session.add(segment)
    if before // BLOCK_STEPS < segment.num_steps // BLOCK_STEPS:
        _fold(session, segment, before // BLOCK_STEPS)
    session.flush()


def _insert_chunks(session: Session, events: list[StoredEvent], before: int) -> None:
    """Cut at multiples of `BLOCK_STEPS` from the segment's first step, of which `before` are stored already."""
    width = max(len(getattr(events[0].event, "norms", ())), 1)
    max_steps = min(BLOCK_STEPS, max(MAX_CHUNK_VALUES // width, 1))
    rows, begin = [], 0
    while begin < len(events):
        end = min(begin + max_steps, begin + BLOCK_STEPS - (before + begin) % BLOCK_STEPS, len(events))
        chunk = events[begin:end]
        rows.append(
            {
                "job_id": chunk[0].job_id,
                "kind": chunk[0].event.kind,
                "last_seq": chunk[-1].seq,
                "first_seq": chunk[0].seq,
                "attempt": chunk[0].attempt,
                "body": encode_columns(chunk),
            }
        )
        begin = end
    session.execute(insert(EventChunk), rows)


def _fold(session: Session, segment: SeriesSegment, number: int) -> None:
    """Write the rows of level 1 from `number` on, and those of higher levels that they complete."""
    steps = read_steps(session, segment.job_id, segment.kind, segment.open_seq, segment.last_seq)
    num_blocks = len(steps.seqs_N) // BLOCK_STEPS
    for block in range(num_blocks):
        of_block = steps.select(slice(block * BLOCK_STEPS, (block + 1) * BLOCK_STEPS))
        buckets = of_block.summary().merge(np.arange(0, BLOCK_STEPS, FACTOR))
        seqs = int(of_block.seqs_N[0]), int(of_block.seqs_N[-1])
        _insert_level(session, segment, 1, number + block, buckets, seqs)
    rest = num_blocks * BLOCK_STEPS
    segment.open_seq = int(steps.seqs_N[rest]) if rest < len(steps.seqs_N) else segment.last_seq + 1


def _insert_level(
    session: Session, segment: SeriesSegment, level: int, number: int, buckets: Summary, seqs: tuple[int, int]
) -> None:
    session.execute(
        insert(SeriesLevel).values(
            job_id=segment.job_id,
            kind=segment.kind,
            attempt=segment.attempt,
            segment=segment.segment,
            level=level,
            number=number,
            first_step=int(buckets.first_steps_B.min()),
            last_step=int(buckets.last_steps_B.max()),
            first_seq=seqs[0],
            last_seq=seqs[1],
            body=buckets.encode(precise=segment.kind != GradientsRecorded.kind),
        )
    )
    if (number + 1) % FACTOR:
        return
    rows = session.execute(
        select(SeriesLevel.first_seq, SeriesLevel.last_seq, SeriesLevel.body)
        .where(*level_rows(segment, level), SeriesLevel.number.between(number + 1 - FACTOR, number))
        .order_by(SeriesLevel.number)
    ).all()
    parts = [Summary.decode(row.body).merge(np.zeros(1, np.int64)) for row in rows]
    merged = Summary.concatenate(parts, segment.num_columns)
    _insert_level(session, segment, level + 1, number // FACTOR, merged, (rows[0].first_seq, rows[-1].last_seq))


def level_rows(segment: SeriesSegment, level: int) -> tuple[Any, ...]:
    """Return the SQL conditions for a segment's rows of one rollup level."""
    return (
        SeriesLevel.job_id == segment.job_id,
        SeriesLevel.kind == segment.kind,
        SeriesLevel.attempt == segment.attempt,
        SeriesLevel.segment == segment.segment,
        SeriesLevel.level == level,
    )


def _steps_of(columns: Columns) -> Steps:
    fields = columns.fields
    steps_N = fields["step"]
    if columns.kind != GradientsRecorded.kind:
        values_NL = np.stack([fields[name] for name in CURVES], axis=1)
        return Steps(columns.seqs, steps_N, columns.at_ms, values_NL, np.zeros(values_NL.shape, bool))
    values_NL = fields["norms"].matrix()
    anomalous_NL = np.zeros(values_NL.shape, bool)
    indices, layers = np.repeat(np.arange(len(steps_N)), fields["anomalous"].lengths), fields["anomalous"].items
    inside = (layers >= 0) & (layers < values_NL.shape[1])  # ranks are not trusted
    anomalous_NL[indices[inside], layers[inside]] = True
    return Steps(columns.seqs, steps_N, columns.at_ms, values_NL, anomalous_NL)


def _steps_of_rows(kind: str, rows: Sequence[Any]) -> Steps:
    values = [_values_of(decode_payload(kind, row.payload)) for row in rows]
    values_NL = np.array(values, np.float64).reshape(len(rows), WIDTHS[kind])
    at_ms_N = np.array([round(row.at.timestamp() * 1000) for row in rows], np.int64)
    seqs_N, steps_N = (np.array([getattr(row, name) for row in rows], np.int64) for name in ("seq", "step"))
    return Steps(seqs_N, steps_N, at_ms_N, values_NL, np.zeros(values_NL.shape, bool))


def _values_of(event: Any) -> list[float]:
    if isinstance(event, Validated):
        return [event.val_loss]
    assert isinstance(event, AnomaliesFound)  # there is no other series of single rows
    found: list[str] = [layer.anomaly for layer in event.layers]
    return [float(found.count(kind)) for kind in ANOMALY_KINDS]
