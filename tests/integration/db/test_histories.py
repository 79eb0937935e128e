"""Histories from real event logs: resumed attempts, broken numbers, thinning."""

import math
from itertools import pairwise
from statistics import fmean, pstdev

import pytest

from apt_jobs.db import jobs
from apt_jobs.db.engine import Database
from apt_jobs.db.models import Job
from apt_jobs.db.series.histories import (
    current_training_job,
    gradient_export,
    last_start,
    layer_names,
    training_history,
)
from apt_jobs.events.kinds import AnomaliesFound, GradientsRecorded, LayerAnomaly, LayersNamed, Validated
from apt_jobs.jobs.spec import GenerateSpec
from apt_jobs.jobs.states import JobState
from apt_jobs.web.api.overviews import training_curves
from tests.integration.db.steps import LEASE_S, claim, lose_worker, running, started, store, submit, trained

NAN = float("nan")
INF = float("inf")


def next_attempt(database: Database, job: Job) -> Job:
    lose_worker(database, job.id)
    with database.write() as session:
        claimed = jobs.claim(session, job.id, "worker-b", LEASE_S)
    assert claimed is not None
    return claimed.job


def losses(database: Database, job: Job, max_points: int = 1000) -> list[tuple[int, float]]:
    with database.read() as session:
        history = training_curves(training_history(session, job.id, max_points))
    return [(step, float(loss)) for step, loss in zip(history.steps, history.train_loss, strict=True)]


def test_a_history_has_one_value_of_each_curve_for_each_step(database: Database) -> None:
    job = running(database)
    store(database, job, started(), *[trained(step, loss=5.0 - step) for step in (1, 2, 3)])
    store(database, job, Validated(2, 0, 4.0, is_best=True))
    with database.read() as session:
        history = training_curves(training_history(session, job.id, 100))
    assert (history.steps, history.train_loss) == ([1, 2, 3], [4.0, 3.0, 2.0])
    assert history.learning_rate == [1e-3] * 3
    assert history.grad_norm == [0.5] * 3
    assert history.step_time_ms == [100.0] * 3
    assert history.tokens_per_s == [1000.0] * 3
    assert (history.val_steps, history.val_loss, history.num_steps_recorded) == ([2], [4.0], 3)


def test_a_job_without_events_has_an_empty_history(database: Database) -> None:
    job_id = submit(database)
    with database.read() as session:
        assert training_curves(training_history(session, job_id, 10)).steps == []
        export = gradient_export(session, job_id, 10)
        assert layer_names(session, job_id) == ()
        assert last_start(session, job_id) is None
    assert export["timestamp"] > 0
    del export["timestamp"]
    assert export == {"gradient_timeline": [], "layer_statistics": {}, "anomaly_summary": {}, "total_steps": 0}


def test_steps_that_a_resumed_attempt_does_again_replace_those_before(database: Database) -> None:
    job = running(database, max_attempts=9)
    store(database, job, started(), *[trained(step, loss=1.0) for step in range(1, 8)])
    job = next_attempt(database, job)
    store(database, job, started(resumed_from_step=4), trained(5, loss=2.0))
    assert losses(database, job) == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 2.0)]


def test_an_attempt_that_died_before_training_replaces_nothing(database: Database) -> None:
    job = running(database, max_attempts=9)
    store(database, job, started(), trained(1, loss=1.0), trained(2, loss=1.0))
    job = next_attempt(database, job)
    assert losses(database, job) == [(1, 1.0), (2, 1.0)]


def test_an_attempt_that_began_further_back_replaces_all_before_it(database: Database) -> None:
    job = running(database, max_attempts=9)
    store(database, job, started(), *[trained(step, loss=1.0) for step in range(1, 7)])
    job = next_attempt(database, job)
    store(database, job, started(resumed_from_step=4), *[trained(step, loss=2.0) for step in (5, 6, 7)])
    job = next_attempt(database, job)  # the checkpoint of step 4 was damaged: back to step 2
    store(database, job, started(resumed_from_step=2), trained(3, loss=3.0))
    assert losses(database, job) == [(1, 1.0), (2, 1.0), (3, 3.0)]


def test_a_restart_from_the_beginning_forgets_everything(database: Database) -> None:
    job = running(database, max_attempts=9)
    store(database, job, started(), LayersNamed(("a",)), trained(1), GradientsRecorded(1, (9.0,), (0,)))
    store(database, job, AnomaliesFound(1, (LayerAnomaly("a", "exploding", 9.0),)), Validated(1, 0, 1.0, is_best=True))
    job = next_attempt(database, job)
    store(database, job, started(resumed_from_step=0), LayersNamed(("a",)), GradientsRecorded(1, (0.5,), ()))
    with database.read() as session:
        export = gradient_export(session, job.id, 100)
        history = training_curves(training_history(session, job.id, 100))
    assert (export["total_steps"], export["anomaly_summary"]) == (1, {})
    assert export["layer_statistics"]["a"]["max"] == 0.5
    assert (history.steps, history.val_steps) == ([], [])


def test_a_long_history_is_downsampled_evenly_with_both_ends(database: Database) -> None:
    job = running(database)
    store(database, job, *[trained(step) for step in range(1, 1001)])
    steps = [step for step, _ in losses(database, job, max_points=11)]
    assert (steps[-1], len(steps)) == (1000, 11)
    assert all(75 <= later - earlier <= 107 for earlier, later in pairwise([0, *steps]))  # 91, to whole buckets of 16


