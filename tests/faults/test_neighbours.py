"""Promise 15: jobs that share a worker share no fault. Real trees: one worker, three trainings, one core each.

Whatever becomes of one of them, the others stay in their attempt and go on. What becomes of the worker becomes of all.
"""

import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from apt_jobs.db.jobs import get_job, list_attempts
from apt_jobs.db.models import Attempt, Job
from apt_jobs.db.steering import request_cancel
from apt_jobs.supervision.process_tree import marked_processes, send
from tests.acceptance.stack import marked
from tests.faults.forked import Forker
from tests.faults.history import faults_in
from tests.faults.record import FULL, Campaign, campaign, count
from tests.faults.service import Service, service, until

NUM_JOBS = 3
NUM_CORES = NUM_JOBS + 1  # a job whose supervisor is frozen holds its share until that one is gone
WORKER = "shared"
LEASE_S = 12.0
RESUMES_WITHIN_S = 120.0
ROOT = Path(__file__).resolve().parents[2]
OF_ONE = ("rank", "torchrun", "supervisor", "frozen supervisor", "cancel")
OF_ALL = ("worker", "SIGTERM")
FEW = ("supervisor", "frozen supervisor", "cancel", "worker", "SIGTERM")  # without `make faults`


@dataclass
class Training:
    """One of the jobs that share the worker."""

    running: Service
    job_id: str

    def job(self) -> Job:
        with self.running.database.read() as session:
            return get_job(session, self.job_id)

    def attempts(self) -> list[Attempt]:
        with self.running.database.read() as session:
            return list_attempts(session, self.job_id)

    def tree(self) -> list[int]:
        return marked_processes(f"{self.job_id}:{self.job().attempt}")

    def supervisor(self) -> int | None:
        """Its process; that of an attempt before may still be ending."""
        worker = psutil.Process(self.running.processes[WORKER].pid)
        wanted = {f"--job-id={self.job_id}", f"--attempt={self.job().attempt}"}
        found = [child.pid for child in worker.children() if wanted <= set(child.cmdline())]
        return found[0] if found else None

    def pids(self, victim: str) -> list[int]:
        supervisor = self.supervisor()
        if supervisor is None:
            return []
        if "supervisor" in victim:
            return [supervisor]
        return [pid for pid in self.tree() if (psutil.Process(pid).ppid() == supervisor) == (victim == "torchrun")]


def saved_steps(one: Training, attempt: int | None = None) -> list[int]:
    return one.running.saved_steps(one.job_id, attempt)


def submit(running: Service) -> Training:
    return Training(running, running.submit(entry_point="count", queue=WORKER))


def test_what_strikes_one_job_leaves_its_neighbours_alone(
    tmp_path: Path, process_test_url: str, forker: Forker
) -> None:
    with (
        campaign(15, "a fault of one of three jobs on a worker, or of the worker") as found,
        service(tmp_path / "s", process_test_url, forker) as running,
    ):
        found.on(running.database.dialect)
        running.environment |= {
            "APT_JOBS_LEASE_S": str(LEASE_S),
            "APT_JOBS_HEARTBEAT_S": "2",
            "APT_JOBS_STOP_TIMEOUT_S": "2",
            "APT_JOBS_RETRY_WAIT_S": "1",
            "APT_JOBS_WORKER_CPUS": str(NUM_CORES),
            "APT_JOBS_ENTRY_POINTS": '{"count": "tests.faults.entry_points:count_until_stopped"}',
            "PYTHONPATH": str(ROOT),
        }
        running.start_web()
        running.start(WORKER, ["worker", "train", "--name", WORKER, "--queue", WORKER])
        trainings = [submit(running) for _ in range(NUM_JOBS)]
        chance = random.Random(found.seed)
        plan = [victim for victim in (OF_ONE + OF_ALL if FULL else FEW) for _ in range(count(1, 10))]
        chance.shuffle(plan)
        try:
            for victim in plan:
                until(lambda: all(saved_steps(one) for one in trainings))
                chance.shuffle(trainings)
                (strike_all if victim in OF_ALL else strike_one)(victim, trainings, found)
                found.fault(victim)
                found.tried()
            for one in trainings:
                cancel(one)
        finally:
            print(*found.violations, sep="\n")
            running.kill(WORKER)
            until(lambda: not any(marked(one.job_id) for one in trainings))
        found.violations += faults_in(running.database)


