"""When a waiting job will start, by when the running ones end: an estimate, and pure.

Jobs are placed one after another in the order of the queue, each as early as it fits (list scheduling, Graham 1966).
What is placed later counts as taken from now on, but for jobs that fit at once beside what runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from apt_jobs.jobs.needs import Needs
from apt_jobs.jobs.packing import Held, Offer, Room


@dataclass(slots=True)
class Plan:
    """One worker: what its jobs hold, and for how many seconds from now (inf: nobody knows)."""

    offer: Offer
    running: list[tuple[float, Held]] = field(default_factory=list)
    planned: list[tuple[float, Held]] = field(default_factory=list)

    def place(self, needs: Needs) -> tuple[float, Held] | None:
        """Return in how many seconds such a job fits here, and what it holds then; None: nobody knows."""
        if (now := Room(self.offer, [held for _, held in self.running]).place(needs)) is not None:
            return 0.0, now
        taken = sorted([*self.running, *self.planned], key=lambda one: one[0])
        for number, (ends_in_s, _) in enumerate(taken):
            if ends_in_s == inf:
                return None
            if (held := Room(self.offer, [other for _, other in taken[number + 1 :]]).place(needs)) is not None:
                return ends_in_s, held
        return None


def starts_in_s(plans: Sequence[Plan], jobs: Sequence[Needs]) -> float | None:
    """Return in how many seconds the last of the jobs starts; None: nobody knows. Adds all of them to the plans."""
    starts_s: float | None = None
    for needs in jobs:
        found = [(placed, plan) for plan in plans if (placed := plan.place(needs)) is not None]
        if not found:
            starts_s = None
            continue  # it holds up nobody: what is behind it starts where it fits
        (starts_s, held), plan = min(found, key=lambda one: one[0][0])
        ends_in_s = inf if needs.time_limit_s is None else starts_s + needs.time_limit_s
        (plan.planned if starts_s else plan.running).append((ends_in_s, held))
    return starts_s
