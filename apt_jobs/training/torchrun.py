"""What torchrun tells a process of its place, through the environment. A rank reads it before it loads torch."""

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Place:
    """A process among the others of the attempt, and among those of its node."""

    rank: int
    world_size: int
    local_rank: int


def own_place() -> Place:
    """Of this process.

    Raises:
        KeyError: torchrun did not start it.
    """
    return Place(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"]))