def strike_one(victim: str, trainings: list[Training], found: Campaign) -> None:
    """Strike the first: it goes on in another attempt, or is cancelled; the others stay in theirs and go on."""
    struck, *others = trainings
    before = [(one.job().attempt, max(saved_steps(one)), one.tree()) for one in others]
    attempt, began = struck.job().attempt, time.monotonic()
    if victim == "cancel":
        cancel(struck)
        trainings[0] = submit(struck.running)
        until(lambda: saved_steps(trainings[0]))
    else:
        pids = until(lambda: struck.pids(victim))
        if victim == "frozen supervisor":
            struck.running.freeze_process(pids[0])
        else:
            send(pids, signal.SIGKILL)
        until(lambda: struck.job().attempt > attempt and saved_steps(struck))
        judge_resumed(victim, struck, attempt, found)
        if not FULL or found.trials % 2:
            send(pids, signal.SIGCONT)  # it ends its tree when it sees that its lease is over; else its worker kills it
    judge_time(victim, began, found)
    until(lambda: not marked_processes(f"{struck.job_id}:{attempt}"))
    for one, (number, step, tree) in zip(others, before, strict=True):
        until(lambda: one.job().attempt != number or max(saved_steps(one, number)) > step)  # noqa: B023
        if one.job().attempt != number or set(one.tree()) != set(tree):
            found.violations.append(f"{victim} of {struck.job_id}: {one.job_id} is in attempt {one.job().attempt}")


def strike_all(victim: str, trainings: Sequence[Training], found: Campaign) -> None:
    """Kill the worker, or ask it to end: all its jobs are handed back, and go on when it is there again."""
    running, began = trainings[0].running, time.monotonic()
    before = [one.job().attempt for one in trainings]
    faults = [faults_counted(one) for one in trainings]
    if victim == "SIGTERM":
        running.processes[WORKER].terminate()
        running.processes[WORKER].wait()
        for one, attempt in zip(trainings, before, strict=True):
            job, ended = one.job(), one.attempts()[-1]
            if (job.state, job.attempt) != ("queued", attempt) or "drained; saved at step" not in (ended.reason or ""):
                found.violations.append(f"SIGTERM: {job.id} is {job.state} in attempt {job.attempt}: {ended.reason}")
        if [faults_counted(one) for one in trainings] != faults:
            found.violations.append("SIGTERM: it was counted as a fault")
    running.restart(WORKER)
    for one, attempt in zip(trainings, before, strict=True):
        until(lambda: one.job().attempt > attempt and saved_steps(one))  # noqa: B023
        judge_resumed(victim, one, attempt, found)
    judge_time(victim, began, found)


def faults_counted(one: Training) -> tuple[int, int]:
    job = one.job()
    return job.num_job_faults, job.num_infrastructure_faults


def judge_time(victim: str, began: float, found: Campaign) -> None:
    took_s = time.monotonic() - began
    found.recovered(took_s)
    if took_s > RESUMES_WITHIN_S:
        found.violations.append(f"{victim}: went on after {took_s:.0f} s")


def judge_resumed(victim: str, one: Training, attempt: int, found: Campaign) -> None:
    last, last_saved = one.attempts()[-1], max(saved_steps(one, attempt))
    if last.attempt != attempt + 1 or last.resumed_from_step != last_saved:
        found.violations.append(f"{victim}: {last.attempt} from {last.resumed_from_step}, saved at {last_saved}")


def cancel(one: Training) -> None:
    with one.running.database.write() as session:
        request_cancel(session, one.job_id)
    until(lambda: one.job().state == "cancelled" and not marked(one.job_id))
