"""Promises 3, 5 and 7 on real process trees: worker, supervisor, torchrun, two ranks, whichever of them is killed.

What the ranks train is a counter, so that hundreds of trees can be felled; `test_trainings.py` does it to models.
Several lanes run side by side, each with a worker, a queue and a job of its own.
"""

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
from sqlalchemy import select

from apt_jobs.db.jobs import get_job, list_attempts
from apt_jobs.db.models import EventRow, Job
from apt_jobs.db.steering import request_cancel, request_pause
from apt_jobs.db.workers import set_drained
from apt_jobs.errors import NotFound
from apt_jobs.events.kinds import LineLogged
from apt_jobs.supervision.process_tree import marked_processes, send
from tests.acceptance.stack import marked
from tests.faults.entry_points import SAVED_EVERY
from tests.faults.forked import Forker
from tests.faults.history import faults_in
from tests.faults.record import Campaign, campaign, count
from tests.faults.service import Service, service, until

LANES = 3
LEASE_S = 12.0  # a supervisor must have started within it, on a busy machine as well
STALL_TIMEOUT_S = 30.0  # also of a start, on a busy machine
RESUMES_WITHIN_S, CANCELS_WITHIN_S = 120.0, 15.0
ROOT = Path(__file__).resolve().parents[2]
ENTRY_POINTS = (
    '{"count": "tests.faults.entry_points:count_steps", "stubborn": "tests.faults.entry_points:ignore_sigterm"'
)
ENTRY_POINTS += ', "die": "tests.faults.entry_points:die"}'
VICTIMS = ("rank", "torchrun", "supervisor", "worker", "machine")


class Lane:
    """A worker and its queue, which have one name, and a job at a time."""

    def __init__(self, running: Service, name: str) -> None:
        self.running, self.name = running, name
        self.job_id = ""
        running.start(name, ["worker", "train", "--name", name, "--queue", name])

    def submit(self, entry_point: str) -> None:
        self.job_id = self.running.submit(entry_point=entry_point, num_ranks=2, queue=self.name)

    def job(self) -> Job:
        with self.running.database.read() as session:
            return get_job(session, self.job_id)

    def pids(self, victim: str, attempt: int) -> list[int]:
        """Of the job's running attempt. `machine`: everything."""
        worker = self.running.processes[self.name].pid
        tree = marked_processes(f"{self.job_id}:{attempt}")
        supervisor = [child.pid for child in psutil.Process(worker).children()]
        return {
            "worker": [worker],
            "supervisor": supervisor,
            "torchrun": [pid for pid in tree if is_child_of(pid, supervisor)],
            "rank": [pid for pid in tree if not is_child_of(pid, supervisor)][:1],
            "machine": [worker, *supervisor, *tree],
        }[victim]


@contextmanager
def lanes(running: Service, number: int) -> Iterator[list[Lane]]:
    running.environment |= {
        "APT_JOBS_LEASE_S": str(LEASE_S),
        "APT_JOBS_HEARTBEAT_S": "2",
        "APT_JOBS_STOP_TIMEOUT_S": "2",
        "APT_JOBS_ENTRY_POINTS": ENTRY_POINTS,
        "PYTHONPATH": str(ROOT),
    }
    running.start_web()
    made = [Lane(running, f"lane-{index}") for index in range(number)]
    try:
        yield made
    finally:
        for lane in made:
            running.kill(lane.name)
        until(lambda: not any(lane.job_id and marked(lane.job_id) for lane in made))


def test_what_is_killed_is_replaced(tmp_path: Path, process_test_url: str, forker: Forker) -> None:
    with (
        campaign(3, "kill -9, and the next attempt trains on") as found,
        service(tmp_path / "s", process_test_url, forker) as running,
        lanes(running, LANES) as made,
    ):
        found.on(running.database.dialect)
        plan = [victim for victim in VICTIMS for _ in range(count(1, 25))]
        random.Random(found.seed).shuffle(plan)
        lock = threading.Lock()

        def fell(lane: Lane) -> None:
            lane.submit("count")
            while True:
                with lock:
                    if not plan:
                        break
                    victim = plan.pop()
                kill_and_judge(lane, victim, found)
            cancel(lane)

        with ThreadPoolExecutor(LANES) as pool:
            for done in [pool.submit(fell, lane) for lane in made]:
                done.result()
        found.violations += faults_in(running.database)


