"""Promises 6, 9 and 16 on real trainings: torchrun, two gloo ranks; drained, preempted, or whatever is killed."""

import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sqlalchemy import Connection, text

from apt_jobs.client.client import Client
from apt_jobs.db.engine import Database
from apt_jobs.db.models import Job
from tests.acceptance.stack import DEADLINE_S, SOON_DONE, TINY, Stack, attempts_of, has_both_workers, marked, until
from tests.conftest import database_named
from tests.faults.history import faults_in
from tests.faults.record import FULL, Campaign, campaign, count

NUM_STEPS, SAVED_EVERY = 100, 10
TRAINING = {**TINY["training"], "max_steps": NUM_STEPS, "checkpoint_every_steps": SAVED_EVERY}
RESUMES_WITHIN_S = 120.0
YIELDS_WITHIN_S = 6.0  # from the submission of another job on a busy machine
TOKENS_OF_A_STEP = TINY["num_ranks"] * TINY["training"]["batch_size"] * TINY["model"]["max_seq_len"]
VICTIMS = ("rank", "torchrun", "supervisor", "worker")
WORKER = "-m apt_jobs worker train"


@dataclass
class Trainings:
    """A running stack on one dialect, and the undisturbed training to compare others with."""

    stack: Stack
    client: Client
    database: Database
    dialect: str
    reference: dict[str, Any]


@pytest.fixture(scope="module", params=["sqlite", "postgresql"] if FULL else ["sqlite"])
def trainings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainings]:
    folder = tmp_path_factory.mktemp("trainings")
    url = f"sqlite:///{folder / 'apt_jobs.sqlite3'}"
    if request.param == "postgresql":
        admin: Connection = request.getfixturevalue("postgres_admin")
        admin.execute(text("CREATE DATABASE trainings TEMPLATE migrated"))
        url = database_named(request.getfixturevalue("postgres_server_url"), "trainings")
    settings = {"APT_JOBS_PREEMPTION_EXEMPT_S": "0", "APT_JOBS_MAX_PREEMPTIONS": "1000"}
    stack, database = Stack(folder, APT_JOBS_DATABASE_URL=url, **settings), Database(url)
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
    for victim in VICTIMS if FULL else VICTIMS[:1]:  # `test_trees.py` has all of them each time
        with campaign(9, "kill -9 at a random step, then compare all tensors") as found:
            found.on(trainings.dialect)
            chance = random.Random(found.seed)
            for _ in range(count(1, 3)):
                kill_and_judge(trainings, victim, chance.randrange(5, NUM_STEPS - 40), found)


