"""Sweeps on both dialects: inserted whole or not at all, held and released, steered as one, halved; each step twice."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import func, select, update

from apt_jobs.db import holds, jobs
from apt_jobs.db.engine import Database
from apt_jobs.db.models import Job
from apt_jobs.db.queues import queues_with_due_jobs
from apt_jobs.db.steering import request_cancel, request_pause, request_retry
from apt_jobs.db.sweep_models import Sweep, SweepRung, SweepTrial
from apt_jobs.db.sweeps import get_sweep, insert_sweep, next_step, want_cancelled, want_paused
from apt_jobs.errors import Conflict, NotFound, Unavailable
from apt_jobs.events.kinds import MetricsLogged, Validated
from apt_jobs.jobs.states import JobState
from apt_jobs.jobs.sweep_sampler import Sampler
from apt_jobs.jobs.sweeps import SweepSpec, plan_jobs
from apt_jobs.operations.sweeps import advance_sweep, apply_step
from tests.integration.db.steps import LEASE_S, claim, job_of, started, store, trained

RATE = "training.learning_rate"


def make(database: Database, number: int = 4, *, max_queued_jobs: int = 10_000, **fields: Any) -> str:
    parameters = {RATE: {"values": [0.1 / (index + 1) for index in range(number)]}}
    asked = {"spec": {"kind": "train"}, "parameters": parameters, "metric": "train_loss", **fields}
    if asked.get("method") in ("halving", "tpe"):
        asked |= {"parameters": {RATE: {"min": 1e-4, "max": 0.1}}, "num_jobs": number}
    spec = SweepSpec.model_validate(asked)
    with database.write() as session:
        return insert_sweep(session, spec, plan_jobs(spec), max_queued_jobs).id


def job_ids(database: Database, sweep_id: str) -> list[str]:
    with database.read() as session:
        query = select(SweepTrial.job_id).where(SweepTrial.sweep_id == sweep_id)
        return list(session.scalars(query.order_by(SweepTrial.number, SweepTrial.repeat)))


def held(database: Database, sweep_id: str) -> list[bool]:
    return [bool(job_of(database, job_id).holds & holds.SWEEP) for job_id in job_ids(database, sweep_id)]


def states(database: Database, sweep_id: str) -> list[str]:
    return [job_of(database, job_id).state for job_id in job_ids(database, sweep_id)]


def end(database: Database, job: Job, state: JobState = JobState.SUCCEEDED) -> None:
    with database.write() as session:
        jobs.finish(session, job.id, job.attempt, state)


def test_all_jobs_are_there_and_as_many_as_may_run_are_claimed(database: Database) -> None:
    sweep_id = make(database, max_running=2)
    assert held(database, sweep_id) == [False, False, True, True]
    first, second = claim(database), claim(database)
    with database.write() as session:
        assert jobs.claim_next(session, "train", "worker-a", LEASE_S) is None
        assert jobs.claim(session, job_ids(database, sweep_id)[3], "worker-a", LEASE_S) is None
        assert queues_with_due_jobs(session) == []
    assert advance_sweep(database, sweep_id) == ([], False)
    end(database, first)
    assert advance_sweep(database, sweep_id) == ([], True)
    assert held(database, sweep_id) == [False, False, False, True]
    assert claim(database).sweep_id == second.sweep_id == sweep_id


def test_a_sweep_that_finds_no_place_leaves_nothing(database: Database) -> None:
    with pytest.raises(Unavailable, match="4 more are to"):
        make(database, max_queued_jobs=3)
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(Job)) == 0
        assert session.scalar(select(func.count()).select_from(Sweep)) == 0


def test_a_sweep_that_is_cancelled_ends_every_job_and_itself(database: Database) -> None:
    sweep_id = make(database, number=120, max_running=1)
    running = claim(database)
    with database.write() as session:
        want_cancelled(session, sweep_id)
        want_cancelled(session, sweep_id)
    events, _ = advance_sweep(database, sweep_id)
    assert len(events) == 119
    assert job_of(database, running.id).cancel_requested_at is not None
    end(database, running, JobState.CANCELLED)
    advance_sweep(database, sweep_id)
    assert set(states(database, sweep_id)) == {"cancelled"}
    with database.write() as session:
        assert get_sweep(session, sweep_id).finished_at is not None
        with pytest.raises(Conflict, match="has ended"):
            want_paused(session, sweep_id, paused=True)
        with pytest.raises(NotFound):
            want_cancelled(session, "sweep_nope")


def test_a_paused_sweep_goes_on_but_for_jobs_that_were_paused_alone(database: Database) -> None:
    sweep_id = make(database, max_running=2)
    running = claim(database)
    alone = next(one for one in job_ids(database, sweep_id)[:2] if one != running.id)
    with database.write() as session:
        request_pause(session, alone)
        want_paused(session, sweep_id, paused=True)
    advance_sweep(database, sweep_id)
    assert job_of(database, running.id).state == "pausing"
    with database.write() as session:
        want_paused(session, sweep_id, paused=False)  # before the running one has saved
    advance_sweep(database, sweep_id)
    end(database, running, JobState.PAUSED)  # with a reason of its supervisor's
    advance_sweep(database, sweep_id)
    assert job_of(database, running.id).state == "queued"
    assert job_of(database, alone).state == "paused"
    assert held(database, sweep_id).count(True) == 1  # the place of the one that was paused alone is another's


def test_one_that_is_retried_is_not_held_by_a_sweep_that_ended(database: Database) -> None:
    sweep_id = make(database, max_running=1)
    with database.write() as session:
        want_cancelled(session, sweep_id)
    advance_sweep(database, sweep_id)
    last = job_ids(database, sweep_id)[-1]
    with database.write() as session:
        request_retry(session, last)
    assert claim(database).id == last


def test_jobs_that_are_deleted_hold_up_nothing(database: Database) -> None:
    sweep_id = make(database, max_running=1)
    with database.write() as session:
        for job_id in job_ids(database, sweep_id):
            request_cancel(session, job_id)
            session.delete(jobs.get_job(session, job_id))
    advance_sweep(database, sweep_id)
    with database.read() as session:
        assert get_sweep(session, sweep_id).finished_at is not None
        assert next_step(session, get_sweep(session, sweep_id)).finish is False


def halved(database: Database, losses: list[float], **fields: Any) -> tuple[str, list[Job]]:
    """Start a halving sweep whose jobs stand at step 10 of 100 with a loss each, in this order."""
    sweep_id = make(database, len(losses), method="halving", halving={"min_steps": 10, "reduction_factor": 2}, **fields)
    by_id = {job.id: job for job in (claim(database) for _ in losses)}
    claimed = [by_id[job_id] for job_id in job_ids(database, sweep_id)]
    for job, loss in zip(claimed, losses, strict=True):
        store(database, job, started(), *(trained(step, loss) for step in range(1, 11)), Validated(10, 0, loss, True))
        store(database, job, MetricsLogged(10, 0, {"score": loss}))
    return sweep_id, claimed


@pytest.mark.parametrize(
    ("metric", "goal", "stopped"),
    [
        ("train_loss", "minimize", [False, True, False, True]),
        ("val_loss", "minimize", [False, True, False, True]),
        ("score", "maximize", [False, False, True, True]),
        ("never_comes", "minimize", [False] * 4),
    ],
)
def test_halving_stops_those_that_fall_short_once(
    database: Database, metric: str, goal: str, stopped: list[bool]
) -> None:
    sweep_id, claimed = halved(database, [2.0, 3.0, 1.0, float("nan")], metric=metric, goal=goal)
    for _ in range(2):
        advance_sweep(database, sweep_id)
        asked = [job_of(database, job.id) for job in claimed]
        assert [job.cancel_requested_at is not None for job in asked] == stopped
    assert all("stopped by its sweep at step 10" in (job.reason or "") for job in asked if job.cancel_requested_at)
    end(database, claimed[3], JobState.CANCELLED)
    assert job_of(database, claimed[3].id).state == "cancelled"


def test_a_rung_is_decided_by_what_was_logged_up_to_it(database: Database) -> None:
    sweep_id, claimed = halved(database, [2.0, 1.0])
    store(database, claimed[1], *(trained(step, 9.0) for step in range(11, 15)))  # it was better at the rung
    advance_sweep(database, sweep_id)
    with database.read() as session:
        rows = session.execute(select(SweepRung.number, SweepRung.step, SweepRung.value).order_by(SweepRung.number))
        assert rows.all() == [(1, 10, 2.0), (2, 10, 1.0)]


def test_two_processes_take_every_step_once(database: Database) -> None:
    sweep_id, claimed = halved(database, [4.0, 3.0, 2.0, 1.0, 5.0, 6.0])
    barrier, errors = threading.Barrier(4), []

    def advance(_: int) -> None:
        barrier.wait()
        try:
            advance_sweep(database, sweep_id)
        except Exception as exc:
            errors.append(exc)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(advance, range(4)))
    assert errors == []
    with database.read() as session:
        decided = session.scalars(select(SweepRung.number)).all()
    assert sorted(decided) == [1, 2, 3, 4, 5, 6]
    assert sum(job_of(database, job.id).cancel_requested_at is not None for job in claimed) == 2


def test_a_step_that_was_taken_by_another_changes_nothing(database: Database) -> None:
    sweep_id = make(database, max_running=1)
    end(database, claim(database))
    with database.write() as session:
        apply_step(session, sweep_id)
    with database.write() as session:
        assert apply_step(session, sweep_id) == []
    assert held(database, sweep_id) == [False, False, True, True]


def test_what_is_held_costs_a_claim_nothing(database: Database) -> None:
    make(database, number=200, max_running=1)
    with database.write() as session:
        session.execute(update(Job).values(priority=9))
        other = jobs.insert_job(session, plan_jobs(_one())[0].spec).id
    first = claim(database)
    assert claim(database).id == other
    assert first.sweep_id is not None
    with database.read() as session:
        waiting = jobs.get_job(session, other)
        assert jobs.queue_position(session, waiting) is None
        held_job = session.scalars(select(Job).where(Job.holds != 0).limit(1)).one()
        assert jobs.queue_position(session, held_job) is None


def _one() -> SweepSpec:
    return SweepSpec.model_validate({"spec": {"kind": "train"}, "parameters": {RATE: {"values": [0.1]}}})


def test_a_sweep_that_learns_gives_each_job_its_setting_when_it_is_released(database: Database) -> None:
    sweep_id = make(database, 16, method="tpe", max_running=1)
    ids = job_ids(database, sweep_id)
    planned = [job_of(database, job_id).spec["training"]["learning_rate"] for job_id in ids]
    with database.write() as session:
        session.execute(update(Job).where(Job.id == ids[-1]).values(name="mine", labels={"a": "b"}, priority=3))
    for _ in ids:
        job = claim(database)
        rate = job.spec["training"]["learning_rate"]
        store(database, job, started(), trained(1, loss=abs(rate - 0.05)))
        end(database, job)
        advance_sweep(database, sweep_id)
    rates = [job_of(database, job_id).spec["training"]["learning_rate"] for job_id in ids]
    assert rates[0] == planned[0]
    assert all(rate != before for rate, before in zip(rates[1:], planned[1:], strict=True))
    with database.read() as session:
        settings = session.scalars(select(SweepTrial.setting).where(SweepTrial.sweep_id == sweep_id))
        assert sorted(setting[RATE] for setting in settings) == sorted(rates)
        assert get_sweep(session, sweep_id).finished_at is not None
    last = job_of(database, ids[-1])
    assert (last.name, last.labels, last.priority) == ("mine", {"a": "b"}, 3)
    assert (last.spec["name"], last.spec["labels"], last.spec["priority"]) == ("mine", {"a": "b"}, 3)


def test_chosen_values_that_do_not_go_together_leave_the_sampled_ones(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep_id = make(database, 3, method="tpe", max_running=1)
    ids = job_ids(database, sweep_id)
    planned = [job_of(database, job_id).spec["training"]["learning_rate"] for job_id in ids]
    monkeypatch.setattr(Sampler, "propose", lambda self: {RATE: -1.0})
    end(database, claim(database))
    assert advance_sweep(database, sweep_id) == ([], True)
    assert [job_of(database, job_id).spec["training"]["learning_rate"] for job_id in ids] == planned
    assert held(database, sweep_id) == [False, False, True]