def test_ranks_that_hang_are_replaced(tmp_path: Path, process_test_url: str, forker: Forker) -> None:
    """A frozen rank is as silent as one in a collective that never ends. Its tree does not react to SIGTERM either."""
    with (
        campaign(3, "SIGSTOP of a rank, and the next attempt trains on") as found,
        service(tmp_path / "s", process_test_url, forker) as running,
    ):
        found.on(running.database.dialect)
        running.environment |= {"APT_JOBS_STALL_TIMEOUT_S": str(STALL_TIMEOUT_S)}
        with lanes(running, 1) as [lane]:
            lane.submit("count")
            for _ in range(count(1, 5)):
                freeze_and_judge(lane, found)
            cancel(lane)
        found.violations += faults_in(running.database)


def freeze_and_judge(lane: Lane, found: Campaign) -> None:
    until(lambda: saved_steps(lane))
    attempt = lane.job().attempt
    began = time.monotonic()
    send(until(lambda: lane.pids("rank", attempt)), signal.SIGSTOP)
    found.fault("frozen rank")
    until(lambda: lane.job().attempt > attempt and saved_steps(lane))
    found.recovered(time.monotonic() - began)
    found.tried()
    with lane.running.database.read() as session:
        why = list_attempts(session, lane.job_id)[-2].reason
    if why is None or "considered hung" not in why:
        found.violations.append(f"attempt {attempt} ended as {why}")
    if left := marked_processes(f"{lane.job_id}:{attempt}"):
        found.violations.append(f"left processes {left}")


def kill_and_judge(lane: Lane, victim: str, found: Campaign) -> None:
    """Once the attempt has saved: kill, and see another one go on from there, with nothing left of the first."""
    until(lambda: saved_steps(lane))
    attempt = lane.job().attempt
    pids = until(lambda: lane.pids(victim, attempt))
    began = time.monotonic()
    send(pids, signal.SIGKILL)
    found.fault(victim)
    if victim in ("worker", "machine"):
        lane.running.restart(lane.name)
    until(lambda: lane.job().attempt > attempt and saved_steps(lane))
    took_s = time.monotonic() - began
    found.recovered(took_s)
    found.tried()
    with lane.running.database.read() as session:
        ended, last = list_attempts(session, lane.job_id)[-2:]
        last_saved = max(saved_steps(lane, attempt))
    if took_s > RESUMES_WITHIN_S:
        found.violations.append(f"{victim}: went on after {took_s:.0f} s")
    if last.attempt != attempt + 1 or last.resumed_from_step != last_saved:
        found.violations.append(
            f"{victim}: {last.attempt} after {attempt}, from {last.resumed_from_step}, not {last_saved}"
        )
    if (ended.last_step or 0) - last_saved > SAVED_EVERY:
        found.violations.append(f"{victim}: step {ended.last_step} was lost, saved at {last_saved}")
    if left := marked_processes(f"{lane.job_id}:{attempt}"):
        found.violations.append(f"{victim}: left processes {left}")


