"""Preemption: running jobs save and yield their room to a waiting job of higher priority that no free room serves.

Every web process looks; the write is compare-and-set. Who keeps room for the waiting job on the worker (`reserved_by`)
preempts for it, so that it is done once, and nothing behind it takes the room. The victim's supervisor finds
`preempted_by` in its row with its next write. The job is queued again, and no fault is counted.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import case, func, or_, select, update
from sqlalchemy.orm import Session

from apt_jobs.db.clock import now_plus
from apt_jobs.db.gangs import Pool
from apt_jobs.db.models import Checkpoint, HandBack, Job, QueueRow, WorkerRow
from apt_jobs.db.placements import RESERVATION_S, different_needs
from apt_jobs.db.queues import num_running
from apt_jobs.db.workers import list_workers
from apt_jobs.jobs.needs import Needs, decode_needs
from apt_jobs.jobs.packing import Held, Room, RoomReport
from apt_jobs.jobs.preemption import PreemptionRules, choose_victims
from apt_jobs.jobs.states import OWNED_STATES, JobState

DUE_FOR_S = 1.0  # a worker with free room claims a job sooner
MAX_HEADS = 20  # waiting jobs of one look, the first ones
MAX_WORKERS = 50  # that are compared for one of them, those with the youngest checkpoint of any job


@dataclass(frozen=True, slots=True)
class Preemption:
    """A waiting job, the worker that makes room for it, and the attempts that yield."""

    job_id: str
    worker: str
    victims: tuple[tuple[str, int], ...]  # (job id, attempt)
    lost_s: float  # seconds of work, if nothing is saved


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A running job that may yield."""

    attempt: int
    priority: int
    lost_s: float


@dataclass(frozen=True, slots=True)
class _Worker:
    row: WorkerRow
    room: Room
    held: Mapping[str, Held]  # by job


def plan_preemptions(session: Session, rules: PreemptionRules, alive_within_s: float) -> list[Preemption]:
    """Return what has to yield now. Reads only; without a waiting job of higher priority it costs a few rows."""
    lowest = session.scalar(select(func.min(Job.priority)).where(*_may_yield(rules)))
    if not rules.is_on or lowest is None:
        return []
    alive = WorkerRow.heartbeat_at > now_plus(-alive_within_s)
    served = session.scalars(select(WorkerRow.queues).where(alive, WorkerRow.room.is_not(None)))
    queues = sorted({queue for names in served for queue in names})
    heads = [head for queue in queues for head in _heads(session, queue, lowest)]
    if not heads:
        return []
    heads.sort(key=lambda head: (-head.priority, head.created_at, head.id))
    return _Look(session, rules, alive_within_s).plan(heads[:MAX_HEADS])


def request_preemption(session: Session, plan: Preemption, rules: PreemptionRules) -> bool:
    """Ask the victims of one plan to save and yield; whether this process was the first to."""
    is_free = or_(Job.reserved_by.is_(None), Job.reserved_by == plan.worker, Job.reserved_until <= now_plus(0))
    waits = select(Job.id).where(Job.id == plan.job_id, Job.state == JobState.QUEUED, Job.holds == 0, is_free)
    if session.scalar(waits.with_for_update()) is None or yielding_to(session, [plan.job_id]):  # asked under the lock
        return False
    specs = session.scalars(select(Job.spec).where(Job.id.in_([job_id for job_id, _ in plan.victims])))
    longest_s = max([spec.get("grace_period_s") or rules.grace_s for spec in specs], default=rules.grace_s)
    session.execute(
        update(Job)
        .where(Job.id == plan.job_id)
        .values(reserved_by=plan.worker, reserved_until=now_plus(longest_s + RESERVATION_S))
        .execution_options(synchronize_session=False)
    )
    for job_id, attempt in sorted(plan.victims):
        session.execute(
            update(Job)
            .where(Job.id == job_id, Job.attempt == attempt, *_may_yield(rules))
            .values(
                preempted_by=plan.job_id,
                num_preemptions=Job.num_preemptions + 1,
                reason=f"preempted by {plan.job_id}: it saves and leaves",
            )
            .execution_options(synchronize_session=False)
        )
    return True


def yielding_to(session: Session, job_ids: Collection[str]) -> dict[str, list[str]]:
    """Return the running jobs that save and leave for each of the jobs: `{job_id: [victim, ...]}`."""
    query = select(Job.preempted_by, Job.id).where(Job.state.in_(OWNED_STATES), Job.preempted_by.in_(job_ids))
    found: dict[str, list[str]] = {}
    for job_id, victim in session.execute(query.order_by(Job.id)):
        found.setdefault(str(job_id), []).append(victim)
    return found


