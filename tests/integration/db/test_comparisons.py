"""Many jobs read together on real databases: the same steps count as in a slow pass over each."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sqlalchemy import update

from apt_jobs.db.comparisons import Comparison, compare, rows_of
from apt_jobs.db.engine import Database
from apt_jobs.db.jobs import finish
from apt_jobs.db.models import Attempt, Job
from apt_jobs.db.series import read as series_read
from apt_jobs.db.series import read_many as series_read_many
from apt_jobs.db.series import store as series_store
from apt_jobs.db.series.custom_metrics import MetricLogs
from apt_jobs.db.series.read import read_buckets
from apt_jobs.db.series.read_many import ManyPoints, read_many, read_many_steps
from apt_jobs.events.kinds import Event, MetricsLogged, StepTrained, TrainingStarted, Validated
from apt_jobs.jobs.states import JobState
from tests.integration.db.steps import running, started, store, store_at, trained
from tests.integration.db.test_histories import next_attempt

COLUMNS = ("num_steps_R", "last_at_ms_R", "min_RC", "max_RC", "num_nonfinite_RC")
STORY = st.lists(
    st.tuples(st.sampled_from(["go on", "go on", "roll back", "resume"]), st.integers(0, 12), st.integers(1, 25)),
    max_size=5,
)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Levels of 2, 4, 8... steps instead of 16, 256, 4,096: many of them in short histories."""
    for module in (series_store, series_read, series_read_many):
        monkeypatch.setattr(module, "FACTOR", 2)
        monkeypatch.setattr(module, "BLOCK_STEPS", 4)


def compared(database: Database, ids: Sequence[str], *args: Any, logs: MetricLogs | None = None) -> Comparison:
    with database.read() as session:
        return compare(session, rows_of(session, ids), logs or MetricLogs(1 << 20), *args)


def tell(database: Database, story: list[tuple[str, int, int]], random: np.random.Generator) -> str:
    """Make a job of batches of steps, with roll-backs and resumed attempts between them."""
    job, step = running(database, max_attempts=99), 0
    for what, back, num_steps in story:
        step = step if what == "go on" else max(step - back, 0)
        if what == "resume":
            with database.write() as session:  # attempts without a new checkpoint would end the job
                session.execute(update(Job).where(Job.id == job.id).values(num_job_faults_without_checkpoint=0))
            job = next_attempt(database, job)
            store(database, job, started(resumed_from_step=step))
        batch: list[Event] = []
        for _ in range(num_steps):
            step += 1
            loss = math.nan if random.random() < 0.1 else float(random.normal())
            batch.append(trained(step, loss))
            if step % 3 == 0:
                batch.append(Validated(step, 0, loss, is_best=False))
        store(database, job, *batch)
    with database.write() as session:  # the next one is to be claimed
        finish(session, job.id, job.attempt, JobState.SUCCEEDED)
    return job.id


