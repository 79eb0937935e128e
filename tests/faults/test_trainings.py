"""Promises 3, 5, 6, 7 and 9 on real trainings: torchrun, two gloo ranks, whatever is killed."""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sqlalchemy import Connection, text

from apt_jobs.client.client import Client
from apt_jobs.db.engine import Database
from apt_jobs.db.models import Job
from tests.acceptance.stack import DEADLINE_S, TINY, Stack, attempts_of, has_both_workers, marked, until
from tests.conftest import database_named
from tests.faults.history import faults_in
from tests.faults.record import FULL, Campaign, campaign, count

NUM_STEPS, SAVED_EVERY = 150, 10
TRAINING = {**TINY["training"], "max_steps": NUM_STEPS, "checkpoint_every_steps": SAVED_EVERY}
LONG = {**TINY, "training": {**TRAINING, "max_steps": 20_000}, "max_attempts": 100}
RESUMES_WITHIN_S, CANCELS_WITHIN_S = 120.0, 15.0
VICTIMS = ("rank", "torchrun", "supervisor", "worker")
ENTRY_POINTS = '{"ignore-sigterm": "tests.faults.entry_points:ignore_sigterm", "die": "tests.faults.entry_points:die"}'
WORKER = "-m apt_jobs worker train"
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Trainings:
    """A running stack on one dialect, and the undisturbed training to compare others with."""

    stack: Stack
    client: Client
    database: Database
    dialect: str
    reference: dict[str, Any]


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def trainings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainings]:
    folder = tmp_path_factory.mktemp("trainings")
    url = f"sqlite:///{folder / 'apt_jobs.sqlite3'}"
    if request.param == "postgres":
        admin: Connection = request.getfixturevalue("postgres_admin")
        admin.execute(text("CREATE DATABASE trainings TEMPLATE migrated"))
        url = database_named(request.getfixturevalue("postgres_server_url"), "trainings")
    environment = {"APT_JOBS_DATABASE_URL": url, "APT_JOBS_ENTRY_POINTS": ENTRY_POINTS, "PYTHONPATH": str(ROOT)}
    stack, database = Stack(folder, **environment), Database(url)
    until(lambda: (folder / "local.json").exists() or stack.process.poll() is not None)
    assert stack.process.poll() is None, stack.process.communicate()
    with stack.client() as client:
        until(lambda: has_both_workers(client))
        yield Trainings(stack, client, database, request.param, client.wait(client.submit(job())["id"]))
        faults = faults_in(database)
    stack.process.send_signal(signal.SIGINT)
    stack.process.communicate(timeout=DEADLINE_S)
    database.dispose()
    assert faults == []
    assert stack.pids() == []


def job(**fields: Any) -> dict[str, Any]:
    return {**TINY, "training": TRAINING, "max_attempts": 100, **fields}


def test_what_is_killed_is_replaced_and_the_weights_come_out_the_same(trainings: Trainings) -> None:
    of_dialect = VICTIMS if FULL else VICTIMS[:2] if trainings.dialect == "sqlite" else VICTIMS[2:]
    for victim in of_dialect:
        what = f"kill -9 of the {victim}, {trainings.dialect}"
        with campaign(3, what) as found, campaign(9, f"weights after {what}", found.seed) as equal:
            chance = random.Random(found.seed)
            for _ in range(count(1, 50)):
                kill_and_judge(trainings, victim, chance.randrange(5, NUM_STEPS - 40), found, equal)


