"""Turn the ranks' events into what is stored: joined steps, and incidents.

Each rank's own norms are a lot: of every step a summary is stored, of every tenth and of each on which an incident
begins all of them. The rest stays in the spools.
"""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from apt_jobs.diagnosis.anomalies import AnomalyDetector
from apt_jobs.diagnosis.incidents import IncidentLog
from apt_jobs.diagnosis.metric_limits import MetricLimits
from apt_jobs.diagnosis.policies import Policies
from apt_jobs.diagnosis.step_join import JoinedStep, NoiseScale, StepJoiner, summarize
from apt_jobs.events.kinds import (
    BackwardOrderSeen,
    Event,
    GradientsRecorded,
    IncidentChanged,
    LayersNamed,
    MetricsLogged,
    RankGradientsRecorded,
    UpdatesMeasured,
)
from apt_jobs.jobs.commands import RankCommand
from apt_jobs.jobs.spec import TrainSpec

MAX_OPEN_UPDATES = 32
Timed = tuple[datetime, Event]


class RankWatch:
    """Watch the ranks of one attempt. Events of all ranks come in the order in which they are read."""

    def __init__(self, spec: TrainSpec) -> None:
        options = spec.monitor
        self._num_ranks, self._store_every = spec.num_ranks, options.rank_norms_every_steps
        self._joiner = StepJoiner(self._num_ranks)
        self._noise = NoiseScale()
        self._detector = AnomalyDetector(options, self._num_ranks)
        self._incidents = IncidentLog(options.quiet_steps)
        self._policies = Policies(options.on_anomaly)
        self._updates: dict[int, list[UpdatesMeasured]] = {}
        self._num_rollbacks = 0
        self._metric_limits = MetricLimits()

    @property
    def commands(self) -> Sequence[RankCommand]:
        """Commands of the job's policies to the ranks: all of the attempt so far."""
        return self._policies.commands

    def add(self, at: datetime, event: Event) -> Iterator[Timed]:
        """Yield what is to be stored because of `event`, itself included."""
        match event:
            case RankGradientsRecorded():
                yield from self._joined(at, self._joiner.add(event))
                return
            case UpdatesMeasured():
                if event.rank == 0:
                    yield at, event
                yield from self._update(at, event)
                return
            case GradientsRecorded():
                yield at, event
                yield from self._joined(at, self._joiner.add(event))
                return
            case MetricsLogged():
                yield from ((at, kept) for kept in self._metric_limits.limited(event))
                return
            case LayersNamed():
                self._detector.name_layers(event.names)
            case BackwardOrderSeen():
                self._detector.order_layers(event.order)
        yield at, event

    def end(self) -> list[Timed]:
        """Judge what is left when the ranks have ended, and close every incident."""
        at = datetime.now(UTC)
        rest = list(self._joined(at, self._joiner.flush()))
        return rest + [(at, event) for event in self._incidents.end()]

    def _joined(self, at: datetime, steps: Iterator[JoinedStep]) -> Iterator[Timed]:
        for joined in steps:
            if joined.num_rollbacks > self._num_rollbacks:
                self._num_rollbacks = joined.num_rollbacks
                yield from ((at, event) for event in self._incidents.end())
            noise_scale = self._noise.add(joined)
            findings = self._detector.detect(joined)
            events = list(self._incidents.step(joined.step, at, findings, self._detector.num_layers))
            if self._num_ranks > 1:
                yield at, summarize(joined, self._num_ranks, noise_scale)
                if joined.step % self._store_every == 0 or _begins(events):
                    yield from ((at, record) for _, record in sorted(joined.ranks.items()))
            yield from ((at, event) for event in events)
            yield from self._responses(at, joined.step)

    def _update(self, at: datetime, event: UpdatesMeasured) -> Iterator[Timed]:
        of_step = self._updates.setdefault(event.step, [])
        of_step.append(event)
        if len(of_step) < self._num_ranks:
            if len(self._updates) > MAX_OPEN_UPDATES:
                del self._updates[min(self._updates)]
            return
        del self._updates[event.step]
        findings = self._detector.detect_in_updates(of_step)
        events = self._incidents.step(event.step, at, findings, self._detector.num_layers, closes=False)
        yield from ((at, change) for change in events)
        yield from self._responses(at, event.step)

    def _responses(self, at: datetime, step: int) -> Iterator[Timed]:
        for action in self._policies.respond(step, self._incidents.open()):
            yield at, action


def _begins(events: Sequence[IncidentChanged]) -> bool:
    return any(event.phase == "begun" for event in events)
