"""Claim a job that fits beside those that a worker runs: the first of the queue that does, and none is starved.

Jobs with the same `needs` fit the same workers, so that one look reads the first due job of each needs, whatever waits
behind it. A job that fits nowhere for `reserve_after_s`, or that others are preempted for (`db/preemptions.py`),
reserves room on one worker: jobs behind it start there only if their time limit ends before enough of the running ones
have ended. The claim itself is that of `db/jobs.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import CTE, Select, exists, func, or_, select, update
from sqlalchemy.orm import Session

from apt_jobs.db.clock import now_plus
from apt_jobs.db.gangs import Pool, join_gang
from apt_jobs.db.jobs import Claimed, claim, due_jobs
from apt_jobs.db.models import HandBack, Job
from apt_jobs.db.queues import may_claim
from apt_jobs.db.workers import has_handed_back, is_held_back
from apt_jobs.jobs.needs import Needs, decode_needs
from apt_jobs.jobs.packing import Room
from apt_jobs.jobs.states import JobState

MAX_DIFFERENT_NEEDS = 200  # of a queue, that one look reads
RESERVATION_S = 30.0  # a worker that looks no more loses it
RENEW_BELOW_S = 20.0


@dataclass(frozen=True, slots=True)
class Packing:
    """How a worker chooses."""

    worker: str
    kind: str
    room: Room
    now_s: float  # on the worker's monotonic clock, as `Held.ends_by_s`
    reserve_after_s: float
    pool: Pool | None = None  # whose nodes it may lead

    def fits(self, session: Session, needs: Needs) -> bool:
        """Return whether such a job can start here now, with as many nodes of the pool as it wants."""
        if self.room.place(needs) is None:
            return False
        return needs.num_nodes == 1 or self.pool is None or self.pool.has_nodes(session, needs)


@dataclass(frozen=True, slots=True)
class Choice:
    """What a worker would do now."""

    startable: list[tuple[str, str]]  # (queue, needs) of jobs that fit, the first one first
    kept_for: str | None = None  # job that room is kept for here
    to_reserve: str | None = None  # the same, if it is not noted yet for long enough


@dataclass(frozen=True, slots=True)
class _Head:
    """The first due job of some needs."""

    job_id: str
    queue: str
    text: str
    needs: Needs
    place: tuple[int, int, datetime, str]  # queues in the order of the worker, then as claims go
    is_overdue: bool
    reserved_by: str | None  # now
    is_renewed: bool

    @property
    def priority(self) -> int:
        return -self.place[1]

    def is_kept_room_by(self, worker: str) -> bool:
        """Return whether the worker keeps room for it: it waited long, or others yield to it there."""
        return self.reserved_by == worker or (self.is_overdue and self.reserved_by is None)


def choose(session: Session, queues: Sequence[str], packing: Packing, *, untried_only: bool = False) -> Choice:
    """Choose what starts next on a worker. Reads only."""
    room, startable, blocker = packing.room, [], None
    opens_by_s: float | None = None
    for head in _in_order(_heads(session, queues, packing, untried_only), packing.worker):
        if packing.fits(session, head.needs):
            if blocker is None or _ends_in_time(head.needs, packing.now_s, opens_by_s):
                startable.append((head.queue, head.text))
        elif blocker is None and head.is_kept_room_by(packing.worker):
            blocker, opens_by_s = head, room.place_opens_by_s(head.needs)
    to_renew = blocker is not None and not (blocker.reserved_by == packing.worker and blocker.is_renewed)
    kept_for = None if blocker is None else blocker.job_id
    return Choice(startable, kept_for, kept_for if to_renew else None)


def claim_fitting(session: Session, queues: Sequence[str], packing: Packing, lease_s: float) -> Claimed | None:
    """Claim the first job that fits, and keep room for one that waited too long.

    None: nothing fits, or as `claim_next`.
    """
    if is_held_back(session, packing.worker):
        return None
    open_queues = [queue for queue in queues if may_claim(session, queue)]
    choice = None
    if has_handed_back(session, packing.worker):  # a job that it may be able to run comes first, whatever the priority
        choice = choose(session, open_queues, packing, untried_only=True)
    if choice is None or not choice.startable:
        choice = choose(session, open_queues, packing)
    claimed = _claim_first(session, choice, packing, lease_s)
    if choice.to_reserve is not None:
        _reserve(session, choice.to_reserve, packing.worker)
    return claimed


def _claim_first(session: Session, choice: Choice, packing: Packing, lease_s: float) -> Claimed | None:
    if packing.pool is not None and any(decode_needs(needs).num_nodes > 1 for _, needs in choice.startable):
        packing.pool.lock(session)
    for is_waiting in (False, True):  # who steers a job locks its row for a moment: wait, if there is no other
        for queue, needs in choice.startable:
            found = _first_of(queue, needs, packing)
            if (job_id := session.scalar(found.with_for_update(skip_locked=not is_waiting))) is None:
                continue
            nodes = [] if packing.pool is None else packing.pool.pick(session, decode_needs(needs))
            if nodes is None:
                continue
            if (claimed := claim(session, job_id, packing.worker, lease_s)) is not None:
                join_gang(session, job_id, claimed.job.attempt, nodes)
                return claimed
    return None


def _reserve(session: Session, job_id: str, worker: str) -> None:
    """Keep room for the job on this worker, unless another one does. Waits for no lock: there is another look soon."""
    is_free = or_(Job.reserved_by.is_(None), Job.reserved_by == worker, Job.reserved_until <= now_plus(0))
    query = select(Job.id).where(Job.id == job_id, Job.state == JobState.QUEUED, is_free)
    if session.scalar(query.with_for_update(skip_locked=True)) is None:
        return
    session.execute(
        update(Job)
        .where(Job.id == job_id, Job.state == JobState.QUEUED, is_free)
        .values(reserved_by=worker, reserved_until=now_plus(RESERVATION_S))
        .execution_options(synchronize_session=False)
    )


def _ends_in_time(needs: Needs, now_s: float, opens_by_s: float | None) -> bool:
    return needs.time_limit_s is not None and opens_by_s is not None and now_s + needs.time_limit_s <= opens_by_s


def _heads(session: Session, queues: Sequence[str], packing: Packing, untried_only: bool) -> list[_Head]:
    found = []
    for number, queue in enumerate(queues):
        for row in _first_rows(session, queue, packing, untried_only):
            needs = decode_needs(row.needs)
            if packing.room.lacks(needs) is None:
                found.append(_head_of(row, number, queue, row.needs, needs))
    return found


def _first_rows(session: Session, queue: str, packing: Packing, untried_only: bool) -> list[Any]:
    """Read the first due job of each needs of the queue: one statement, however many needs there are.

    Where there are too many needs, the first job of the queue in any case.
    """
    due: Select[Any] = due_jobs(queue, packing.worker, packing.kind)
    if untried_only:
        due = due.where(~exists().where(HandBack.job_id == Job.id, HandBack.worker == packing.worker))
    due = due.order_by(Job.priority.desc(), Job.created_at, Job.id).limit(1)
    waiting = _waiting_needs(queue)
    first = due.where(Job.needs == waiting.c.needs).correlate(waiting).scalar_subquery()
    firsts = select(first.label("id")).where(waiting.c.needs.is_not(None)).limit(MAX_DIFFERENT_NEEDS).subquery()
    rows = list(session.execute(_head_columns(packing).select_from(firsts).outerjoin(Job, Job.id == firsts.c.id)))
    if len(rows) == MAX_DIFFERENT_NEEDS:
        rows += session.execute(_head_columns(packing).where(Job.id == due.correlate(None).scalar_subquery()))
    return list({row.id: row for row in rows if row.id is not None}.values())


def _head_columns(packing: Packing) -> Any:
    return select(
        Job.id,
        Job.needs,
        Job.priority,
        Job.created_at,
        (Job.not_before_at <= now_plus(-packing.reserve_after_s)).label("is_overdue"),
        Job.reserved_by,
        (Job.reserved_until > now_plus(0)).label("is_reserved"),
        (Job.reserved_until > now_plus(RENEW_BELOW_S)).label("is_renewed"),
    )


def _in_order(heads: list[_Head], worker: str) -> list[_Head]:
    """Sort as claims go; but a job that the worker keeps room for goes before all of lower priority in any queue."""
    ordered = sorted(heads, key=lambda head: head.place)
    for kept in [head for head in ordered if head.reserved_by == worker]:
        before = [head for head in ordered if head.place < kept.place and head.priority >= kept.priority]
        ordered = [*before, kept, *(head for head in ordered if head is not kept and head not in before)]
    return ordered


def _head_of(row: Any, number: int, queue: str, needs_text: str, needs: Needs) -> _Head:
    return _Head(
        job_id=row.id,
        queue=queue,
        text=needs_text,
        needs=needs,
        place=(number, -row.priority, row.created_at, row.id),
        is_overdue=bool(row.is_overdue),
        reserved_by=row.reserved_by if row.is_reserved else None,
        is_renewed=bool(row.is_renewed),
    )


def _first_of(queue: str, needs_text: str, packing: Packing) -> Select[Any]:
    """Select the id of the first due job of the queue with these needs: highest priority, then oldest."""
    due: Select[Any] = due_jobs(queue, packing.worker, packing.kind).where(Job.needs == needs_text)
    return due.order_by(Job.priority.desc(), Job.created_at, Job.id).limit(1)


def different_needs(session: Session, queue: str) -> list[str]:
    """Return the different needs of the jobs that wait in a queue; at most `MAX_DIFFERENT_NEEDS`."""
    needs = _waiting_needs(queue).c.needs
    return list(session.scalars(select(needs).where(needs.is_not(None)).limit(MAX_DIFFERENT_NEEDS)))


def _waiting_needs(queue: str) -> CTE:
    """Select the different needs of a queue, and NULL. Steps from one to the next in `ix_jobs_needs`, not over jobs."""
    is_free = (Job.queue == queue, Job.state == JobState.QUEUED, Job.holds == 0)
    smallest = select(func.min(Job.needs).label("needs")).where(*is_free)
    waiting = smallest.cte("waiting", recursive=True)
    following = smallest.where(Job.needs > waiting.c.needs).correlate(waiting).scalar_subquery()
    return waiting.union_all(select(following).where(waiting.c.needs.is_not(None)))