def test_a_cancelled_training_never_runs_again(trainings: Trainings) -> None:
    situations: tuple[Callable[[Trainings], str], ...] = (queued, starting, running, stubborn, pausing, no_worker)
    with campaign(5, f"cancel in {len(situations)} situations, {trainings.dialect}") as found:
        cancelled = []
        for _ in range(count(1, 17)):
            for situation in situations:
                job_id = situation(trainings)
                began = time.monotonic()
                trainings.client.cancel(job_id)
                trainings.client.cancel(job_id)  # twice is as once
                until(lambda: trainings.client.get(job_id)["state"] == "cancelled" and not marked(job_id))  # noqa: B023
                took_s = time.monotonic() - began
                found.recovered(took_s)
                if took_s > CANCELS_WITHIN_S:
                    found.violations.append(f"{situation.__name__}: cancelled after {took_s:.0f} s")
                cancelled.append((job_id, trainings.client.get(job_id)["attempt"]))
                found.trials += 1
                steer_train_worker(trainings, "resume")
        succeeds(trainings)  # the worker is free, and has taken what waited
        for job_id, attempt in cancelled:
            row = trainings.client.get(job_id)
            if (row["state"], row["attempt"]) != ("cancelled", attempt) or marked(job_id):
                found.violations.append(f"{job_id} went on after it was cancelled: {row['state']}")


def test_sigterm_saves_hands_back_and_counts_as_no_failure(trainings: Trainings) -> None:
    with campaign(6, f"SIGTERM to the worker, {trainings.dialect}") as found:
        chance = random.Random(found.seed)
        for _ in range(count(1, 100)):
            job_id = trainings.client.submit(job(max_attempts=1))["id"]
            wanted = chance.randrange(5, NUM_STEPS - 40)
            until(lambda: step_of(trainings.client, job_id) >= wanted)  # noqa: B023
            worker = pid_of(trainings.stack, "worker", job_id)
            began = time.monotonic()
            os.kill(worker, signal.SIGTERM)
            until(lambda: worker not in trainings.stack.pids(WORKER))  # noqa: B023
            found.recovered(time.monotonic() - began)
            ended = trainings.client.wait(job_id)
            found.trials, found.faults = found.trials + 1, found.faults + 1
            lost = attempts_of(trainings.client, job_id)[0]["steps_lost"]
            if ended["state"] != "succeeded" or lost > 1:
                found.violations.append(f"{job_id}: {ended['state']}, {lost} steps lost")
            with trainings.database.read() as session:
                row = session.get_one(Job, job_id)
                if row.num_broken_attempts:
                    found.violations.append(f"{job_id}: counted as {row.num_broken_attempts} failures")
            found.violations += differences(trainings, ended)


def test_a_poison_job_is_given_up(trainings: Trainings) -> None:
    with campaign(7, f"a training that always dies, {trainings.dialect}") as found:
        began = time.monotonic()
        ids = [trainings.client.submit(job(entry_point="die"))["id"] for _ in range(count(1, 10))]
        for job_id in ids:
            ended = trainings.client.wait(job_id)
            found.trials += 1
            found.faults += ended["attempt"]
            if ended["state"] != "dead" or ended["attempt"] > 3:
                found.violations.append(f"{job_id}: {ended['state']} after {ended['attempt']} attempts")
        found.recovered(time.monotonic() - began)


def kill_and_judge(trainings: Trainings, victim: str, step: int, found: Campaign, equal: Campaign) -> None:
    client = trainings.client
    job_id = client.submit(job())["id"]
    until(lambda: step_of(client, job_id) >= step)
    began = time.monotonic()
    os.kill(pid_of(trainings.stack, victim, job_id), signal.SIGKILL)
    until(lambda: client.get(job_id)["attempt"] == 2 and resumed(client, job_id))
    took_s = time.monotonic() - began
    found.recovered(took_s)
    if took_s > RESUMES_WITHIN_S:
        found.violations.append(f"{job_id}: resumed after {took_s:.0f} s")
    ended = client.wait(job_id)
    judge_recovery(trainings, found, job_id, ended)
    equal.violations += differences(trainings, ended)
    for one in (found, equal):
        one.trials, one.faults = one.trials + 1, one.faults + 1