class _Look:
    """What there is to know of running jobs and their workers, for one look."""

    def __init__(self, session: Session, rules: PreemptionRules, alive_within_s: float) -> None:
        self._session, self._alive_within_s = session, alive_within_s
        self._candidates = _candidates(session, rules)
        owned = select(Job.id, Job.preempted_by).where(Job.state.in_(OWNED_STATES), Job.kind == "train")
        self._yields_to: dict[str, str | None] = dict(session.execute(owned).all())
        self._workers = []
        for row in _claiming_workers(session, alive_within_s):
            report = RoomReport.of_document(row.room or {})
            self._workers.append(_Worker(row, report.room(row.gpus), dict(report.jobs)))

    def plan(self, heads: Sequence[Any]) -> list[Preemption]:
        """Plan for the jobs in their order. What yields to one does not yield to another."""
        found, served = [], {job_id for job_id in self._yields_to.values() if job_id is not None}
        kept_off = _kept_off(self._session, [head.id for head in heads])
        for head in heads:
            if head.id in served or not self._may_run(head.queue):
                continue
            workers = [
                one
                for one in self._workers
                if head.queue in one.row.queues
                and (head.id, one.row.name) not in kept_off
                and head.reserved_by in (None, one.row.name)
            ]
            if (plan := self._cheapest(head, workers)) is not None:
                found.append(plan)
                for job_id, _ in plan.victims:
                    del self._candidates[job_id]
        return found

    def _may_run(self, queue: str) -> bool:
        row = self._session.get(QueueRow, queue)
        if row is None:
            return True
        is_open = row.max_running is None or num_running(self._session, queue) < row.max_running
        return row.paused_at is None and is_open

    def _cheapest(self, head: Any, workers: Sequence[_Worker]) -> Preemption | None:
        """Return the plan with the least work lost; None: there is room already, or soon, or nothing may yield."""
        needs = decode_needs(head.needs)
        suitable = [one for one in workers if one.room.lacks(needs) is None and self._has_nodes(one.row, needs)]
        if any(self._without_ending(one).place(needs) is not None for one in suitable):
            return None
        choices: list[tuple[_Worker, dict[str, float]]] = []
        for one in suitable:
            may_yield = {
                job_id: found.lost_s
                for job_id in one.held
                if (found := self._candidates.get(job_id)) is not None and found.priority < head.priority
            }
            if may_yield:
                choices.append((one, may_yield))
        choices.sort(key=lambda choice: min(choice[1].values()))
        plans = []
        for one, may_yield in choices[:MAX_WORKERS]:
            if victims := choose_victims(one.room.offer, one.held, needs, may_yield):
                attempts = tuple((job_id, self._candidates[job_id].attempt) for job_id in victims)
                lost_s = sum(may_yield[job_id] for job_id in victims)
                plans.append(Preemption(head.id, one.row.name, attempts, lost_s))
        return min(plans, key=lambda plan: (plan.lost_s, plan.worker), default=None)

    def _has_nodes(self, row: WorkerRow, needs: Needs) -> bool:
        """Return whether the pool has the further nodes of such a job: only its leader's room is made free for it."""
        if row.pool is None or needs.num_nodes == 1:
            return True
        return Pool(row.pool, self._alive_within_s).has_nodes(self._session, needs)

    def _without_ending(self, one: _Worker) -> Room:
        """Return the room of a worker without jobs that have ended: their processes go soon."""
        return Room(one.room.offer, tuple(held for job_id, held in one.held.items() if job_id in self._yields_to))


def _may_yield(rules: PreemptionRules) -> list[Any]:
    return [
        Job.state == JobState.RUNNING,
        Job.kind == "train",
        Job.is_preemptible,
        Job.preempted_by.is_(None),
        Job.cancel_requested_at.is_(None),
        Job.num_preemptions < rules.max_times,
        Job.claimed_at <= now_plus(-rules.exempt_s),
    ]


def _heads(session: Session, queue: str, lowest: int) -> list[Any]:
    """Return the first job of each needs that waits above a running one. One read if the queue has none."""
    waiting = (
        select(Job.id, Job.queue, Job.priority, Job.created_at, Job.needs)
        .add_columns(case((Job.reserved_until > now_plus(0), Job.reserved_by)).label("reserved_by"))
        .where(
            Job.queue == queue,
            Job.state == JobState.QUEUED,
            Job.holds == 0,
            Job.kind == "train",
            Job.priority > lowest,
            Job.not_before_at <= now_plus(-DUE_FOR_S),
        )
        .order_by(Job.priority.desc(), Job.created_at, Job.id)
        .limit(1)
    )
    if session.execute(waiting).one_or_none() is None:
        return []
    firsts = [
        session.execute(waiting.where(Job.needs == needs)).one_or_none() for needs in different_needs(session, queue)
    ]
    return [row for row in firsts if row is not None]


def _candidates(session: Session, rules: PreemptionRules) -> dict[str, _Candidate]:
    saved_at = select(func.max(Checkpoint.created_at)).where(Checkpoint.job_id == Job.id).scalar_subquery()
    query = select(Job.id, Job.attempt, Job.priority, Job.claimed_at, saved_at, now_plus(0)).where(*_may_yield(rules))
    found = {}
    for job_id, attempt, priority, began_at, saved, now in session.execute(query):
        assert began_at is not None  # it runs
        lost_s = (now - max(began_at, saved or began_at)).total_seconds()
        found[job_id] = _Candidate(attempt, priority, max(0.0, lost_s))
    return found


def _claiming_workers(session: Session, alive_within_s: float) -> list[WorkerRow]:
    """Return the living workers that pack jobs and claim now."""
    paused = set(
        session.scalars(
            select(WorkerRow.name).where(
                or_(WorkerRow.drain_requested_at.is_not(None), WorkerRow.paused_until_at > now_plus(0))
            )
        )
    )
    return [
        row
        for row in list_workers(session, alive_within_s)
        if row.kind == "train" and row.room is not None and row.name not in paused
    ]


def _kept_off(session: Session, job_ids: Sequence[str]) -> set[tuple[str, str]]:
    query = select(HandBack.job_id, HandBack.worker).where(
        HandBack.job_id.in_(job_ids), HandBack.until_at > now_plus(0)
    )
    return {(job_id, worker) for job_id, worker in session.execute(query)}