def test_sigterm_saves_hands_back_and_counts_as_no_failure(trainings: Trainings) -> None:
    """One training, drained again and again."""
    num_drains = 5 if FULL else 1
    with campaign(6, "SIGTERM to the worker at a random step") as found:
        found.on(trainings.dialect)
        chance = random.Random(found.seed)
        for _ in range(count(1, 10)):
            job_id = trainings.client.submit(job(max_attempts=1))["id"]
            wanted = 0
            for _ in range(num_drains):
                wanted += chance.randrange(5, (NUM_STEPS - 30) // num_drains)
                until(lambda: step_of(trainings.client, job_id) >= wanted and runs(trainings.client, job_id))  # noqa: B023
                worker = pid_of(trainings.stack, "worker", job_id)
                began = time.monotonic()
                os.kill(worker, signal.SIGTERM)
                found.fault("SIGTERM")
                until(lambda: worker not in trainings.stack.pids(WORKER))  # noqa: B023
                found.recovered(time.monotonic() - began)
                found.trials += 1
            ended = trainings.client.wait(job_id)
            lost = [attempt["steps_lost"] for attempt in attempts_of(trainings.client, job_id)[:-1]]
            if ended["state"] != "succeeded" or len(lost) != num_drains or max(lost) > 1:
                found.violations.append(f"{job_id}: {ended['state']}, steps lost: {lost}")
            with trainings.database.read() as session:
                row = session.get_one(Job, job_id)
                if row.num_job_faults:
                    found.violations.append(f"{job_id}: counted as {row.num_job_faults} failures")
            found.violations += differences(trainings, ended)


def test_a_training_that_yields_to_others_again_and_again_comes_out_the_same(trainings: Trainings) -> None:
    client, num_preemptions = trainings.client, count(1, 100)
    steps_per_s = float(trainings.reference["progress"]["tokens_per_s"]) / TOKENS_OF_A_STEP
    num_steps = NUM_STEPS + num_preemptions * int(YIELDS_WITHIN_S * steps_per_s)
    long = job(max_attempts=1, training={**TRAINING, "max_steps": num_steps, "checkpoint_every_steps": num_steps})
    with campaign(16, "preempted at a random step, then compare all tensors") as found:
        found.on(trainings.dialect)
        job_id = client.submit(long)["id"]
        for _ in range(num_preemptions):
            until(lambda: runs(client, job_id))
            time.sleep(random.Random(found.seed).uniform(0, 0.5))
            began = time.monotonic()
            urgent = client.submit({**SOON_DONE, "priority": 1})["id"]
            found.fault("preemption")
            until(lambda: client.get(urgent)["claimed_at"])  # noqa: B023
            found.recovered(time.monotonic() - began)
            assert client.wait(urgent)["state"] == "succeeded"
            found.trials += 1
        ended = client.wait(job_id)
        attempts = attempts_of(client, job_id)
        told = [str(attempt["reason"]).startswith("preempted by job_") for attempt in attempts[:-1]]
        lost = [attempt["steps_lost"] for attempt in attempts[:-1]]
        if ended["state"] != "succeeded" or told != [True] * num_preemptions or max(lost) > 1:
            found.violations.append(f"{job_id}: {ended['state']}, steps lost: {lost}, attempts: {attempts}")
        with trainings.database.read() as session:
            row = session.get_one(Job, job_id)
            counted = (row.num_job_faults, row.num_infrastructure_faults, row.num_preemptions)
        if counted != (0, 0, num_preemptions):
            found.violations.append(f"{job_id}: counted as {counted}")
        undisturbed = replace(trainings, reference=client.wait(client.submit(long)["id"]))
        found.violations += differences(undisturbed, ended)


def kill_and_judge(trainings: Trainings, victim: str, step: int, found: Campaign) -> None:
    client = trainings.client
    job_id = client.submit(job())["id"]
    until(lambda: step_of(client, job_id) >= step)
    began = time.monotonic()
    os.kill(pid_of(trainings.stack, victim, job_id), signal.SIGKILL)
    found.fault(victim)
    until(lambda: client.get(job_id)["attempt"] == 2 and resumed(client, job_id))
    took_s = time.monotonic() - began
    found.recovered(took_s)
    if took_s > RESUMES_WITHIN_S:
        found.violations.append(f"{job_id}: resumed after {took_s:.0f} s")
    ended = client.wait(job_id)
    judge_recovery(trainings, found, job_id, ended)
    found.violations += differences(trainings, ended)
    found.trials += 1


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
    assert newest["global_step"] == row["num_steps"]
    return trainings.stack.data_dir / "checkpoints" / str(newest["filename"])


def step_of(client: Client, job_id: str) -> int:
    return int(client.get(job_id)["step"] or 0)


def runs(client: Client, job_id: str) -> bool:
    return bool(client.get(job_id)["state"] == "running") and resumed(client, job_id)


def resumed(client: Client, job_id: str) -> bool:
    """Whether the current attempt has trained a step."""
    attempt = client.get(job_id)["attempt"]
    events = client._json("GET", f"/api/jobs/{job_id}/events", params={"kind": "metric", "after": 0, "limit": 1000})
    return any(event["attempt"] == attempt for event in events["data"])


def pid_of(stack: Stack, victim: str, job_id: str) -> int:
    """One process of the kind; of the ranks, any."""
    words = {
        "torchrun": ("apt_jobs.training.launch_ranks", job_id),
        "rank": ("-u", "apt_jobs.training.run", job_id),
        "supervisor": ("apt_jobs.supervision.supervise", job_id),
        "worker": (WORKER,),
    }[victim]
    pids: list[int] = until(lambda: stack.pids(*words))
    return max(pids)
