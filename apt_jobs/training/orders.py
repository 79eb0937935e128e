"""Orders of the job's policies, as the ranks see them: rank 0 looks at the file, all ranks obey at the same step.

That there is something to obey rides on the one all-reduce that a step has anyway; only then is it broadcast.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from apt_jobs.training.byte_collectives import broadcast_bytes
from apt_jobs.training.ddp import Rank


@dataclass(slots=True)
class Adjustments:
    """What orders have changed for good; part of a checkpoint."""

    learning_rate_factor: float = 1.0
    skipped_steps: int = 0  # the batches of step N are those that N + `skipped_steps` would have had
    num_rollbacks: int = 0  # of this attempt

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "num_rollbacks": 0}


class Orders:
    """The orders of one attempt."""

    def __init__(self, path: Path, rank: Rank) -> None:
        self._path, self._rank = path, rank
        self._num_obeyed = 0

    def num_waiting(self) -> int:
        """How many orders rank 0 sees that were not obeyed yet; 0 on other ranks."""
        return len(self._read()) - self._num_obeyed if self._rank.is_first and self._path.exists() else 0

    def take(self, num_waiting: int, checkpoints: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The next orders, the same on every rank. Called by every rank, with what `num_waiting` summed up to.

        To a roll-back rank 0 adds `checkpoint`: the name of the newest of `checkpoints` from before the incident.
        """
        orders: list[dict[str, Any]] = []
        if self._rank.is_first:
            orders = self._read()[self._num_obeyed : self._num_obeyed + num_waiting]
            for order in orders:
                before = [entry for entry in checkpoints if entry["step"] < order["began_step"]]
                order["checkpoint"] = before[-1]["name"] if before else None
        self._num_obeyed += num_waiting
        taken: list[dict[str, Any]] = json.loads(broadcast_bytes(json.dumps(orders).encode(), self._rank.device))
        return taken

    def _read(self) -> list[dict[str, Any]]:
        orders: list[dict[str, Any]] = json.loads(self._path.read_text())
        return orders