def judge_recovery(trainings: Trainings, found: Campaign, job_id: str, ended: dict[str, Any]) -> None:
    """One new attempt, from a checkpoint at most one interval back; every step in the history once; nothing left."""
    attempts = attempts_of(trainings.client, job_id)
    if ended["state"] != "succeeded" or len(attempts) != 2:
        found.violations.append(f"{job_id}: {ended['state']} after {len(attempts)} attempts")
        return
    lost = attempts[0]["steps_lost"]
    if lost > 2 * SAVED_EVERY:  # a checkpoint is written while the next interval is trained
        found.violations.append(f"{job_id}: {lost} steps lost, saved every {SAVED_EVERY}")
    steps = trainings.client.metrics(job_id, points=10_000)["steps"]
    if steps != list(range(1, NUM_STEPS + 1)):
        found.violations.append(f"{job_id}: its history has {len(steps)} steps")
    if left := marked(job_id):
        found.violations.append(f"{job_id}: left processes {left}")


def differences(trainings: Trainings, ended: dict[str, Any]) -> list[str]:
    """Tensors of the last checkpoint (weights, optimizer, random generators) that are not the reference's."""
    found = []
    ours, reference = (last_checkpoint(trainings, row) for row in (ended, trainings.reference))
    names = sorted(file.name for file in reference.glob("*.safetensors"))
    assert len(names) == 4, names  # model, optimizer, and the generators of two ranks
    for name in names:
        mine, theirs = load_file(ours / name), load_file(reference / name)
        if mine.keys() != theirs.keys() or not all(torch.equal(mine[key], theirs[key]) for key in mine):
            found.append(f"{ended['id']}: {name} differs")
    return found


def last_checkpoint(trainings: Trainings, row: dict[str, Any]) -> Path:
    newest = max(trainings.client.checkpoints(row["id"]), key=lambda one: one["global_step"])
    assert newest["global_step"] == NUM_STEPS
    return trainings.stack.data_dir / "checkpoints" / str(newest["filename"])


def queued(trainings: Trainings) -> str:
    steer_train_worker(trainings, "drain")
    job_id: str = trainings.client.submit(LONG)["id"]
    return job_id


def starting(trainings: Trainings) -> str:
    job_id: str = trainings.client.submit(LONG)["id"]
    until(lambda: trainings.client.get(job_id)["state"] == "running")
    return job_id


def running(trainings: Trainings) -> str:
    job_id = starting(trainings)
    until(lambda: step_of(trainings.client, job_id) >= 3)
    return job_id


def stubborn(trainings: Trainings) -> str:
    job_id: str = trainings.client.submit({**LONG, "entry_point": "ignore-sigterm"})["id"]
    until(lambda: trainings.client._json("GET", f"/api/jobs/{job_id}/events", params={"kind": "log"})["data"])
    return job_id


def pausing(trainings: Trainings) -> str:
    job_id = running(trainings)
    trainings.client.pause(job_id)
    return job_id


def no_worker(trainings: Trainings) -> str:
    """The worker is killed while the job runs, and cancel comes before the next one."""
    job_id = running(trainings)
    os.kill(pid_of(trainings.stack, "worker", job_id), signal.SIGKILL)
    return job_id


def succeeds(trainings: Trainings) -> None:
    assert trainings.client.wait(trainings.client.submit(TINY)["id"])["state"] == "succeeded"


def steer_train_worker(trainings: Trainings, action: Any) -> None:
    rows = until(lambda: [row for row in trainings.client.workers() if row["kind"] == "train" and row["alive"]])
    trainings.client.steer_worker(rows[0]["name"], action)


def step_of(client: Client, job_id: str) -> int:
    return int(client.get(job_id)["step"] or 0)


def resumed(client: Client, job_id: str) -> bool:
    """Whether the second attempt has trained a step."""
    events = client._json("GET", f"/api/jobs/{job_id}/events", params={"kind": "metric", "after": 0, "limit": 1000})
    return any(event["attempt"] == 2 for event in events["data"])


def pid_of(stack: Stack, victim: str, job_id: str) -> int:
    """One process of the kind; of the ranks, any."""
    words = {
        "torchrun": ("torch.distributed.run", job_id),
        "rank": ("-u", "apt_jobs.training.run", job_id),
        "supervisor": ("apt_jobs.supervision.supervise", job_id),
        "worker": (WORKER,),
    }[victim]
    pids: list[int] = until(lambda: stack.pids(*words))
    return max(pids)
