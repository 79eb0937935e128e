"""The workers that are alive: each records itself every few seconds."""

from typing import Any

from sqlalchemy import case, delete, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from apt_jobs.db.clock import now_plus
from apt_jobs.db.models import WorkerRow


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
) -> None:
    """Insert or refresh a worker's row; its heartbeat is now. Another pid is a new start."""
    values: dict[str, Any] = {
        "kind": kind,
        "queues": queues,
        "hostname": hostname,
        "pid": pid,
        "version": version,
        "gpus": gpus,
        "current_job_id": current_job_id,
        "heartbeat_at": now_plus(0),
    }
    if _update(session, name, values):
        return
    try:
        with session.begin_nested():
            session.add(WorkerRow(name=name, **values))
    except IntegrityError:  # another process of the same name was quicker
        _update(session, name, values)


def list_workers(session: Session, alive_within_s: float | None = None) -> list[WorkerRow]:
    """All workers by name, or only those that were heard of in the last `alive_within_s` seconds."""
    query = select(WorkerRow).order_by(WorkerRow.name)
    if alive_within_s is not None:
        query = query.where(WorkerRow.heartbeat_at > now_plus(-alive_within_s))
    return list(session.scalars(query))


def node_name(head: str, node_rank: int) -> str:
    """Name under which a further node of the worker `head` records itself."""
    return f"{head}/node-{node_rank}"


def remove_worker(session: Session, name: str) -> None:
    """Forget a worker; no error if it is not known."""
    session.execute(delete(WorkerRow).where(WorkerRow.name == name).execution_options(synchronize_session=False))


def _update(session: Session, name: str, values: dict[str, Any]) -> bool:
    known = session.execute(
        update(WorkerRow)
        .where(WorkerRow.name == name)
        .values(**values, started_at=case((WorkerRow.pid == values["pid"], WorkerRow.started_at), else_=now_plus(0)))
        .returning(WorkerRow.name)
        .execution_options(synchronize_session=False)
    )
    return known.scalar() is not None
