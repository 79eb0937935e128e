"""What the monitor finds: real trainings with real faults, judged by the project's detectors and by the rules of peers.

One set of runs (`benchmarks.faulty_training`, 2 gloo ranks) is replayed through every rule: the supervisor's own
`RankWatch` on the events of the spools, and the others on the same losses and norms. False alarms are counted on the
healthy steps; recall, delay and location on the branches with a fault.
"""

import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from apt_jobs.diagnosis.rank_watch import RankWatch
from apt_jobs.events.kinds import Event, GradientsRecorded, IncidentChanged, LineLogged, RankGradientsRecorded
from apt_jobs.events.spool import SpoolReader
from apt_jobs.jobs.spec import TrainSpec
from benchmarks.faults import Fault
from benchmarks.faulty_training import BRANCH_BEGINS, BRANCH_ENDS, BRANCH_LATE, HEALTHY_STEPS
from benchmarks.peer_rules import FixedThreshold, KillLossSpike, Rule, SixSigma, SpikeDetection
from benchmarks.rows import Row

NUM_RANKS = 2
REPORTED_SEEDS = range(10)  # thresholds were chosen on seeds from 100 on
LOCATED_WITHIN_STEPS = 10  # after the first alarm
QUIET_STEPS = 20  # a rule that is silent for so long and then speaks has raised another alarm
OURS = "ours"
PEERS: dict[str, type[Rule]] = {
    "fixed threshold": FixedThreshold,
    "Lightning SpikeDetection": SpikeDetection,
    "llm-foundry KillLossSpike": KillLossSpike,
    "OLMo 6 sigma": SixSigma,
}
Recorded = list[list[Event]]  # by rank: what it wrote during one step
Section = list[tuple[int, Recorded]]  # steps in a row
_NOW = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Found:
    """What a rule made of one fault. `delay` None: nothing. `is_located` None: the rule names no place."""

    fault: Fault
    delay: int | None
    is_located: bool | None
    kinds: tuple[str, ...] = ()

    @property
    def is_early(self) -> bool:
        """Whether the fault came while what is usual was still being learned."""
        return self.fault.step <= BRANCH_LATE


@dataclass
class Score:
    """One rule over all runs."""

    found: list[Found] = field(default_factory=list)
    num_healthy_steps: int = 0
    false_alarms: list[str] = field(default_factory=list)

    def of(self, kind: str, *, is_early: bool) -> "Score":
        """Return the part of the faults."""
        return Score([found for found in self.found if found.fault.kind == kind and found.is_early == is_early])

    @property
    def recall(self) -> float:
        return sum(found.delay is not None for found in self.found) / len(self.found)

    @property
    def false_alarms_per_1000(self) -> float:
        return 1000.0 * len(self.false_alarms) / self.num_healthy_steps

    @property
    def location(self) -> float:
        """The share of all faults that were found and named in the right place."""
        return sum(bool(found.is_located) for found in self.found) / len(self.found)

    @property
    def median_delay(self) -> float:
        """In steps, of the faults that were found: 0 is the step of the fault itself."""
        return statistics.median(found.delay for found in self.found if found.delay is not None)


def rows() -> Iterator[Row]:
    """`insight/recall`, `false-alarms` (per 1,000 healthy steps), `delay` (steps) and `location`."""
    with tempfile.TemporaryDirectory() as folder:
        record(Path(folder), REPORTED_SEEDS)
        scores = judge(Path(folder))
    print("\n".join(table(scores)))
    ours, peers = scores[OURS], {name: score for name, score in scores.items() if name != OURS}
    best = max(peers, key=lambda name: peers[name].recall)
    yield _row("insight/recall", ours.recall, peers[best].recall, best, "of all faults")
    calm = min(peers, key=lambda name: peers[name].false_alarms_per_1000)
    peer, unit = peers[calm].false_alarms_per_1000, "per 1,000 healthy steps"
    yield _row("insight/false-alarms", ours.false_alarms_per_1000, peer, calm, unit)
    yield _row("insight/delay", ours.median_delay, peers[best].median_delay, best, "steps, median")
    yield _row("insight/location", ours.location, 0.0, "none of the peers names a place", "of all faults")


