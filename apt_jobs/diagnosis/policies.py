"""Decide what a job's policies (`monitor.on_anomaly`) do about incidents; the ranks or the supervisor apply it.

Commands to the ranks are collected in `Policies.commands`; the supervisor writes them to a file (`jobs/commands.py`)
that rank 0 reads, and all ranks apply them at the same step. A policy responds to an incident once, and at most
`max_times` in an attempt.
"""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from apt_jobs.events.kinds import ActionTaken, IncidentChanged
from apt_jobs.jobs.commands import RankCommand
from apt_jobs.jobs.monitor_options import AnomalyPolicy

OF_RANKS = frozenset({"checkpoint", "rollback", "skip_batches", "cut_lr"})  # the others concern the job


class Policies:
    """The policies of one attempt."""

    def __init__(self, policies: Sequence[AnomalyPolicy]) -> None:
        self._policies = policies
        self._responded: set[tuple[int, int]] = set()  # (policy, incident)
        self._num_times = [0] * len(policies)
        self.commands: list[RankCommand] = []  # to the ranks: all of the attempt so far

    def respond(self, step: int, incidents: Sequence[IncidentChanged]) -> Iterator[ActionTaken]:
        """Yield the actions that policies take about the incidents that are open after `step`."""
        for number, policy in enumerate(self._policies):
            for incident in incidents:
                key = (number, incident.incident)
                if key in self._responded or not _matches(policy, incident):
                    continue
                if self._num_times[number] >= policy.max_times:
                    continue
                self._responded.add(key)
                self._num_times[number] += 1
                if policy.action in OF_RANKS:
                    self.commands.append(_command(policy, incident))
                yield ActionTaken(step, "ordered", policy.action, incident.incident, _reason(incident))


def _command(policy: AnomalyPolicy, incident: IncidentChanged) -> RankCommand:
    return RankCommand(
        action=policy.action,
        incident=incident.incident,
        began_step=incident.began_step,
        skip_steps=policy.skip_steps,
        factor=policy.factor,
        reason=_reason(incident),
    )


def _matches(policy: AnomalyPolicy, incident: IncidentChanged) -> bool:
    if incident.anomaly not in policy.kinds or incident.num_steps < policy.patience_steps:
        return False
    return policy.layers is None or any(fnmatchcase(layer, policy.layers) for layer in incident.layers)


def _reason(incident: IncidentChanged) -> str:
    where = f" on rank {', '.join(map(str, incident.ranks))}" if incident.ranks else ""
    return f"{incident.anomaly} since step {incident.began_step} in {incident.group}{where}: {incident.message}"