@given(st.lists(STORY, min_size=1, max_size=3), st.integers(1, 60), st.integers(0, 2**32))
@settings(
    max_examples=6,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_many_jobs_at_once_equal_a_slow_pass_over_each(
    database: Database, small_blocks: None, stories: list[list[tuple[str, int, int]]], max_points: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    ids = [tell(database, story, random) for story in stories]
    for kind in ("metric", "validation"):
        with database.read() as session:
            found = read_many(session, ids, kind, max_points)
            singles = [read_buckets(session, job_id, kind, 10_000) for job_id in ids]
        for index, steps in enumerate(singles):
            order = np.flatnonzero(found.jobs_R == index)
            order = order[np.argsort(found.last_steps_R[order])]
            begin = 0
            for row in order.tolist():
                end = begin + int(found.num_steps_R[row])
                check_bucket(found, row, steps.mean_BL[begin:end])
                assert found.last_steps_R[row] == steps.last_steps_B[end - 1]
                begin = end
            assert begin == steps.num_buckets

    with database.read() as session:
        window = read_many_steps(session, ids, 5, 20)
        steps_of = [read_buckets(session, job_id, "metric", 10_000, from_step=5, to_step=20) for job_id in ids]
    found_steps = sorted(zip(window.jobs_R.tolist(), window.last_steps_R.tolist(), strict=True))
    assert found_steps == [(index, step) for index, one in enumerate(steps_of) for step in one.last_steps_B.tolist()]


def check_bucket(found: ManyPoints, row: int, values: Any) -> None:
    finite = values[np.isfinite(values[:, 0])][:, 0]
    assert found.num_nonfinite_RC[row, 0] == len(values) - len(finite)
    if len(finite):
        assert found.mean_RC[row, 0] == pytest.approx(finite.mean(), rel=1e-9, abs=1e-12)
        assert (found.min_RC[row, 0], found.max_RC[row, 0]) == (finite.min(), finite.max())


def test_long_jobs_are_read_at_their_levels(database: Database) -> None:
    ids = []
    for num_steps in (6_000, 700):
        job = running(database)
        store(database, job, *[trained(step, float(step)) for step in range(1, num_steps + 1)])
        ids.append(job.id)
    with database.read() as session:
        found = read_many(session, ids, "metric", 50)
    assert np.bincount(found.jobs_R, found.num_steps_R).tolist() == [6_000, 700]
    assert len(found.jobs_R) < 900, "buckets of 16 steps, and 256 single steps of each at most"
    comparison = compared(database, ids, "step", ["train_loss"], 50)
    assert len(comparison.points) == 50
    assert comparison.points[-1] == 6_000
    curve = comparison.curves["train_loss"]
    assert curve.counts_JP.sum(axis=1).tolist() == [6_000, 700]
    np.testing.assert_allclose(curve.means_JP[0], comparison.points - 60, atol=70)


def test_each_axis_has_its_places(database: Database) -> None:
    job = running(database, max_attempts=3)
    at = datetime(2026, 1, 1, tzinfo=UTC)
    sized = TrainingStarted(2, "cpu", "gloo", 1, 8, 4, 100, 0, {})
    events: list[Event] = [sized, *(trained(step) for step in range(1, 5))]
    store_at(database, job, [(at + timedelta(seconds=10), event) for event in events])
    again = next_attempt(database, job)
    doubled = TrainingStarted(4, "cpu", "gloo", 1, 8, 2, 200, 2, {})
    store_at(database, again, [(at + timedelta(seconds=60), one) for one in [doubled, trained(3), trained(4)]])
    with database.write() as session:
        session.execute(update(Attempt).where(Attempt.job_id == job.id).values(started_at=at))
    waiting = running(database)
    expected: dict[str, list[float]] = {
        "step": [1, 2, 3, 4],
        "tokens": [100, 200, 400, 600],
        "epoch": [0.25, 0.5, 1.0, 1.5],
    }
    for axis, places in expected.items():
        comparison = compared(database, [job.id, waiting.id], axis, None, 1_000)
        found = comparison.points[comparison.curves["train_loss"].counts_JP[0] > 0]
        assert found == pytest.approx(places, abs=places[-1] / 900)
        assert comparison.without_place == [False, axis != "step"]
    seconds = compared(database, [job.id], "seconds", None, 1_000)
    assert seconds.points == pytest.approx([10.0, 60.0], abs=0.1)


def test_values_are_the_last_the_best_and_those_at_a_step(database: Database) -> None:
    job = running(database)
    events: list[Event] = []
    for step in range(1, 41):
        loss = math.nan if step == 30 else 50.0 - step
        events.append(StepTrained(step, 0, loss, 1e-3, 0.5, step_time_ms=float(step), tokens_per_s=0.0))
        events.append(MetricsLogged(step, 0, {"eval/accuracy": step / 100, "train_loss": 7.0}))
    store(database, job, *events, Validated(10, 0, 3.0, is_best=True), Validated(40, 0, 4.0, is_best=False))
    other = running(database)
    store(database, other, trained(1, 9.0))
    names = ["train_loss", "val_loss", "eval/accuracy", "custom/train_loss", "gone", "tokens_per_s"]
    comparison = compared(database, [job.id, other.id], "step", names, None, 20)
    assert set(comparison.curves) == set(names) - {"gone"}
    reached = {name: (one.goal, one.last, one.best, one.at) for name, one in comparison.reached.items()}
    assert reached["train_loss"] == ("min", [10.0, 9.0], [10.0, 9.0], [37.5, None])
    assert reached["val_loss"] == ("min", [4.0, None], [3.0, None], [3.0, None])
    assert reached["eval/accuracy"] == ("max", [0.4, None], [0.4, None], [0.2, None])
    assert reached["custom/train_loss"][1] == [7.0, None]
    assert reached["tokens_per_s"][:3] == ("max", [None, 1000.0], [None, 1000.0])
    assert reached["step_time_ms"][1] == [40.0, 100.0]
    assert reached["learning_rate"][2] == [None, None]
    curve = comparison.curves["train_loss"]
    assert np.isnan(curve.means_JP[0, 29])
    assert curve.counts_JP[1].sum() == 1


def test_long_logs_are_read_on_by_the_next_request(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apt_jobs.db.series.custom_metrics.READ_ROWS", 50)
    monkeypatch.setattr("apt_jobs.db.comparisons.MAX_LOG_ROWS", 100)
    ids = []
    for _ in range(3):
        job = running(database)
        store(database, job, *[MetricsLogged(step, 0, {"score": 1.0}) for step in range(1, 81)])
        ids.append(job.id)
    logs, counts = MetricLogs(1 << 20), []
    for _ in range(4):
        comparison = compared(database, ids, logs=logs)
        counts.append((comparison.is_complete, int(comparison.curves["score"].counts_JP.sum())))
    assert counts[0][0] is False
    assert counts[-1] == (True, 240)
    assert [number for _, number in counts] == sorted(number for _, number in counts)