def test_losses_that_are_not_finite_come_back_as_they_were(database: Database) -> None:
    job = running(database)
    store(database, job, trained(1, loss=NAN), trained(2, loss=INF))
    (_, first), (_, second) = losses(database, job)
    assert math.isnan(first)
    assert second == INF


def test_the_export_is_the_payload_of_the_specification(database: Database) -> None:
    job = running(database)
    first, second = [0.1, 0.2, 0.4, 0.8], [1.0, 5000.0, 2.0, 4.0]
    store(database, job, LayersNamed(("embed", "head")))
    for step, (a, b) in enumerate(zip(first, second, strict=True), start=1):
        anomalous = (1,) if b > 1000 else ()
        store(database, job, GradientsRecorded(step, (a, b), anomalous))
        if anomalous:
            store(database, job, AnomaliesFound(step, (LayerAnomaly("head", "exploding", b),)))
    with database.read() as session:
        export = gradient_export(session, job.id, 100)
    assert set(export) == {"gradient_timeline", "layer_statistics", "anomaly_summary", "total_steps", "timestamp"}
    assert export["total_steps"] == 4
    assert export["anomaly_summary"] == {"exploding": 1}
    second_step = export["gradient_timeline"][1]
    assert set(second_step) == {"step", "timestamp", "layers"}
    assert second_step["layers"] == {
        "embed": {"norm": 0.2, "is_anomaly": False},
        "head": {"norm": 5000.0, "is_anomaly": True},
    }
    assert second_step["timestamp"] == pytest.approx(export["timestamp"], abs=120)
    for name, values in (("embed", first), ("head", second)):
        assert export["layer_statistics"][name] == {
            "mean": pytest.approx(fmean(values)),
            "std": pytest.approx(pstdev(values)),
            "min": min(values),
            "max": max(values),
            "total_steps": 4,
            "anomaly_count": 1 if name == "head" else 0,
        }


def test_broken_norms_are_counted_and_do_not_poison_the_mean(database: Database) -> None:
    job = running(database)
    store(
        database,
        job,
        LayersNamed(("a", "b")),
        GradientsRecorded(1, (1.0, NAN), (1,)),
        GradientsRecorded(2, (NAN, INF), (0, 1)),
        GradientsRecorded(3, (3.0, -INF), (1,)),
        AnomaliesFound(1, (LayerAnomaly("b", "nan", NAN),)),
        AnomaliesFound(2, (LayerAnomaly("a", "nan", NAN), LayerAnomaly("b", "inf", INF))),
    )
    with database.read() as session:
        export = gradient_export(session, job.id, 100)
    statistics = export["layer_statistics"]
    assert statistics["a"] == {"mean": 2.0, "std": 1.0, "min": 1.0, "max": 3.0, "total_steps": 3, "anomaly_count": 1}
    assert statistics["b"] == {
        "mean": None,
        "std": None,
        "min": None,
        "max": None,
        "total_steps": 3,
        "anomaly_count": 3,
    }
    assert export["anomaly_summary"] == {"nan": 2, "inf": 1}
    norms = [record["layers"]["b"]["norm"] for record in export["gradient_timeline"]]
    assert norms == ["NaN", "Infinity", "-Infinity"]


def test_a_downsampled_timeline_still_shows_the_one_bad_step(database: Database) -> None:
    job = running(database)
    records = [GradientsRecorded(step, (1.0,), (0,) if step == 137 else ()) for step in range(1, 401)]
    store(database, job, LayersNamed(("a",)), *records)
    with database.read() as session:
        export = gradient_export(session, job.id, 10)
    steps = [record["step"] for record in export["gradient_timeline"]]
    assert (len(steps), steps[0], steps[-1]) == (10, 1, 400)
    assert steps == sorted(steps)
    assert [record["step"] for record in export["gradient_timeline"] if record["layers"]["a"]["is_anomaly"]] == [137]
    assert export["layer_statistics"]["a"]["total_steps"] == 400


def test_the_newest_start_and_layers_count(database: Database) -> None:
    job = running(database, max_attempts=9)
    store(database, job, started(), LayersNamed(("old",)))
    job = next_attempt(database, job)
    store(database, job, started(resumed_from_step=3), LayersNamed(("new", "names")))
    with database.read() as session:
        start = last_start(session, job.id)
        assert layer_names(session, job.id) == ("new", "names")
    assert start is not None
    assert start.resumed_from_step == 3


def test_the_current_job_is_the_running_one_else_the_newest_that_ran(database: Database) -> None:
    def current() -> str | None:
        with database.read() as session:
            job = current_training_job(session)
        return None if job is None else job.id

    with database.write() as session:
        jobs.insert_job(session, GenerateSpec(kind="generate", texts=["a"]))
    assert current() is None
    first, second, waiting = submit(database), submit(database), submit(database)
    assert current() == waiting
    job = claim(database)
    assert (job.id, current()) == (first, first)
    with database.write() as session:
        jobs.finish(session, first, 1, JobState.SUCCEEDED)
    assert current() == first
    assert (claim(database).id, current()) == (second, second)
