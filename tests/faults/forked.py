"""Processes of a campaign as forks of one that has imported everything: a start costs 0.1 s, not one of a core.

They are real processes of `apt_jobs` in all else: killed, frozen and started again by their own pids.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Self

import apt_jobs.web.serve
import apt_jobs.workers.train  # noqa: F401
from apt_jobs.cli import app
from apt_jobs.run.parent import die_with_parent
from tests.faults.light_worker import work

LIGHT_WORKER = "light-worker"
_POLL_S = 0.005


class Forked:
    """One such process. It is not our child: its parent reaps it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def poll(self) -> bool:
        """Whether it has ended."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        return False

    def wait(self) -> None:
        while not self.poll():
            time.sleep(_POLL_S)

    def send_signal(self, number: signal.Signals) -> None:
        if not self.poll():
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Forker:
    """The one that forks them. They die with it, and it with us."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.forked"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Forked:
        """`apt-jobs ARGUMENTS`, or a light worker: `light-worker NAME QUEUE...`."""
        stdin, stdout = self._pipes()
        stdin.write(json.dumps({"arguments": arguments, "environment": environment, "log": str(log)}) + "\n")
        stdin.flush()
        return Forked(int(stdout.readline()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes():
            pipe.close()
        self._process.wait()

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        return self._process.stdin, self._process.stdout


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    for line in sys.stdin:
        order = json.loads(line)
        if (pid := os.fork()) == 0:
            status = 1
            try:
                become(order["arguments"], order["environment"], order["log"])
                status = 0
            finally:
                os._exit(status)
        print(pid, flush=True)


def become(arguments: list[str], environment: dict[str, str], log: str) -> None:
    """This process as if it had just been started so."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    die_with_parent(signal.SIGKILL)
    os.environ.clear()
    os.environ.update(environment)
    for number, name, flags in ((0, os.devnull, os.O_RDONLY), (1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)):
        opened = os.open(name, flags, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    os.dup2(1, 2)
    if arguments[0] == LIGHT_WORKER:
        work(*arguments[1:])
    else:
        app(arguments, standalone_mode=False)


if __name__ == "__main__":
    main()
