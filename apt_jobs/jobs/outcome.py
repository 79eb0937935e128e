"""How the ranks of an attempt ended: a file of the run folder, written by rank 0 as its last act.

Without it the training broke.
"""

from enum import StrEnum
from pathlib import Path


class Outcome(StrEnum):
    """What rank 0 reports."""

    FINISHED = "finished"  # all steps are done
    STOPPED = "stopped"  # it was asked to save and stop, and did


def write_outcome(path: Path, outcome: Outcome) -> None:
    """Report the outcome.

    Raises:
        OSError: the disk does not take it.
    """
    path.write_text(outcome)


def read_outcome(path: Path) -> Outcome | None:
    """Return what rank 0 reported; None: nothing, or a word that is no outcome."""
    try:
        return Outcome(path.read_text().strip())
    except (FileNotFoundError, ValueError):
        return None
