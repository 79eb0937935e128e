"""Gangs: attempts that span nodes of a pool. Any free nodes that suit are taken with the claim, all of them or none.

A pool has no head: each training worker of the pool may lead an attempt, as its node 0. Claims of gangs are made one
after another for each pool, so that no two hold half of their nodes each. A share ends with its attempt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sqlalchemy import Select, delete, exists, func, insert, or_, select
from sqlalchemy.orm import Session

from apt_jobs.db.clock import now_plus
from apt_jobs.db.models import GangShare, WorkerRow
from apt_jobs.jobs.needs import Needs
from apt_jobs.jobs.packing import RoomReport


@dataclass(frozen=True, slots=True)
class Pool:
    """The nodes that a worker may lead."""

    name: str
    alive_within_s: float  # age of the heartbeat of a living node

    def num_nodes(self, session: Session) -> int:
        """Return how many living nodes there are, whatever they do."""
        return session.scalar(select(func.count()).select_from(self._nodes().subquery())) or 0

    def free_nodes(self, session: Session, needs: Needs) -> list[str]:
        """Return the nodes that such a job can have now, by name. One that failed an attempt lately is left out."""
        is_busy = exists().where(GangShare.worker == WorkerRow.name)
        is_paused = WorkerRow.paused_until_at > now_plus(0)
        query = self._nodes().where(~is_busy, or_(WorkerRow.paused_until_at.is_(None), ~is_paused))
        own = replace(needs, num_nodes=1)
        return [row.name for row in session.scalars(query.order_by(WorkerRow.name)) if _suits(row, own)]

    def has_nodes(self, session: Session, needs: Needs) -> bool:
        """Return whether a gang of this size can be made now, its leader aside."""
        return len(self.free_nodes(session, needs)) >= needs.num_nodes - 1

    def lock(self, session: Session) -> None:
        """Let no other gang of the pool be claimed until the transaction ends. Call it before a job's row is locked."""
        if session.get_bind().dialect.name == "postgresql":  # on SQLite one writes at a time
            session.execute(select(func.pg_advisory_xact_lock(func.hashtext(f"pool {self.name}"))))

    def pick(self, session: Session, needs: Needs) -> list[str] | None:
        """Return the further nodes of a gang, in the order of their ranks; None: there are too few."""
        if needs.num_nodes == 1:
            return []
        found = self.free_nodes(session, needs)[: needs.num_nodes - 1]
        return found if len(found) == needs.num_nodes - 1 else None

    def _nodes(self) -> Select[WorkerRow]:
        return select(WorkerRow).where(
            WorkerRow.kind == "node",
            WorkerRow.pool == self.name,
            WorkerRow.heartbeat_at > now_plus(-self.alive_within_s),
            WorkerRow.drain_requested_at.is_(None),
        )


def join_gang(session: Session, job_id: str, attempt: int, nodes: Sequence[str]) -> None:
    """Give each of the nodes its share of a claimed attempt: ranks from 1."""
    rows = [
        {"worker": name, "job_id": job_id, "attempt": attempt, "node_rank": rank} for rank, name in enumerate(nodes, 1)
    ]
    if rows:
        session.execute(insert(GangShare), rows)


def gang_of(session: Session, job_id: str, attempt: int) -> list[str]:
    """Return the further nodes of an attempt in the order of their ranks; empty: it has none of a pool."""
    query = select(GangShare.worker).where(GangShare.job_id == job_id, GangShare.attempt == attempt)
    return list(session.scalars(query.order_by(GangShare.node_rank)))


def share_of(session: Session, worker: str) -> GangShare | None:
    """Return the share that a node has to do now."""
    return session.scalars(select(GangShare).where(GangShare.worker == worker)).one_or_none()


def release_gang(session: Session, job_id: str) -> None:
    """Free the nodes of a job whose attempt ended."""
    session.execute(delete(GangShare).where(GangShare.job_id == job_id).execution_options(synchronize_session=False))


def _suits(row: WorkerRow, needs: Needs) -> bool:
    return row.room is not None and RoomReport.of_document(row.room).room(row.gpus).place(needs) is not None
