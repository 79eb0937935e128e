"""What a fault campaign measured of each promise, for the table at the end of the run and `build/faults.jsonl`."""

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

OUTPUT = Path("build/faults.jsonl")
SHARE = float(os.environ.get("APT_JOBS_TEST_FAULTS", "0"))  # of the full number of trials
FULL = SHARE > 0


def count(small: int, full: int) -> int:
    """How many trials: few in `make test`, a share of the full number in `make faults`."""
    return max(small, math.ceil(SHARE * full))


@dataclass(slots=True)
class Campaign:
    """One promise under faults. `violations` says in words what broke it."""

    promise: int  # as docs/reliability.md numbers them
    what: str
    seed: int
    trials: int = 0
    faults: int = 0
    violations: list[str] = field(default_factory=list)
    slowest_recovery_s: float = 0.0

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
    OUTPUT.parent.mkdir(exist_ok=True)
    with OUTPUT.open("a") as file:
        file.write(json.dumps(asdict(running)) + "\n")
    assert running.violations == [], f"seed {running.seed}: {running.violations}"
