"""What retention reads and removes in the database. A page of ended jobs at a time, the oldest first."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import orjson
from sqlalchemy import and_, delete, func, or_, select, update
from sqlalchemy.orm import Session

from apt_jobs.db.checkpoints import best_of_job, newest_of_job
from apt_jobs.db.clock import now_plus
from apt_jobs.db.engine import Database
from apt_jobs.db.events import append_service_event
from apt_jobs.db.models import ApiKey, BrowserSession, Checkpoint, EventRow, GangShare, Job, LoginToken, WorkerRow
from apt_jobs.db.retention_needs import Needed, needed_now
from apt_jobs.events.kinds import CheckpointRemoved, LineLogged
from apt_jobs.jobs.states import TERMINAL_STATES

PAGE = 500
LINES_AT_ONCE = 2_000
KEPT_LEVELS = ("warning", "error")


@dataclass(frozen=True, slots=True)
class EndedJob:
    """What a rule looks at."""

    id: str
    finished_at: datetime
    labels: Mapping[str, str]
    num_events: int
    num_bytes: int  # of its checkpoints


def database_now(session: Session) -> datetime:
    """Return the time by the database's clock."""
    now: datetime = session.scalars(select(now_plus(0))).one()
    return now


def ended_jobs(database: Database, after: datetime | None = None) -> Iterator[EndedJob]:
    """Yield all ended jobs, the oldest first, or those that ended after an instant; each page is a transaction."""
    place: tuple[datetime, str] | None = None
    while True:
        query = select(Job.id, Job.finished_at, Job.labels, Job.last_seq).where(Job.finished_at.is_not(None))
        if place is not None:
            beyond = and_(Job.finished_at == place[0], Job.id > place[1])
            query = query.where(Job.finished_at >= place[0], or_(Job.finished_at > place[0], beyond))
        elif after is not None:
            query = query.where(Job.finished_at > after)
        with database.read() as session:
            rows = session.execute(query.order_by(Job.finished_at, Job.id).limit(PAGE)).all()
            sizes = _bytes_of(session, [row.id for row in rows])
        for row in rows:
            yield EndedJob(row.id, row.finished_at, row.labels, row.last_seq, sizes.get(row.id, 0))
        if len(rows) < PAGE:
            return
        place = rows[-1].finished_at, rows[-1].id


def bytes_of_ended(session: Session) -> int:
    """Return the bytes of all checkpoints of ended jobs."""
    query = select(func.sum(Checkpoint.size_bytes)).join(Job, Job.id == Checkpoint.job_id)
    return int(session.scalar(query.where(Job.state.in_(TERMINAL_STATES))) or 0)


def remove_jobs(session: Session, ids: Sequence[str], standing: Needed) -> tuple[list[str], dict[str, str]]:
    """Remove those of the jobs that are still ended and not needed, with all of their rows.

    Whoever submits a job locks the checkpoint that it names (`hold_checkpoint`): with the rows locked here, what is
    needed is looked up after those submissions, and before all later ones.

    Returns:
        The ids that were removed, whose files are the caller's, and why each of the others stays.
    """
    ended = select(Job.id).where(Job.id.in_(ids), Job.state.in_(TERMINAL_STATES)).order_by(Job.id)
    locked = list(session.scalars(ended.with_for_update(skip_locked=True)))
    checkpoints = select(Checkpoint.id).where(Checkpoint.job_id.in_(locked)).order_by(Checkpoint.id)
    session.execute(checkpoints.with_for_update()).all()
    needed = needed_now(session).merged_with(standing).jobs
    found = [job_id for job_id in locked if job_id not in needed]
    session.execute(delete(Job).where(Job.id.in_(found)).execution_options(synchronize_session=False))
    return found, {job_id: needed.get(job_id, "it changed meanwhile") for job_id in ids if job_id not in found}


def superfluous_checkpoints(session: Session, job_ids: Sequence[str], needed: Needed) -> dict[str, list[Checkpoint]]:
    """Return, by job, the checkpoints but for the best one, or the last, and but for what is needed."""
    several = (
        select(Checkpoint.job_id)
        .join(Job, Job.id == Checkpoint.job_id)
        .where(Checkpoint.job_id.in_(job_ids), Job.state.in_(TERMINAL_STATES))
        .group_by(Checkpoint.job_id)
        .having(func.count() > 1)
    )
    found: dict[str, list[Checkpoint]] = {}
    for job_id in list(session.scalars(several)):
        if job_id in needed.with_all_checkpoints:
            continue
        best = best_of_job(session, job_id)
        kept = best if best is not None and best.val_loss is not None else newest_of_job(session, job_id)
        rows = session.scalars(select(Checkpoint).where(Checkpoint.job_id == job_id))
        extra = [row for row in rows if row.id not in needed.checkpoints and (kept is None or row.id != kept.id)]
        if extra:
            found[job_id] = extra
    return found


