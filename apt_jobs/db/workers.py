"""The workers that are alive: each records itself every few seconds."""

import os
from dataclasses import dataclass
from typing import Any

from sqlalchemy import case, delete, false, func, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from apt_jobs.db.clock import now_plus
from apt_jobs.db.models import WorkerRow
from apt_jobs.errors import AlreadyRunning, NotFound


def record_worker(
    session: Session,
    *,
    name: str,
    kind: str,
    queues: list[str],
    hostname: str,
    pid: int,
    version: str,
    gpus: list[dict[str, Any]],
    current_job_id: str | None,
    entry_points: list[str] | None = None,
    warm_models: list[str] | None = None,
    room: dict[str, Any] | None = None,
    pool: str | None = None,
) -> bool:
    """Insert or refresh a worker's row; its heartbeat is now. True: somebody asked to drain it.

    Another pid is a new start, which nobody has asked to drain and which is not paused.

    Raises:
        AlreadyRunning: another process of this name was quicker to insert the row.
    """
    values: dict[str, Any] = {
        "kind": kind,
        "queues": queues,
        "hostname": hostname,
        "pid": pid,
        "version": version,
        "gpus": gpus,
        "entry_points": entry_points,
        "warm_models": warm_models,
        "current_job_id": current_job_id,
        "room": room,
        "pool": pool,
        "heartbeat_at": now_plus(0),
    }
    known = _update(session, name, values)
    if known is not None:
        return known.drain_requested_at is not None
    try:
        with session.begin_nested():
            session.add(WorkerRow(name=name, **values))
    except IntegrityError as exc:
        raise AlreadyRunning(f"a worker named {name!r} started at the same moment; choose another --name") from exc
    return False


def require_free_name(session: Session, name: str, hostname: str, alive_within_s: float) -> None:
    """Return if no other living process has this name. One that died on this machine does not count.

    Record the worker in the same transaction: of several that start at once one gets the name.

    Raises:
        AlreadyRunning: another worker has it.
    """
    if session.get_bind().dialect.name == "postgresql":  # on SQLite one writes at a time
        session.execute(select(func.pg_advisory_xact_lock(func.hashtext(name))))  # who comes second sees the first
    for row in list_workers(session, alive_within_s):
        if row.name == name and not (row.hostname == hostname and _has_ended(row.pid)):
            raise AlreadyRunning(
                f"a worker named {name!r} runs on {row.hostname} (process {row.pid}); choose another --name, or wait "
                f"{alive_within_s:.0f} s if it is gone"
            )


def set_drained(session: Session, name: str, *, drained: bool) -> WorkerRow:
    """Ask a worker to hand back its jobs and to claim no other, or to claim again. It hears of it with its heartbeat.

    Raises:
        NotFound: no worker has this name.
    """
    row = session.get(WorkerRow, name, with_for_update=True)
    if row is None:
        raise NotFound(f"no worker {name!r}")
    if not drained:
        row.drain_requested_at = None
    elif row.drain_requested_at is None:
        row.drain_requested_at = now_plus(0)
    session.flush()
    session.refresh(row)
    return row


def is_held_back(session: Session, name: str) -> bool:
    """Return whether this worker may claim nothing now: somebody drained it, or it is paused. An unknown one may."""
    query = select(WorkerRow.name).where(
        WorkerRow.name == name, or_(WorkerRow.drain_requested_at.is_not(None), WorkerRow.paused_until_at > now_plus(0))
    )
    return session.scalar(query) is not None


def has_handed_back(session: Session, name: str) -> bool:
    """Return whether the last job that this worker claimed was handed back."""
    query = select(WorkerRow.name).where(WorkerRow.name == name, WorkerRow.num_hand_backs > 0)
    return session.scalar(query) is not None


def pause_worker(session: Session, name: str, reason: str, for_s: float) -> None:
    """Let a worker claim nothing for so long, because of what it lacks. Its row says why."""
    session.execute(
        update(WorkerRow)
        .where(WorkerRow.name == name)
        .values(paused_until_at=now_plus(for_s), paused_reason=reason)
        .execution_options(synchronize_session=False)
    )


def pause_of(session: Session, name: str) -> str | None:
    """Return why the worker is paused now; None: it is not."""
    return paused_workers(session, name).get(name)


def paused_workers(session: Session, name: str | None = None) -> dict[str, str]:
    """Return why each worker that is paused now is: `{name: reason}`; only of one worker if `name` is given."""
    query = select(WorkerRow.name, WorkerRow.paused_reason).where(WorkerRow.paused_until_at > now_plus(0))
    if name is not None:
        query = query.where(WorkerRow.name == name)
    return {worker: reason or "paused" for worker, reason in session.execute(query)}


def list_workers(session: Session, alive_within_s: float | None = None) -> list[WorkerRow]:
    """Return all workers by name, or only those that were heard of in the last `alive_within_s` seconds."""
    query = select(WorkerRow).order_by(WorkerRow.name)
    if alive_within_s is not None:
        query = query.where(WorkerRow.heartbeat_at > now_plus(-alive_within_s))
    return list(session.scalars(query))


@dataclass(frozen=True, slots=True)
class SeenWorker:
    """A worker's row, and what the database's clock says of it."""

    row: WorkerRow
    is_alive: bool
    is_paused: bool


def seen_workers(session: Session, alive_within_s: float) -> list[SeenWorker]:
    """Return all workers by name, with whether they were heard of in the last `alive_within_s` seconds."""
    is_alive = WorkerRow.heartbeat_at > now_plus(-alive_within_s)
    is_paused = func.coalesce(WorkerRow.paused_until_at > now_plus(0), false())
    query = select(WorkerRow, is_alive, is_paused).order_by(WorkerRow.name)
    return [SeenWorker(row, bool(alive), bool(paused)) for row, alive, paused in session.execute(query)]


def warm_models(session: Session, alive_within_s: float) -> set[str]:
    """Return the ids of models that living workers have in memory, or behind them."""
    return {model_id for worker in list_workers(session, alive_within_s) for model_id in worker.warm_models or ()}


def node_name(head: str, node_rank: int) -> str:
    """Name under which a further node of the worker `head` records itself."""
    return f"{head}/node-{node_rank}"


def remove_worker(session: Session, name: str) -> None:
    """Forget a worker; no error if it is not known."""
    session.execute(delete(WorkerRow).where(WorkerRow.name == name).execution_options(synchronize_session=False))


def _update(session: Session, name: str, values: dict[str, Any]) -> WorkerRow | None:
    is_same = WorkerRow.pid == values["pid"]
    return session.scalars(
        update(WorkerRow)
        .where(WorkerRow.name == name)
        .values(
            **values,
            started_at=case((is_same, WorkerRow.started_at), else_=now_plus(0)),
            drain_requested_at=case((is_same, WorkerRow.drain_requested_at), else_=None),
            num_hand_backs=case((is_same, WorkerRow.num_hand_backs), else_=0),
            paused_until_at=case((is_same, WorkerRow.paused_until_at), else_=None),
            paused_reason=case((is_same, WorkerRow.paused_reason), else_=None),
        )
        .returning(WorkerRow)
        .execution_options(synchronize_session=False, populate_existing=True)
    ).one_or_none()


def _has_ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return pid == os.getpid()  # a container started again: the same pid, this very process
