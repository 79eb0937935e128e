"""The servers of the stream benchmark: `apt-jobs web` and its peers, on a core of their own, fed by one Redis."""

import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from apt_jobs.events.live import channel_of
from apt_jobs.settings import Settings
from apt_jobs.workers.embedded import free_port
from benchmarks.stream_peers import command_of
from benchmarks.submit import service

START_DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True)
class Server:
    """A running server."""

    name: str  # "ours" or a peer's
    settings: Settings
    key: str
    port: int
    pid: int

    def channel(self, job_id: str) -> str:
        """Return where it gets its messages."""
        if self.name == "ours":
            return channel_of(job_id)
        return job_id if self.name == "naive" else f"bench-{self.name}"

    def url(self, job_id: str, after: int) -> str:
        """Return where a client connects, to see what follows `after`."""
        path = {
            "ours": f"/ws/jobs/{job_id}?after={after}",
            "naive": f"/{job_id}",
            "ranges": f"/{job_id}?after={after}",
            "socket.io": "/socket.io/?EIO=4&transport=websocket",
        }.get(self.name, "/")
        return f"ws://127.0.0.1:{self.port}{path}"

    def cpu_s(self) -> float:
        times = psutil.Process(self.pid).cpu_times()
        return times.user + times.system

    def rss_bytes(self) -> int:
        return int(psutil.Process(self.pid).memory_info().rss)


@contextmanager
def servers(names: Sequence[str]) -> Iterator[tuple[Server, list[Server]]]:
    """Ours, and the peers of these names. Whoever runs this has the other cores meanwhile."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stack.enter_context(_cores(lambda cores: cores[1:]))
        settings, key = stack.enter_context(service(Path(folder)))
        [web] = [child for child in psutil.Process().children() if "apt_jobs" in child.cmdline()]
        for thread in web.threads():
            os.sched_setaffinity(thread.id, sorted(_ALL_CORES)[:1])
        ours = Server("ours", settings, key, settings.port, web.pid)
        yield ours, [stack.enter_context(_peer(name, settings, key)) for name in names]


@contextmanager
def _peer(name: str, settings: Settings, key: str) -> Iterator[Server]:
    port = free_port("127.0.0.1", settings.port + 1)
    socket_path = settings.redis.removeprefix("unix://").partition("?")[0]
    environment = {
        "BENCH_SOCKET": socket_path,
        "BENCH_PORT": str(port),
        "BENCH_CHANNEL": f"bench-{name}",
        "BENCH_DATABASE": settings.database,
    }
    command = command_of(name)
    with _cores(lambda cores: cores[:1]):
        process = subprocess.Popen(command, env={**os.environ, **environment})
    try:
        _wait_for_port(port, process)
        yield Server(name, settings, key, port, process.pid)
    finally:
        process.kill()  # a naive one never sees that its browsers left: it would not stop by itself
        process.wait()


def _wait_for_port(port: int, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert process.poll() is None, "a peer ended"
        assert time.monotonic() < deadline, "a peer did not start"
        time.sleep(0.1)


@contextmanager
def _cores(choose: Callable[[list[int]], list[int]]) -> Iterator[None]:
    """Bind this process, and those started meanwhile, to some of the cores."""
    before = os.sched_getaffinity(0)
    allowed = sorted(_ALL_CORES)
    if len(allowed) > 1:
        os.sched_setaffinity(0, choose(allowed))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


_ALL_CORES = os.sched_getaffinity(0)
