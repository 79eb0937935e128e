"""What fault campaigns measured of each promise: the table at the end of a run, and `build/faults.jsonl`.

`make faults` appends to that file, so that a campaign may be run in pieces; `python -m tests.faults.record` adds them
up to the table of docs/explanation/reliability.md.
"""

import json
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

OUTPUT = Path("build/faults.jsonl")
SHARE = float(os.environ.get("APT_JOBS_TEST_FAULTS", "0"))  # of the full number of trials
FULL = SHARE > 0
_COUNTING = threading.Lock()  # lanes of a campaign are threads


def count(small: int, full: int) -> int:
    """How many trials: few in `make test`, a share of the full number in `make faults`."""
    return max(1, math.ceil(SHARE * full)) if FULL else small


@dataclass(slots=True)
class Campaign:
    """One promise under faults. `violations` says in words what broke it."""

    promise: int  # as docs/explanation/reliability.md numbers them
    what: str
    seed: int = 0
    dialects: list[str] = field(default_factory=list)
    trials: int = 0
    faults: dict[str, int] = field(default_factory=dict)  # by kind
    violations: list[str] = field(default_factory=list)
    slowest_recovery_s: float = 0.0

    @property
    def num_faults(self) -> int:
        return sum(self.faults.values())

    def on(self, dialect: str) -> None:
        self.dialects.append(dialect)

    def tried(self) -> None:
        with _COUNTING:
            self.trials += 1

    def fault(self, kind: str) -> None:
        with _COUNTING:
            self.faults[kind] = self.faults.get(kind, 0) + 1

    def recovered(self, seconds: float) -> None:
        self.slowest_recovery_s = max(self.slowest_recovery_s, seconds)


RESULTS: list[Campaign] = []


@contextmanager
def campaign(promise: int, what: str, seed: int | None = None) -> Iterator[Campaign]:
    """Record a campaign and fail when it found a violation. The seed is printed with the table."""
    running = Campaign(promise, what, seed if seed is not None else time.time_ns() % 2**32)
    RESULTS.append(running)
    print(f"seed {running.seed}")
    yield running
    if FULL:
        OUTPUT.parent.mkdir(exist_ok=True)
        with OUTPUT.open("a") as file:
            file.write(json.dumps(asdict(running)) + "\n")
    assert running.violations == [], f"seed {running.seed}: {running.violations}"


def added_up(pieces: Iterable[Campaign]) -> list[Campaign]:
    """Pieces of one campaign as one, by promise."""
    sums: dict[tuple[int, str], Campaign] = {}
    for piece in pieces:
        total = sums.setdefault((piece.promise, piece.what), Campaign(piece.promise, piece.what))
        total.dialects = sorted({*total.dialects, *piece.dialects}, reverse=True)
        total.trials += piece.trials
        total.faults = dict(Counter(total.faults) + Counter(piece.faults))
        total.violations += piece.violations
        total.recovered(piece.slowest_recovery_s)
    return [sums[key] for key in sorted(sums)]


def as_rows(campaigns: Iterable[Campaign]) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield "| # | what was done | on | trials | faults | violations | slowest recovery |"
    yield "|---|---|---|---|---|---|---|"
    for one in campaigns:
        recovery = f"{one.slowest_recovery_s:.1f} s" if one.slowest_recovery_s else "-"  # not what was measured
        kinds = ", ".join(f"{number:,} {kind.replace('_', ' ')}" for kind, number in one.faults.items()) or "none"
        yield (
            f"| {one.promise} | {one.what} | {', '.join(one.dialects) or 'files'} | {one.trials:,} | {kinds} "
            f"| {len(one.violations)} | {recovery} |"
        )


if __name__ == "__main__":
    pieces = [Campaign(**json.loads(line)) for line in OUTPUT.read_text().splitlines()]
    print(*as_rows(added_up(pieces)), sep="\n")
