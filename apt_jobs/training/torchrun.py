"""What torchrun tells a process of its place, through the environment. A rank reads it before it loads torch."""

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RankInfo:
    """A process among the others of the attempt, and among those of its node."""

    rank: int
    world_size: int
    local_rank: int


def read_rank_info() -> RankInfo:
    """Return the place of this process among the ranks.

    Raises:
        KeyError: torchrun did not start it.
    """
    return RankInfo(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"]))
