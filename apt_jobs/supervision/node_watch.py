"""Whether the further nodes of an attempt still do their share.

A node that is lost while the ranks work breaks their connections, which they notice. One that is lost before they have
met, or after the work, would leave the head's ranks to wait for it until torchrun gives up.
"""

import logging
import time

from apt_jobs.db.engine import Database
from apt_jobs.db.workers import list_workers, node_name, pause_worker
from apt_jobs.errors import OutOfSpace, Unavailable
from apt_jobs.jobs.node_share import NodeShare, ShareState, read_share
from apt_jobs.jobs.run_file import RunFile

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
LEAVE_OUT_S = 120.0
JOIN_TIMEOUT_S = 60.0  # a node looks for work once a second


class NodeWatch:
    """Looks at the nodes of one attempt, from its head. Used by one thread."""

    def __init__(self, database: Database, run_file: RunFile, head: str, *, alive_within_s: float) -> None:
        """`alive_within_s`: a node whose last heartbeat is older counts as lost."""
        self._database, self._run_file, self._head = database, run_file, head
        self._alive_within_s = alive_within_s
        self._began_s = self._looked_s = time.monotonic()

    def lost(self) -> str | None:
        """Return why the attempt cannot go on; None: it can, or that is not known now. Looks once in `LOOK_EVERY_S`."""
        now_s = time.monotonic()
        if self._run_file.spec.num_nodes == 1 or now_s - self._looked_s < LOOK_EVERY_S:
            return None
        self._looked_s = now_s
        try:
            shares = {rank: read_share(self._run_file, rank) for rank in range(1, self._run_file.spec.num_nodes)}
            alive = self._alive()
        except (OSError, ValueError, Unavailable) as exc:
            logger.warning("cannot look after nodes", extra={"job_id": self._run_file.job_id, "why": str(exc)})
            return None
        for rank, share in shares.items():
            name = self._name_of(rank)
            if (why := self._why_lost(name, share, now_s, is_alive=name in alive)) is not None:
                if name != node_name(self._head, rank):  # it is of a pool, which has others
                    self._leave_out(name, why)
                return why
        return None

    def _why_lost(self, name: str, share: NodeShare | None, now_s: float, *, is_alive: bool) -> str | None:
        if share is not None and share.state is ShareState.ENDED_EARLY:
            return f"{name} ended early: {share.reason}"
        if (share is None or share.state is not ShareState.FINISHED) and not is_alive:
            return f"{name} is gone"
        if share is None and now_s - self._began_s > JOIN_TIMEOUT_S:
            return f"{name} did not join within {JOIN_TIMEOUT_S:.0f} s; does it see this data directory?"
        return None

    def _leave_out(self, name: str, why: str) -> None:
        """Let a node take part in nothing for a while: the next attempt takes others of the pool."""
        try:
            with self._database.write() as session:
                pause_worker(session, name, why, LEAVE_OUT_S)
        except (Unavailable, OutOfSpace) as exc:
            logger.warning("cannot leave a node out", extra={"node": name, "why": str(exc)})

    def _name_of(self, rank: int) -> str:
        names = self._run_file.node_names
        return names[rank - 1] if names else node_name(self._head, rank)

    def _alive(self) -> set[str]:
        """Return names of workers that were heard of lately."""
        with self._database.read() as session:
            return {row.name for row in list_workers(session, self._alive_within_s)}
