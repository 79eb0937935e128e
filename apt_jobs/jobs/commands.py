"""Commands of a job's policies to its ranks: the file `commands.json` of a run folder.

The supervisor replaces the file as a whole whenever there is a new command; rank 0 reads it. It holds all commands of
the attempt, in the order in which they were given, so that readers remember no more than how many they have applied.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from apt_jobs.jobs.monitor_options import PolicyAction


@dataclass(frozen=True, slots=True)
class RankCommand:
    """What a policy wants the ranks to do about an incident."""

    action: PolicyAction
    incident: int
    began_step: int  # of the incident
    skip_steps: int
    factor: float  # of the learning rate
    reason: str


_COMMANDS = TypeAdapter(list[RankCommand])


def write_commands(path: Path, commands: Sequence[RankCommand]) -> None:
    """Replace the file, which a reader sees whole.

    Raises:
        OSError: the disk does not take it; the file is as it was.
    """
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(_COMMANDS.dump_json(list(commands)))
    temporary.replace(path)


def read_commands(path: Path) -> list[RankCommand]:
    """Return all commands of the attempt so far."""
    try:
        return _COMMANDS.validate_json(path.read_bytes())
    except FileNotFoundError:
        return []