def record(folder: Path, seeds: range) -> None:
    """Run the trainings."""
    command = [
        *(
            sys.executable,
            "-m",
            "apt_jobs.training.launch_ranks",
            f"--nproc-per-node={NUM_RANKS}",
            "--rdzv-backend=apt-jobs",
        ),
        *("--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", "-m", "benchmarks.faulty_training"),
        *(str(folder), str(seeds.start), str(len(seeds))),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, timeout=3600)


def judge(folder: Path) -> dict[str, Score]:
    """Replay all runs in `folder` through every rule."""
    scores = {name: Score() for name in (OURS, *PEERS)}
    for name, described in json.loads((folder / "faults.json").read_text()).items():
        faults = [Fault(**fault) for fault in described]
        spools = [_sections(folder / f"{name}.{rank}") for rank in range(NUM_RANKS)]
        sections = [_steps(of_ranks) for of_ranks in zip(*spools, strict=True)]
        for rule, score in scores.items():
            _judge_ours(score, faults, sections) if rule == OURS else _judge_peer(
                score, PEERS[rule](), faults, sections
            )
    return scores


def table(scores: dict[str, Score]) -> Iterator[str]:
    """Markdown: every rule, then ours by fault."""
    yield "| rule | recall | false alarms per 1,000 healthy steps | median delay, steps | location |"
    yield "|---|---|---|---|---|"
    for name, score in scores.items():
        place = f"{score.location:.3f}" if name == OURS else "names none"
        yield (
            f"| {name} | {score.recall:.3f} | {score.false_alarms_per_1000:.2f} | {score.median_delay:g} | {place} |"
        )
    yield ""
    yield f"| fault | runs | {' | '.join(scores)} | our median delay | our location |"
    yield "|---" * (len(scores) + 4) + "|"
    for is_early in (True, False):
        for kind in dict.fromkeys(found.fault.kind for found in scores[OURS].found):
            by_rule = {name: score.of(kind, is_early=is_early) for name, score in scores.items()}
            ours = by_rule[OURS]
            recalls = " | ".join(f"{score.recall:.2f}" for score in by_rule.values())
            delay = f"{ours.median_delay:g}" if ours.recall else "never"
            when = "early" if is_early else "late"
            yield f"| {kind}, {when} | {len(ours.found)} | {recalls} | {delay} | {ours.location:.2f} |"
    yield ""
    yield f"{scores[OURS].num_healthy_steps:,} healthy steps; ours: {', '.join(scores[OURS].false_alarms) or 'silent'}"


def _row(name: str, ours: float, peer: float, peer_name: str, unit: str) -> Row:
    return Row(name, ours, peer, peer_name, ours / peer if peer else 1.0 if ours == peer else float("inf"), unit)


def _sections(path: Path) -> list[list[Event]]:
    """Return the healthy parts of the training and, at odd indices, its branches (nothing between two of a kind)."""
    sections: list[list[Event]] = [[]]
    reader = SpoolReader(path)
    while events := list(reader.read()):
        for _, event in events:
            if isinstance(event, LineLogged) and event.source in (BRANCH_BEGINS, BRANCH_ENDS):
                sections.append([])
            else:
                sections[-1].append(event)
    return sections


def _steps(sections: Sequence[Iterable[Event]]) -> Section:
    """Return what all ranks wrote, by the step during which they wrote it."""
    by_step: dict[int, Recorded] = defaultdict(lambda: [[] for _ in sections])
    for rank, events in enumerate(sections):
        step = 0
        for event in events:
            if isinstance(event, GradientsRecorded | RankGradientsRecorded):
                step = event.step
            by_step[step][rank].append(event)
    return sorted(by_step.items())


