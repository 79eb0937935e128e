"""Promise 20: a training on Slurm is one attempt at a time, whatever Slurm loses; it goes on from its last save.

A real Slurm of two nodes: its answers are lost, doubled and late, its controller and a node are killed, it preempts.
"""

import getpass
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from apt_jobs.db.jobs import get_job, list_attempts
from apt_jobs.db.models import Attempt, Job
from apt_jobs.db.steering import request_cancel
from apt_jobs.db.workers import list_workers
from apt_jobs.operations.waiting import waiting_of
from tests.acceptance.stack import LONG, TINY
from tests.faults.forked import Forker
from tests.faults.history import faults_in
from tests.faults.record import FULL, Campaign, campaign, count
from tests.faults.service import Service, service, until
from tests.slurm_cluster import SlurmCluster, slurm_cluster

ROOT = Path(__file__).resolve().parents[2]
WORKER = "slurm"
SUBMIT_TIMEOUT_S = 3
ENVIRONMENT = {
    "APT_JOBS_LEASE_S": "12",
    "APT_JOBS_STOP_TIMEOUT_S": "3",
    "APT_JOBS_RETRY_WAIT_S": "0.5",
    "APT_JOBS_HAND_BACK_WAIT_S": "0.5",
    "APT_JOBS_ENTRY_POINTS": json.dumps({"count": str(ROOT / "tests" / "faults" / "counts_on_slurm.py")}),
}
COUNTING: dict[str, Any] = {"queue": WORKER, "entry_point": "count", "launcher": "none", "resources": {"cpus": 1}}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


@dataclass
class Fleet:
    """A service whose one worker submits to a cluster."""

    running: Service
    cluster: SlurmCluster

    def start_worker(self) -> None:
        options = ["--partition=low", "--poll-s=0.3", f"--submit-timeout-s={SUBMIT_TIMEOUT_S}", "--max-jobs=12"]
        arguments = ["worker", "slurm", f"--name={WORKER}", f"--queue={WORKER}", *options]
        self.running.start(WORKER, arguments, **self.cluster.environment)

    def submit(self, **fields: Any) -> "Training":
        spec = {**COUNTING, "env": {"FINISH": str(self.cluster.folder / "finish")}, **fields}
        training = Training(self, self.running.submit(**spec))
        self.running.wake_up(WORKER)
        return training

    def is_up(self) -> bool:
        with self.running.database.read() as session:
            return any(row.name == WORKER for row in list_workers(session))

    def pause_reason(self) -> str | None:
        with self.running.database.read() as session:
            return next((row.paused_reason for row in list_workers(session) if row.name == WORKER), None)


@dataclass
class Training:
    """One job of the fleet."""

    fleet: Fleet
    job_id: str

    def job(self) -> Job:
        with self.fleet.running.database.read() as session:
            return get_job(session, self.job_id)

    def attempts(self) -> list[Attempt]:
        with self.fleet.running.database.read() as session:
            return list_attempts(session, self.job_id)

    def waits_for(self) -> str:
        with self.fleet.running.database.read() as session:
            waiting = waiting_of(session, get_job(session, self.job_id), 30.0)
        return "" if waiting is None else waiting.reason

    def has_saved(self) -> bool:
        return bool(self.fleet.running.saved_steps(self.job_id))

    def slurm_jobs(self, attempt: int | None = None) -> list[list[str]]:
        """Id, state and node of each of an attempt."""
        name = f"apt-{self.job_id}-{attempt or self.job().attempt}"
        return [row[1:] for row in self.fleet.cluster.rows("%j", "%i", "%T", "%N") if row[0] == name]

    def resumed_from(self, attempt: int) -> int:
        """The step from which an attempt of the script went on."""
        return int(self.folder("output", f"resumed-{attempt}").read_text())

    def folder(self, *names: str) -> Path:
        """A place in the job's folder."""
        return Path(self.fleet.running.environment["APT_JOBS_DATA_DIR"], "runs", self.job_id, *names)

    def cancel(self) -> None:
        with self.fleet.running.database.write() as session:
            request_cancel(session, self.job_id)

    def wait_for(self, state: str) -> Job:
        job: Job = until(lambda: (job := self.job()).state == state and job)
        return job


