"""One row of the table, and how a ratio of noisy times is taken."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """`ratio` = `ours` / `peer`, both in `unit`, measured in turns in one run."""

    name: str  # group/what
    ours: float
    peer: float
    peer_name: str
    ratio: float
    unit: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def paired_row(name: str, ours: Sequence[float], peer: Sequence[float], peer_name: str, unit: str) -> Row:
    """Return a row from measurements taken in turns: the ratio is the median of the pairs' ratios."""
    ratio = statistics.median(mine / other for mine, other in zip(ours, peer, strict=True))
    return Row(name, statistics.median(ours), statistics.median(peer), peer_name, ratio, unit)
