"""The join of the ranks by step, the noise scale, and what of it all is stored."""

import math
import random
from collections import Counter
from datetime import UTC, datetime

import pytest

from apt_jobs.diagnosis.rank_watch import RankWatch
from apt_jobs.diagnosis.step_join import MAX_OPEN_STEPS, JoinedStep, NoiseScale, StepJoiner
from apt_jobs.events.kinds import (
    BackwardOrderSeen,
    Event,
    GradientsRecorded,
    IncidentChanged,
    LayersNamed,
    LineLogged,
    RankGradientsRecorded,
    RanksJoined,
    UpdatesMeasured,
)
from apt_jobs.jobs.spec import TrainSpec
from tests.unit.diagnosis.steps import record

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def watch_of(num_ranks: int) -> RankWatch:
    return RankWatch(TrainSpec(kind="train", num_ranks=num_ranks))


def stored(watch: RankWatch, *events: Event) -> list[Event]:
    return [result for event in events for _, result in watch.add(NOW, event)]


def test_ranks_that_are_read_one_after_another_are_joined_by_step() -> None:
    joiner = StepJoiner(2)
    for step in range(1, 6):
        assert list(joiner.add(GradientsRecorded(step, (1.0,), ()))) == []
        assert list(joiner.add(record(step, 0, (1.0,)))) == []
    given = [joined.step for step in range(1, 6) for joined in joiner.add(record(step, 1, (2.0,)))]
    assert given == [1, 2, 3, 4, 5]
    assert list(joiner.add(record(3, 1, (2.0,)))) == []
    assert list(joiner.flush()) == []


def test_a_rank_that_fell_silent_does_not_hold_the_others_up() -> None:
    joiner = StepJoiner(2)
    given = [joined.step for step in range(1, 301) for joined in joiner.add(GradientsRecorded(step, (1.0,), ()))]
    assert given == list(range(1, 301 - MAX_OPEN_STEPS))
    assert [joined.step for joined in joiner.flush()][-1] == 300


def test_the_noise_scale_is_that_of_the_samples() -> None:
    """Gradients of samples: a mean of length 1 and a noise of 50 in total, so that B_simple is 50."""
    rng, noise = random.Random(1), NoiseScale()
    dimensions, per_rank, num_ranks = 100, 8, 4
    estimate = None
    for step in range(1, 2001):
        ranks = [
            [(i == 0) + rng.gauss(0, math.sqrt(50 / dimensions / per_rank)) for i in range(dimensions)]
            for _ in range(num_ranks)
        ]
        mean = [sum(column) / num_ranks for column in zip(*ranks, strict=True)]
        joined = JoinedStep(step, GradientsRecorded(step, tuple(map(abs, mean)), ()))
        joined.ranks = {rank: record(step, rank, tuple(map(abs, values))) for rank, values in enumerate(ranks)}
        estimate = noise.add(joined)
    assert estimate == pytest.approx(50, rel=0.25)
    assert noise.add(JoinedStep(1)) is None


def test_a_summary_of_every_step_is_stored_and_all_norms_of_every_tenth() -> None:
    watch = watch_of(2)
    events: list[Event] = [LayersNamed(("a", "b")), BackwardOrderSeen(2, (1, 0))]
    for step in range(1, 21):
        events += [GradientsRecorded(step, (1.0, 1.0), ()), record(step, 0, (1.0, 1.0)), record(step, 1, (3.0, 4.0))]
    kept = stored(watch, *events)
    counts = Counter(type(event) for event in kept)
    assert counts == {
        LayersNamed: 1,
        BackwardOrderSeen: 1,
        GradientsRecorded: 20,
        RanksJoined: 20,
        RankGradientsRecorded: 4,
    }
    joined = next(event for event in kept if isinstance(event, RanksJoined))
    assert joined.grad_norms == pytest.approx((math.sqrt(2), 5.0))
    assert joined.losses == (2.0, 2.0)


def test_all_norms_of_the_step_on_which_an_incident_begins_are_stored() -> None:
    watch = watch_of(2)
    step: list[Event] = [
        GradientsRecorded(3, (1.0, math.nan), (1,)),
        record(3, 0, (1.0, 1.0)),
        record(3, 1, (1.0, math.nan)),
    ]
    kept = stored(watch, LayersNamed(("a", "b")), *step)
    assert [event.rank for event in kept if isinstance(event, RankGradientsRecorded)] == [0, 1]
    (incident,) = (event for event in kept if isinstance(event, IncidentChanged))
    assert (incident.anomaly, incident.ranks, incident.origin, incident.phase) == ("nan", (1,), "b", "begun")
    assert [event.phase for _, event in watch.end() if isinstance(event, IncidentChanged)] == ["ended"]


def test_one_rank_alone_needs_no_join() -> None:
    kept = stored(watch_of(1), LayersNamed(("a",)), GradientsRecorded(1, (1.0,), ()), record(1, 0, ()))
    assert [type(event) for event in kept] == [LayersNamed, GradientsRecorded]


def test_updates_of_all_ranks_are_compared_and_one_is_stored() -> None:
    watch = watch_of(2)
    stored(watch, LayersNamed(("a",)))
    assert stored(watch, UpdatesMeasured(10, 0, (1.0,), (0.1,)), UpdatesMeasured(10, 1, (1.0,), (0.1,))) == [
        UpdatesMeasured(10, 0, (1.0,), (0.1,))
    ]
    kept = stored(watch, UpdatesMeasured(20, 0, (1.0,), (0.1,)), UpdatesMeasured(20, 1, (1.5,), (0.1,)))
    assert [event.ranks for event in kept if isinstance(event, IncidentChanged)] == [(1,)]
    for step in range(30, 3000, 10):  # rank 1 is silent: nothing piles up
        assert len(stored(watch, UpdatesMeasured(step, 0, (1.0,), (0.1,)))) == 1


def test_other_events_pass_as_they_are() -> None:
    line = LineLogged("info", "rank 0", "hello")
    assert stored(watch_of(2), line) == [line]