def _judge_ours(score: Score, faults: list[Fault], sections: list[Section]) -> None:
    watch = _watch()
    score.num_healthy_steps += HEALTHY_STEPS
    for index, steps in enumerate(sections):
        if index % 2:
            score.found.append(_found(faults[index // 2], _incidents(copy.deepcopy(watch), steps)))
        else:
            alarms = _incidents(watch, steps)
            score.false_alarms += [f"{event.anomaly} at {step} ({event.message})" for step, event in alarms]


def _found(fault: Fault, incidents: Iterable[tuple[int, IncidentChanged]]) -> Found:
    begun = [(step, event) for step, event in incidents if step >= fault.step]
    if not begun:
        return Found(fault, None, None)
    first = begun[0][0]
    near = [event for step, event in begun if step <= first + LOCATED_WITHIN_STEPS]
    kinds = tuple(f"{event.anomaly}@{event.began_step - fault.step}:{event.group}:{event.ranks}" for event in near)
    return Found(fault, first - fault.step, is_located(fault, near), kinds)


def is_located(fault: Fault, incidents: Sequence[IncidentChanged]) -> bool:
    """Return whether the incidents name the fault's rank and layer, and nobody else's.

    A layer is named if it is the origin or the worst layer of an incident. A loss that is not finite has none. Of two
    ranks whose weights differ it cannot be known which is wrong: then both may be named, and the layer must be right.
    """
    distinguished = [incident for incident in incidents if not _is_undecided(incident)]
    ranks = {rank for incident in distinguished for rank in incident.ranks}
    if fault.rank is not None and ranks != {fault.rank} and (ranks or len(distinguished) == len(incidents)):
        return False
    if fault.rank is None and ranks:
        return False
    is_forward = any(event.anomaly in ("nan", "inf") and event.origin is None for event in incidents)
    if fault.layer is None or is_forward:
        return True
    named = {name for event in incidents for name in (event.origin, *event.layers[:1]) if name}
    return any(name.endswith(fault.layer) for name in named)


def _is_undecided(incident: IncidentChanged) -> bool:
    return incident.anomaly == "desync" and len(incident.ranks) == NUM_RANKS == 2


def _incidents(watch: RankWatch, steps: Section) -> Iterator[tuple[int, IncidentChanged]]:
    """Yield those that begin, and the step after which the supervisor can know."""
    for step, recorded in steps:
        for events in recorded:
            for event in events:
                for _, result in watch.add(_NOW, event):
                    if isinstance(result, IncidentChanged) and result.phase == "begun":
                        yield step, result


def _judge_peer(score: Score, rule: Rule, faults: list[Fault], sections: list[Section]) -> None:
    score.num_healthy_steps += HEALTHY_STEPS
    alarms: list[int] = []
    for index, steps in enumerate(sections):
        if index % 2:
            fault = faults[index // 2]
            late = [step for step in _alarms(copy.deepcopy(rule), steps) if step >= fault.step]
            score.found.append(Found(fault, late[0] - fault.step if late else None, None))
        else:
            alarms += _alarms(rule, steps)
    begins = [step for last, step in zip([-QUIET_STEPS, *alarms], alarms, strict=False) if step - last >= QUIET_STEPS]
    score.false_alarms += [f"step {step}" for step in begins]


def _alarms(rule: Rule, steps: Section) -> list[int]:
    """Return the steps on which the rule speaks."""
    alarms: list[int] = []
    for step, recorded in steps:
        events = [event for of_rank in recorded for event in of_rank]
        losses = [e.loss for e in events if isinstance(e, RankGradientsRecorded) and e.loss is not None]
        norms = next((event.norms for event in events if isinstance(event, GradientsRecorded)), None)
        if norms is not None and rule.is_alarm(losses, norms):
            alarms.append(step)
    return alarms


def _watch() -> RankWatch:
    return RankWatch(TrainSpec(kind="train", num_ranks=NUM_RANKS))