def remove_checkpoints(session: Session, job_id: str, standing: Needed) -> list[Checkpoint]:
    """Remove the superfluous checkpoints of a job that is still ended, and say so in its log; not their files."""
    job = select(Job.id).where(Job.id == job_id, Job.state.in_(TERMINAL_STATES)).with_for_update()
    if session.scalar(job) is None:
        return []
    session.execute(select(Checkpoint.id).where(Checkpoint.job_id == job_id).with_for_update()).all()
    needed = needed_now(session).merged_with(standing)
    rows = superfluous_checkpoints(session, [job_id], needed).get(job_id, [])
    ids = [row.id for row in rows]
    session.execute(delete(Checkpoint).where(Checkpoint.id.in_(ids)).execution_options(synchronize_session=False))
    for checkpoint_id in ids:
        append_service_event(session, job_id, CheckpointRemoved(checkpoint_id, "removed by retention"))
    return rows


def empty_log(database: Database, job_id: str) -> int:
    """Empty the text of a job's log lines but for warnings and errors; returns how many. Events keep their `seq`."""
    num_emptied, after = 0, 0
    while True:
        query = select(EventRow.seq, EventRow.payload).where(
            EventRow.job_id == job_id, EventRow.kind == LineLogged.kind, EventRow.seq > after
        )
        with database.write() as session:
            rows = session.execute(query.order_by(EventRow.seq).limit(LINES_AT_ONCE)).all()
            for row in rows:
                line = orjson.loads(row.payload)
                if line["level"] not in KEPT_LEVELS and line["message"]:
                    emptied = update(EventRow).where(EventRow.job_id == job_id, EventRow.seq == row.seq)
                    session.execute(
                        emptied.values(payload=orjson.dumps({**line, "message": ""})),
                        execution_options={"synchronize_session": False},
                    )
                    num_emptied += 1
        if len(rows) < LINES_AT_ONCE:
            return num_emptied
        after = rows[-1].seq


def forget_workers(session: Session, days: float) -> int:
    """Remove the rows of workers that were not heard of for so long, and that take part in nothing."""
    query = delete(WorkerRow).where(
        WorkerRow.heartbeat_at < now_plus(-days * 86_400.0), WorkerRow.name.not_in(select(GangShare.worker))
    )
    return _count(session.scalars(query.returning(WorkerRow.name), execution_options={"synchronize_session": False}))


def forget_keys(session: Session, days: float) -> int:
    """Remove keys that were revoked or expired so long ago."""
    limit = now_plus(-days * 86_400.0)
    query = delete(ApiKey).where(or_(ApiKey.revoked_at < limit, ApiKey.expires_at < limit)).returning(ApiKey.id)
    return _count(session.scalars(query, execution_options={"synchronize_session": False}))


def forget_expired(session: Session) -> int:
    """Remove browser sessions and login links that are over: nobody can use them any more."""
    num_removed = 0
    for table in (BrowserSession, LoginToken):
        query = delete(table).where(table.expires_at < now_plus(0)).returning(table.token_sha256)
        num_removed += _count(session.scalars(query, execution_options={"synchronize_session": False}))
    return num_removed


def known_jobs(session: Session, ids: Sequence[str]) -> set[str]:
    """Return those of the ids that are of a job."""
    return set(session.scalars(select(Job.id).where(Job.id.in_(ids))))


def known_checkpoints(session: Session, job_id: str) -> set[str] | None:
    """Return the folders of the registered checkpoints of a job that has ended; None: it has not."""
    ended = session.scalar(select(Job.finished_at).where(Job.id == job_id, Job.state.in_(TERMINAL_STATES)))
    if ended is None:
        return None
    return set(session.scalars(select(Checkpoint.filename).where(Checkpoint.job_id == job_id)))


def older_than(now: datetime, days: float) -> Callable[[EndedJob], bool]:
    """Return whether a job ended more than `days` ago, as a function; infinite: never."""
    if math.isinf(days):
        return lambda _: False
    limit = now - timedelta(days=days)
    return lambda job: job.finished_at < limit


def _bytes_of(session: Session, job_ids: Sequence[str]) -> dict[str, int]:
    query = select(Checkpoint.job_id, func.sum(Checkpoint.size_bytes)).where(Checkpoint.job_id.in_(job_ids))
    return {job_id: int(size) for job_id, size in session.execute(query.group_by(Checkpoint.job_id))}


def _count(rows: Iterator[object]) -> int:
    return sum(1 for _ in rows)
