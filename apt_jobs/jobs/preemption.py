"""Which running jobs yield to a waiting one of higher priority. Pure: `db/preemptions.py` asks, and writes the answer.

A victim that cannot save in time loses what it trained since its last checkpoint, so those with the youngest ones yield
first. It ends: only a lower priority yields, not before it has run for a while, and not more often than `max_times` (in
Slurm's words: PreemptExemptTime, GraceTime).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from apt_jobs.jobs.needs import Needs
from apt_jobs.jobs.packing import Held, Offer, Room
from apt_jobs.settings import Settings


@dataclass(frozen=True, slots=True)
class PreemptionRules:
    """The settings that decide. The defaults are those of `Settings`."""

    is_on: bool = True
    exempt_s: float = 30.0  # that an attempt runs in any case
    max_times: int = 10  # that one job yields
    grace_s: float = 120.0  # to save, of a job that names none


def preemption_rules(settings: Settings) -> PreemptionRules:
    """Return the rules of a process's settings."""
    return PreemptionRules(
        is_on=settings.preemption,
        exempt_s=settings.preemption_exempt_s,
        max_times=settings.max_preemptions,
        grace_s=settings.drain_timeout_s,
    )


def choose_victims(
    offer: Offer, held: Mapping[str, Held], needs: Needs, lost_s: Mapping[str, float]
) -> tuple[str, ...] | None:
    """Return the jobs of a worker whose end makes room, with the least work lost; None: no such jobs.

    Args:
        offer: of the worker.
        held: what each of its jobs holds, by id.
        needs: of the waiting job.
        lost_s: seconds of work that each job would lose at most, of those that may be chosen.
    """

    def makes_room(gone: Collection[str]) -> bool:
        left = tuple(share for job_id, share in held.items() if job_id not in gone)
        return Room(offer, left).place(needs) is not None

    order = sorted(lost_s, key=lambda job_id: (lost_s[job_id], job_id))
    if not makes_room(order):
        return None
    chosen: list[str] = []
    while not makes_room(chosen):
        chosen.append(order[len(chosen)])
    for job_id in reversed(chosen):  # some of those before it may be too small to matter
        without = [other for other in chosen if other != job_id]
        if makes_room(without):
            chosen = without
    alone = next((job_id for job_id in order if makes_room([job_id])), None)
    if alone is not None and lost_s[alone] <= sum(lost_s[job_id] for job_id in chosen):
        return (alone,)
    return tuple(chosen)