@pytest.fixture
def fleet(tmp_path: Path, sqlite_url: str, forker: Forker, cluster: SlurmCluster) -> Iterator[Fleet]:
    with service(tmp_path / "s", sqlite_url, forker) as running:
        running.environment |= ENVIRONMENT
        running.start_web()
        fleet = Fleet(running, cluster)
        fleet.start_worker()
        until(lambda: fleet.is_up())
        try:
            yield fleet
        finally:
            cluster.ask("scancel", f"--user={getpass.getuser()}")
            running.kill(WORKER)


def test_trainings_go_on_whatever_slurm_loses(fleet: Fleet) -> None:
    with campaign(20, "Slurm's answers, controller, nodes and grace, and the worker, lost under trainings") as found:
        found.on(fleet.running.database.dialect)
        chance = random.Random(found.seed)
        trained = Training(fleet, fleet.running.submit(**{**TINY, "num_ranks": 1, "queue": WORKER}))
        for _ in range(count(1, 20)):
            strike_all(fleet, chance, found, trained)
        found.violations += faults_in(fleet.running.database)


def test_what_sbatch_refuses_or_never_answers_is_tried_again(fleet: Fleet) -> None:
    finish = fleet.cluster.folder / "finish"
    finish.touch()
    fleet.cluster.ask("scontrol", "update", "PartitionName=low", "State=DRAIN")
    refused = fleet.submit()
    until(lambda: any("partition not available" in (one.reason or "") for one in refused.attempts()))
    fleet.cluster.ask("scontrol", "update", "PartitionName=low", "State=UP")
    refused.wait_for("succeeded")
    late, cancelled = (submit_with(fleet, how) for how in ("late", "never"))
    cancelled.cancel()
    cancelled.wait_for("cancelled")
    job = late.wait_for("succeeded")
    assert (job.num_infrastructure_faults, job.num_job_faults) == (0, 0)
    assert f"sbatch did not answer within {SUBMIT_TIMEOUT_S} s" in (late.attempts()[0].reason or "")
    assert not late.folder("output", "resumed-1").exists()  # what came late did not run
    until(lambda: [row[1] for row in late.slurm_jobs(1)] in (["COMPLETED"], ["CANCELLED"]))
    assert not list(late.folder().glob("*/slurm-environment.json"))
    assert faults_in(fleet.running.database) == []
    finish.unlink()


def submit_with(fleet: Fleet, how: str) -> Training:
    """Submit a training; `sbatch` is started and does not answer."""
    fleet.cluster.fail_next_sbatch(how)
    training = fleet.submit()
    until(lambda: not (fleet.cluster.folder / "fault").exists())
    return training


def strike_all(fleet: Fleet, chance: random.Random, found: Campaign, trained: Training) -> None:
    """Strike two trainings, one of which has a node to itself, with all there is."""
    other, alone = trainings = submitted_with_faults(fleet, found)
    for training in trainings:
        until(training.has_saved)
    time.sleep(chance.random())  # at any step
    strike("controller", lambda: lose_controller(fleet), found)
    strike("worker", lambda: kill_worker(fleet), found)
    for training in trainings:
        if training.job().attempt != 1:
            found.violations.append(f"lost answer, controller or worker: {training.attempts()[0].reason}")
    [lost] = [node for _, state, node in alone.slurm_jobs() if state == "RUNNING"]
    began = time.monotonic()
    strike("node", lambda: fleet.cluster.lose_node(lost), found)
    trained.wait_for("succeeded")  # before its node is taken
    strike("preemption", lambda: preempt(fleet, other), found)
    judge_resumed("preemption", other, 1, found)
    if "saved at step" not in (other.attempts()[0].reason or "") or other.job().num_infrastructure_faults:
        found.violations.append(f"preemption: {other.attempts()[0].reason}")
    until(lambda: "pending in Slurm as job" in alone.waits_for())
    strike("cancel", lambda: cancel_pending(fleet, found), found)
    fleet.cluster.start_node(lost)
    judge_resumed("node", alone, 1, found)
    found.recovered(time.monotonic() - began)
    if FULL:
        strike("scancel", lambda: fleet.cluster.ask("scancel", alone.slurm_jobs()[0][0]), found)
        judge_resumed("scancel", alone, 2, found)
    alone.cancel()
    alone.wait_for("cancelled")
    until(lambda: all(row[1] not in ("RUNNING", "PENDING") for row in alone.slurm_jobs()))
    (fleet.cluster.folder / "finish").touch()
    other.wait_for("succeeded")
    (fleet.cluster.folder / "finish").unlink()


