"""Commands of the job's policies, as the ranks see them: rank 0 reads the file, all ranks apply them at the same step.

That commands are pending rides on the one all-reduce that a step has anyway; only then are they broadcast.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from apt_jobs.jobs.spec import PolicyAction
from apt_jobs.training.byte_collectives import broadcast_bytes
from apt_jobs.training.ddp import Rank
from apt_jobs.training.progress import CheckpointEntry


@dataclass(slots=True)
class Adjustments:
    """What commands have changed for good; part of a checkpoint."""

    learning_rate_factor: float = 1.0
    skipped_steps: int = 0  # the batches of step N are those that N + `skipped_steps` would have had
    num_rollbacks: int = 0  # of this attempt

    def as_json(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the next attempt counts its own roll-backs."""
        return {**asdict(self), "num_rollbacks": 0}


@dataclass(frozen=True, slots=True)
class Command:
    """One command of a policy, with what rank 0 adds to it for all ranks."""

    action: PolicyAction
    incident: int
    began_step: int  # of the incident
    skip_steps: int
    factor: float  # of the learning rate
    checkpoint: str | None  # name of the newest checkpoint from before the incident

    @classmethod
    def from_json(cls, document: dict[str, Any], checkpoints: Sequence[CheckpointEntry]) -> "Command":
        """Read one entry of the commands' file."""
        before = [entry.name for entry in checkpoints if entry.step < document["began_step"]]
        return cls(
            action=document["action"],
            incident=document["incident"],
            began_step=document["began_step"],
            skip_steps=document["skip_steps"],
            factor=document["factor"],
            checkpoint=before[-1] if before else None,
        )


class Commands:
    """The commands of one attempt."""

    def __init__(self, path: Path, rank: Rank) -> None:
        self._path, self._rank = path, rank
        self._num_applied = 0

    def num_pending(self) -> int:
        """Return how many commands rank 0 sees that were not applied yet; 0 on other ranks."""
        return len(self._read()) - self._num_applied if self._rank.is_first and self._path.exists() else 0

    def pop(self, num_pending: int, checkpoints: Sequence[CheckpointEntry]) -> list[Command]:
        """Return the next commands, the same on every rank.

        All ranks take part (one broadcast), with what `num_pending` summed up to. Only rank 0's `checkpoints` count:
        it alone writes and removes them.
        """
        commands: list[Command] = []
        if self._rank.is_first:
            documents = self._read()[self._num_applied : self._num_applied + num_pending]
            commands = [Command.from_json(document, checkpoints) for document in documents]
        encoded = json.dumps([asdict(command) for command in commands]).encode()
        self._num_applied += num_pending
        return [Command(**fields) for fields in json.loads(broadcast_bytes(encoded, self._rank.device))]

    def _read(self) -> list[dict[str, Any]]:
        documents: list[dict[str, Any]] = json.loads(self._path.read_text())
        return documents
