"""Why a job waits, in words, for the view of one job and for lists. The same rules as a claim, read-only."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy import select
from sqlalchemy.orm import Session

from apt_jobs.db import holds
from apt_jobs.db.clock import now_plus
from apt_jobs.db.gangs import Pool
from apt_jobs.db.hand_backs import hand_backs_of
from apt_jobs.db.jobs import queue_position
from apt_jobs.db.models import Job, QueueRow, WorkerRow
from apt_jobs.db.parents import parents_of
from apt_jobs.db.preemptions import yielding_to
from apt_jobs.db.queues import first_waiting, num_running
from apt_jobs.db.workers import list_workers, paused_workers
from apt_jobs.jobs.needs import Needs, decode_needs
from apt_jobs.jobs.packing import RoomReport
from apt_jobs.jobs.states import OWNED_STATES, TERMINAL_STATES, JobState
from apt_jobs.operations.expected_start import expected_start_in_s

MAX_NAMED_WORKERS = 3
MAX_NAMED_PARENTS = 3
MAX_LISTED_START = 3  # in lists: of the first of each queue it is said when they start, if that is asked for
MAX_LISTED_POSITION = 100  # in lists: beyond it, it says that at least so many are ahead


@dataclass(frozen=True, slots=True)
class Waiting:
    """Where a job stands.

    `position` is None in a list when more than `MAX_LISTED_POSITION` jobs are ahead, and of a job that was claimed and
    that another scheduler has not started.
    """

    position: int | None
    reason: str
    expected_start_at: datetime | None = None  # in lists of few; None: nobody knows


def waiting_of(session: Session, job: Job, alive_within_s: float) -> Waiting | None:
    """Return where one job stands, with its exact position; None: it does not wait."""
    if (reason := _placed_elsewhere(session, [job]).get(job.id)) is not None:
        return Waiting(None, reason)
    if job.state != JobState.QUEUED:
        return None
    queues = _Queues(session, [job], alive_within_s)
    return queues.with_expected_start(job, queues.waiting(job, queue_position(session, job)))


def waiting_of_page(
    session: Session, jobs: Sequence[Job], alive_within_s: float, *, has_starts: bool = False
) -> dict[str, Waiting]:
    """Return where each waiting job of a page stands, by id. One statement for all places.

    `has_starts`: with the expected start of the first `MAX_LISTED_START` of each queue.
    """
    elsewhere = {job_id: Waiting(None, reason) for job_id, reason in _placed_elsewhere(session, jobs).items()}
    queued = [job for job in jobs if job.state == JobState.QUEUED]
    if not queued:
        return elsewhere
    queues = _Queues(session, queued, alive_within_s)
    places = first_waiting(session, [job.queue for job in queued], MAX_LISTED_POSITION)
    found = {job.id: queues.waiting(job, places.get(job.id)) for job in queued}
    if has_starts:
        first = [job for job in queued if (places.get(job.id) or MAX_LISTED_POSITION) <= MAX_LISTED_START]
        found |= {job.id: queues.with_expected_start(job, found[job.id]) for job in first}
    return elsewhere | found


class _Queues:
    """What there is to know of the queues of some jobs."""

    def __init__(self, session: Session, jobs: Sequence[Job], alive_within_s: float) -> None:
        self._session, self._alive_within_s = session, alive_within_s
        self._now: datetime = session.scalars(select(now_plus(0))).one()
        self._alive = list_workers(session, alive_within_s)
        self._pauses = paused_workers(session)
        self._yielding = yielding_to(session, [job.id for job in jobs])
        self._hand_backs = hand_backs_of(session, [job.id for job in jobs])
        names = {job.queue for job in jobs}
        self._rows = {row.name: row for row in session.scalars(select(QueueRow).where(QueueRow.name.in_(names)))}
        self._running: dict[str, int] = {}
        reports = {row.name: RoomReport.of_document(row.room) for row in self._alive if row.room is not None}
        self._kept_for = {name: report.kept_for for name, report in reports.items()}
        self._rooms = {row.name: reports[row.name].room(row.gpus) for row in self._alive if row.name in reports}

    def waiting(self, job: Job, position: int | None) -> Waiting:
        workers = self._workers_of(job)
        return Waiting(
            position, self._of_queue(job) or self._of_workers(job, workers) or self._of_order(job, position, workers)
        )

    def with_expected_start(self, job: Job, waiting: Waiting) -> Waiting:
        """Add when it will start, if only running jobs keep it from that and it is known when they end."""
        if self._of_queue(job) is not None or waiting.position is None:
            return waiting
        kept_off = self._hand_backs.get(job.id, {})
        workers = [
            row
            for row in self._workers_of(job)
            if row.name not in kept_off and self._why_held(row) is None and self._why_kept(row.name, job) is None
        ]
        in_s = expected_start_in_s(self._session, job, waiting.position, workers)
        if in_s is None:
            return waiting
        at = self._now + timedelta(seconds=in_s)
        words = f"expected to start at about {at.astimezone(UTC).strftime('%Y-%m-%d %H:%M UTC')}" if in_s else ""
        return Waiting(waiting.position, "; ".join(filter(None, [waiting.reason, words])), at)

    def _workers_of(self, job: Job) -> list[WorkerRow]:
        return [row for row in self._alive if job.queue in row.queues and row.kind == job.kind]

    def _of_queue(self, job: Job) -> str | None:
        row = self._rows.get(job.queue)
        if row is not None and row.paused_at is not None:
            return f"the queue {job.queue!r} is paused"
        if job.holds & holds.PARENTS:
            return self._of_parents(job)
        if job.holds & holds.SWEEP:
            return f"its sweep {job.sweep_id} runs as many jobs at once as it may"
        if job.not_before_at > self._now:
            until = job.not_before_at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
            return f"back-off until {until}" + (f": {job.reason}" if job.reason else "")
        if row is None or row.max_running is None:
            return None
        if job.queue not in self._running:
            self._running[job.queue] = num_running(self._session, job.queue)
        running = self._running[job.queue]
        if running < row.max_running:
            return None
        return f"the queue {job.queue!r} runs {running} of at most {row.max_running} jobs at once"

    def _of_parents(self, job: Job) -> str:
        open_parents = [one for one, _ in parents_of(self._session, job.id) if one.state not in TERMINAL_STATES]
        named = ", ".join(f"{one.id} ({one.state})" for one in open_parents[:MAX_NAMED_PARENTS])
        more = len(open_parents) - MAX_NAMED_PARENTS
        return f"comes after {named}" + (f" and {more} more" if more > 0 else "")

    def _of_workers(self, job: Job, workers: Sequence[WorkerRow]) -> str | None:
        if not workers:
            others = sum(job.queue in row.queues for row in self._alive)
            only = f" ({others} of another kind do)" if others else ""
            return (
                f"no {job.kind} worker serves the queue {job.queue!r}{only}; start one: "
                f"apt-jobs worker {job.kind} --queue {job.queue}"
            )
        lacking = self._lacking(job, workers)
        if all(row.name in lacking for row in workers):
            return "no worker can serve it: " + _named({row.name: lacking[row.name] for row in workers})
        held = {row.name: why for row in workers if (why := self._why_held(row)) is not None}
        if len(held) == len(workers):
            return f"no worker of the queue {job.queue!r} claims jobs now: " + _named(held)
        unable = held | {name: why for name, why in lacking.items() if name in {row.name for row in workers}}
        if len(unable) == len(workers):
            return "no worker can serve it now: " + _named(unable)
        return None

    def _why_held(self, row: WorkerRow) -> str | None:
        return "drained" if row.drain_requested_at is not None else self._pauses.get(row.name)

    def _lacking(self, job: Job, workers: Sequence[WorkerRow]) -> dict[str, str]:
        """Return what each worker lacks for the job, by what it offers or as it handed the job back."""
        needs = decode_needs(job.needs)
        never = {
            row.name: why
            for row in workers
            if (room := self._rooms.get(row.name)) is not None and (why := room.lacks(needs)) is not None
        }
        return self._hand_backs.get(job.id, {}) | never

    def _of_order(self, job: Job, position: int | None, workers: Sequence[WorkerRow]) -> str:
        state = self._of_room(job, workers)
        if job.reason is not None:  # why its last attempt ended
            state += f"; {job.reason}"
        if position is None:
            return f"behind at least {MAX_LISTED_POSITION} jobs; {state}"
        if position == 1:
            return f"next in the queue; {state}"
        return f"behind {position - 1:,} {'job' if position == 2 else 'jobs'}; {state}"

    def _of_room(self, job: Job, workers: Sequence[WorkerRow]) -> str:
        """Return what the workers do: for which of them the job is too large now, or how many are busy."""
        needs, full, num_busy = decode_needs(job.needs), {}, 0
        for row in workers:
            if (room := self._rooms.get(row.name)) is None:
                num_busy += row.current_job_id is not None
            elif (
                why := room.why_not_now(needs) or self._why_no_gang(row, needs) or self._why_kept(row.name, job)
            ) is not None:
                full[row.name] = why
        words = f"{num_busy + len(full)} of {len(workers)} workers of the queue {job.queue!r} are busy"
        if full:
            words += f" ({_named(full)})"
        if job.reserved_by is not None and job.reserved_until is not None and job.reserved_until > self._now:
            words += f"; {job.reserved_by} keeps room for it"
        if victims := self._yielding.get(job.id):
            words += f"; {_listed(victims)} {'saves and leaves' if len(victims) == 1 else 'save and leave'} for it"
        return words

    def _why_no_gang(self, row: WorkerRow, needs: Needs) -> str | None:
        if row.pool is None or needs.num_nodes == 1:
            return None
        free = len(Pool(row.pool, self._alive_within_s).free_nodes(self._session, needs))
        if free >= needs.num_nodes - 1:
            return None
        return f"{free} nodes of the pool {row.pool!r} are free and suit, the job takes {needs.num_nodes - 1} of them"

    def _why_kept(self, worker: str, job: Job) -> str | None:
        kept_for = self._kept_for.get(worker)
        return None if kept_for in (None, job.id) else f"room is kept for {kept_for}"


def _placed_elsewhere(session: Session, jobs: Sequence[Job]) -> dict[str, str]:
    """Return why claimed jobs have not started that another scheduler places, as their workers noted it."""
    owned = {job.id: job.lease_owner for job in jobs if job.state in OWNED_STATES}
    if not owned:
        return {}
    query = select(WorkerRow.name, WorkerRow.room).where(WorkerRow.name.in_(set(owned.values())))
    rooms = {name: room for name, room in session.execute(query) if room is not None}
    found: dict[str, str] = {}
    for name, room in rooms.items():
        for job_id, held in RoomReport.of_document(room).jobs:
            if held.waiting_for is not None and owned.get(job_id) == name:
                found[job_id] = held.waiting_for
    return found


def _listed(job_ids: Sequence[str]) -> str:
    more = len(job_ids) - MAX_NAMED_WORKERS
    return ", ".join(job_ids[:MAX_NAMED_WORKERS]) + (f" and {more} more" if more > 0 else "")


def _named(reasons: dict[str, str]) -> str:
    names = sorted(reasons)
    words = "; ".join(f"{name}: {reasons[name]}" for name in names[:MAX_NAMED_WORKERS])
    more = len(names) - MAX_NAMED_WORKERS
    return words + (f"; and {more} more" if more > 0 else "")
