"""The further machines of an allocation: nodes of a pool that its first one alone leads.

Each records itself as a node; the first takes all of them for the attempt as a claim takes those of any pool.
"""

import logging
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from apt_jobs.db.engine import Database
from apt_jobs.db.gangs import join_gang
from apt_jobs.db.hand_backs import hand_back
from apt_jobs.db.jobs import fence, owns
from apt_jobs.db.workers import list_workers
from apt_jobs.errors import Unavailable
from apt_jobs.jobs.retry import retry_rules
from apt_jobs.settings import Settings
from apt_jobs.workers.node import Node

logger = logging.getLogger(__name__)

JOIN_TIMEOUT_S = 120.0  # for the steps of an allocation to begin
POLL_S = 0.5


def num_nodes_of(environment: Mapping[str, str]) -> int:
    """Return how many machines the allocation has."""
    return int(environment.get("SLURM_NNODES", "1"))


def node_rank_of(environment: Mapping[str, str]) -> int:
    """Return which of them this one is; the supervisor is on 0."""
    return int(environment.get("SLURM_NODEID", "0"))


def node_names(pool: str, num_nodes: int) -> list[str]:
    """Return the names of the further nodes, in the order of their ranks."""
    return [f"{pool}-node-{rank}" for rank in range(1, num_nodes)]


def is_of_this_allocation(begun: Path) -> bool:
    """Wait until the first machine has begun; return whether it is one of this allocation."""
    deadline_s = time.monotonic() + JOIN_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if begun.exists() and (owner := begun.read_text()):
            return owner == os.environ.get("SLURM_JOB_ID", "")
        time.sleep(POLL_S)
    return False


def serve_node(settings: Settings, database: Database, attempt: tuple[str, int], pool: str, gpus: list[int]) -> None:
    """Do this machine's share of the attempt, until it is over."""
    name = node_names(pool, num_nodes_of(os.environ))[node_rank_of(os.environ) - 1]
    node = Node(settings, pool=pool, name=name, gpus=gpus, in_allocation=True)

    def stop_at_its_end() -> None:
        while True:
            time.sleep(settings.heartbeat_s)
            try:
                with database.read() as session:
                    if not owns(session, *attempt):
                        break
            except Unavailable as exc:
                logger.warning("cannot ask for the attempt", extra={"why": str(exc)})
        node.stop()

    threading.Thread(target=stop_at_its_end, name="end", daemon=True).start()
    node.run()


def take_nodes(settings: Settings, database: Database, attempt: tuple[str, int], pool: str) -> bool:
    """Take all further machines for the attempt, once they are there.

    Returns:
        False: they did not come, and the job was handed back.
    """
    names = node_names(pool, num_nodes_of(os.environ))
    deadline_s = time.monotonic() + JOIN_TIMEOUT_S
    while names:
        with database.read() as session:
            missing = set(names) - {row.name for row in list_workers(session)}
        if not missing:
            break
        if time.monotonic() > deadline_s:
            reason = f"{len(missing)} of {len(names)} further machines of the allocation did not begin"
            with database.write() as session:
                hand_back(session, *attempt, reason, retry_rules(settings))
            return False
        time.sleep(POLL_S)
    with database.write() as session:
        fence(session, *attempt, settings.lease_s)
        join_gang(session, *attempt, names)
    return True
