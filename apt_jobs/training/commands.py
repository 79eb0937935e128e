"""Commands of the job's policies, as the ranks see them: rank 0 reads the file, all ranks apply them at the same step.

That commands are pending rides on the one all-reduce that a step has anyway; only then are they broadcast.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from apt_jobs.jobs.checkpoint_state import CheckpointEntry
from apt_jobs.jobs.commands import RankCommand, read_commands
from apt_jobs.jobs.monitor_options import PolicyAction
from apt_jobs.training.byte_collectives import broadcast_bytes
from apt_jobs.training.ddp import Rank


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
    def of(cls, command: RankCommand, checkpoints: Sequence[CheckpointEntry]) -> "Command":
        """Add to a policy's command the checkpoint that it may need."""
        before = [entry.name for entry in checkpoints if entry.step < command.began_step]
        return cls(
            action=command.action,
            incident=command.incident,
            began_step=command.began_step,
            skip_steps=command.skip_steps,
            factor=command.factor,
            checkpoint=before[-1] if before else None,
        )


_COMMANDS = TypeAdapter(list[Command])


class Commands:
    """The commands of one attempt."""

    def __init__(self, path: Path, rank: Rank) -> None:
        self._path, self._rank = path, rank
        self._num_applied = 0

    def num_pending(self) -> int:
        """Return how many commands rank 0 sees that were not applied yet; 0 on other ranks."""
        return len(read_commands(self._path)) - self._num_applied if self._rank.is_first else 0

    def pop(self, num_pending: int, checkpoints: Sequence[CheckpointEntry]) -> list[Command]:
        """Return the next commands, the same on every rank.

        All ranks take part (one broadcast), with what `num_pending` summed up to. Only rank 0's `checkpoints` count:
        it alone writes and removes them.
        """
        commands: list[Command] = []
        if self._rank.is_first:
            given = read_commands(self._path)[self._num_applied : self._num_applied + num_pending]
            commands = [Command.of(command, checkpoints) for command in given]
        self._num_applied += num_pending
        return _COMMANDS.validate_json(broadcast_bytes(_COMMANDS.dump_json(commands), self._rank.device))