def submitted_with_faults(fleet: Fleet, found: Campaign) -> list[Training]:
    """Submit two: the answer to the first is lost, that to the second says that there are two of it."""
    trainings = []
    for how, cpus in (("lose", 1), ("twice", 8)):
        fleet.cluster.fail_next_sbatch(how)
        trainings.append(fleet.submit(resources={"cpus": cpus}))
        until(lambda: trainings[-1].job().state == "running")
        until(trainings[-1].slurm_jobs)
        found.fault(f"answer {how}")
    return trainings


def strike(what: str, how: Callable[[], object], found: Campaign) -> None:
    how()
    found.fault(what)
    found.tried()


def judge_resumed(what: str, training: Training, attempt: int, found: Campaign) -> None:
    """Wait until the next attempt saves; it has to go on from the last save of this one."""
    until(lambda: training.job().attempt > attempt and training.has_saved())
    saved = max(training.fleet.running.saved_steps(training.job_id, attempt))
    if (resumed := training.resumed_from(attempt + 1)) != saved:
        found.violations.append(f"{what}: {training.job_id} saved {saved} and went on from {resumed}")


def lose_controller(fleet: Fleet) -> None:
    """kill -9, until the worker says that it claims nothing, and start it again."""
    fleet.cluster.kill("slurmctld")
    until(lambda: "squeue" in (fleet.pause_reason() or ""))
    fleet.cluster.start_controller()


def kill_worker(fleet: Fleet) -> None:
    fleet.running.kill(WORKER)
    fleet.start_worker()


def preempt(fleet: Fleet, training: Training) -> None:
    """Have Slurm give its node to somebody else for a moment."""
    node = training.slurm_jobs()[-1][2]
    options = ["--partition=high", f"--nodelist={node}", "--exclusive", "--output=/dev/null"]
    fleet.cluster.ask("sbatch", *options, "--wrap=sleep 0.2")


def cancel_pending(fleet: Fleet, found: Campaign) -> None:
    """Cancel a job that waits in Slurm: it is gone there, too."""
    waiting = fleet.submit(resources={"cpus": 8})
    until(lambda: "pending in Slurm as job" in waiting.waits_for())
    waiting.cancel()
    waiting.wait_for("cancelled")
    until(lambda: [row[1] for row in waiting.slurm_jobs()] == ["CANCELLED"])
    if waiting.job().attempt != 1:
        found.violations.append(f"cancel: {waiting.job_id} is in attempt {waiting.job().attempt}")


if FULL:  # two torchruns, which `make faults` has time for

    def test_a_training_over_two_nodes_of_slurm_is_preempted_and_goes_on(fleet: Fleet) -> None:
        spec = {**LONG, "num_ranks": 2, "num_nodes": 2, "queue": WORKER, "resources": {"cpus": 2}}
        with campaign(20, "a training over two nodes of Slurm, preempted and with a node lost") as found:
            found.on(fleet.running.database.dialect)
            training = Training(fleet, fleet.running.submit(**spec))
            for attempt, how in enumerate(("preemption", "node") * count(1, 3), 1):
                until(training.has_saved)
                if how == "node":
                    fleet.cluster.lose_node("n1")
                else:
                    options = ["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null"]
                    fleet.cluster.ask("sbatch", *options, "--wrap=true")
                found.fault(how)
                until(lambda: training.job().attempt > attempt)  # noqa: B023
                reason = training.attempts()[attempt - 1].reason or ""
                if how == "preemption" and "saved at step" not in reason:
                    found.violations.append(f"{how}: {reason}")
                if how == "node":
                    fleet.cluster.start_node("n1")
                found.tried()
            until(training.has_saved)
            training.cancel()
            training.wait_for("cancelled")
            found.violations += faults_in(fleet.running.database)
