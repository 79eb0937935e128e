"""Lines that any language may have written are bounded before they are stored."""

import pytest

from apt_jobs.diagnosis import metric_limits
from apt_jobs.diagnosis.metric_limits import MetricLimits
from apt_jobs.events.kinds import LineLogged, MetricsLogged


def test_names_are_bounded_over_all_calls_and_ranks() -> None:
    limits = MetricLimits()
    kept: set[str] = set()
    warnings = []
    for number in range(1_200):
        for event in limits.limited(MetricsLogged(number, number % 8, {f"m{number}": 1.0, "m0": 2.0})):
            if isinstance(event, MetricsLogged):
                kept |= event.values.keys()
            else:
                warnings.append(event)
    assert len(kept) == 500
    assert len(warnings) == 1


@pytest.mark.parametrize("name", ["", "n" * 201, "a\nb", "\x1b[2J", "\u202eabc"])
def test_a_name_that_cannot_be_shown_is_left_out_and_the_rest_kept(name: str) -> None:
    first, second = MetricLimits().limited(MetricsLogged(1, 0, {name: 1.0, "good": 2.0}))
    assert isinstance(first, LineLogged)
    assert second == MetricsLogged(1, 0, {"good": 2.0})


@pytest.mark.parametrize(("step", "rank"), [(-1, 0), (2**60, 0), (1, -1)])
def test_a_step_out_of_bounds_is_left_out(step: int, rank: int) -> None:
    limits = MetricLimits()
    assert [event.kind for event in limits.limited(MetricsLogged(step, rank, {"a": 1.0}))] == ["log"]
    assert list(limits.limited(MetricsLogged(step, rank, {"a": 1.0}))) == []


def test_many_steps_are_downsampled_and_rare_metrics_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metric_limits, "EVENTS_BEFORE_DOWNSAMPLING", 100)
    limits = MetricLimits()
    counts = {"often": 0, "rare": 0, "log": 0}
    for step in range(10_000):
        events = list(limits.limited(MetricsLogged(step, 0, {"often": 1.0})))
        if step % 200 == 0:
            events += limits.limited(MetricsLogged(step, 0, {"rare": 1.0}))
        for event in events:
            counts[next(iter(event.values)) if isinstance(event, MetricsLogged) else "log"] += 1
    assert (counts["rare"], counts["log"]) == (50, 1)
    assert 100 < counts["often"] < 1_000