def test_a_cancelled_job_never_runs_again(tmp_path: Path, process_test_url: str, forker: Forker) -> None:
    with (
        campaign(5, "cancel, twice, in each situation") as found,
        service(tmp_path / "s", process_test_url, forker) as running,
        lanes(running, LANES) as made,
    ):
        found.on(running.database.dialect)
        plan = [situation for situation in SITUATIONS for _ in range(count(1, 8))]
        random.Random(found.seed).shuffle(plan)
        lock = threading.Lock()
        cancelled: list[tuple[str, int]] = []

        def run(lane: Lane) -> None:
            while True:
                with lock:
                    if not plan:
                        return
                    situation = plan.pop()
                situation(lane)
                found.tried()
                found.fault(situation.__name__)
                took_s = cancel(lane)
                found.recovered(took_s)
                if took_s > CANCELS_WITHIN_S:
                    found.violations.append(f"{situation.__name__}: cancelled after {took_s:.0f} s")
                cancelled.append((lane.job_id, lane.job().attempt))
                steer(lane, drained=False)

        with ThreadPoolExecutor(LANES) as pool:
            for done in [pool.submit(run, lane) for lane in made]:
                done.result()
        for lane in made:  # the workers are free, and have taken what waited
            running_one(lane)
            cancel(lane)
        for job_id, attempt in cancelled:
            with running.database.read() as session:
                job = get_job(session, job_id)
            if (job.state, job.attempt) != ("cancelled", attempt) or marked(job_id):
                found.violations.append(f"{job_id} went on after it was cancelled: {job.state}")
        found.violations += faults_in(running.database)


def cancel(lane: Lane) -> float:
    """Twice, which is as once; how many seconds it took."""
    began = time.monotonic()
    for _ in range(2):
        with lane.running.database.write() as session:
            request_cancel(session, lane.job_id)
    until(lambda: lane.job().state == "cancelled" and not marked(lane.job_id))
    return time.monotonic() - began


def test_a_poison_job_is_given_up(tmp_path: Path, process_test_url: str, forker: Forker) -> None:
    with (
        campaign(7, "a training that always dies") as found,
        service(tmp_path / "s", process_test_url, forker) as running,
        lanes(running, min(LANES, count(1, LANES))) as made,
    ):
        found.on(running.database.dialect)
        for _ in range(count(1, 5)):
            began = time.monotonic()
            for lane in made:
                lane.submit("die")
            for lane in made:
                until(lambda: lane.job().state not in ("queued", "running"))  # noqa: B023
                job = lane.job()
                found.tried()
                for _ in range(job.attempt):
                    found.fault("death")
                if job.state != "dead" or job.attempt > 3:
                    found.violations.append(f"{job.id}: {job.state} after {job.attempt} attempts")
            found.recovered(time.monotonic() - began)
        found.violations += faults_in(running.database)


def queued(lane: Lane) -> None:
    until(lambda: steer(lane, drained=True))
    lane.submit("count")


def starting(lane: Lane) -> None:
    lane.submit("count")
    until(lambda: lane.job().state == "running")


def running_one(lane: Lane) -> None:
    starting(lane)
    until(lambda: saved_steps(lane))


def stubborn(lane: Lane) -> None:
    lane.submit("stubborn")
    until(lambda: has_logged(lane))


def pausing(lane: Lane) -> None:
    running_one(lane)
    with lane.running.database.write() as session:
        request_pause(session, lane.job_id)


def no_worker(lane: Lane) -> None:
    running_one(lane)
    lane.running.restart(lane.name)


def redelivered(lane: Lane) -> None:
    """The wake-up is sent again while the job runs, and after it was cancelled."""
    running_one(lane)
    lane.running.wake_up(lane.name)
    threading.Timer(1.0, lane.running.wake_up, (lane.name,)).start()


SITUATIONS: tuple[Callable[[Lane], None], ...] = (
    *(queued, starting, running_one, stubborn, pausing, no_worker, redelivered),
)


def steer(lane: Lane, *, drained: bool) -> bool:
    """Whether the worker is known already."""
    try:
        with lane.running.database.write() as session:
            set_drained(session, lane.name, drained=drained)
    except NotFound:
        return False
    return True


def saved_steps(lane: Lane, attempt: int | None = None) -> list[int]:
    return lane.running.saved_steps(lane.job_id, attempt)


def has_logged(lane: Lane) -> bool:
    with lane.running.database.read() as session:
        query = select(EventRow.seq).where(EventRow.job_id == lane.job_id, EventRow.kind == LineLogged.kind)
        return session.scalar(query.limit(1)) is not None


def is_child_of(pid: int, parents: list[int]) -> bool:
    try:
        return psutil.Process(pid).ppid() in parents
    except psutil.NoSuchProcess:
        return False
