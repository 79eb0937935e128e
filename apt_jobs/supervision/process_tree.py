"""The processes of one attempt: torchrun and its ranks, which put themselves into sessions of their own.

Killing a process group or torchrun alone would leave ranks behind that hold the GPUs. So: the supervisor is a
subreaper, torchrun gets SIGTERM when its parent dies, ranks ask for SIGKILL when torchrun dies, and every process
carries a marker in its environment by which what is left can be found. A process that cleared its environment is still
a descendant of the supervisor.
"""

import ctypes
import logging
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from apt_jobs.errors import Unavailable
from apt_jobs.run.parent import die_with_parent

logger = logging.getLogger(__name__)

MARKER = "APT_JOBS_ATTEMPT"  # environment variable: "<job id>:<attempt>"
WORKER_MARKER = "APT_JOBS_WORKER"  # environment variable: whose GPUs a process uses
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
KILL_TIMEOUT_S = 30.0  # a process that hangs in the kernel ends when that returns, and runs no code before
_POLL_S = 0.02
_LIBC = ctypes.CDLL(None, use_errno=True)


def adopt_orphans() -> None:
    """Make this process the parent of all descendants whose own parent dies (Linux only).

    All processes that it has then are of its one tree, whatever they did to their environment.
    """
    if hasattr(_LIBC, "prctl"):
        _adoption.is_on = _LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1) == 0


class _Adoption:
    """Whether this process adopts orphans."""

    is_on = False


_adoption = _Adoption()


class ProcessTree:
    """One started command with all that descends from it. Start it from the main thread."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        marker: str,
        log_file: Path,
        limits: Mapping[int, int] | None = None,
        *,
        ignore_sigterm: bool = False,
    ) -> None:
        """`limits` are of each process, by the names of `resource`, as RLIMIT_FSIZE; they are inherited.

        `ignore_sigterm`: each process ignores SIGTERM until it says otherwise; it is inherited as well.
        """
        self._marker = marker

        def prepare() -> None:  # system calls only
            die_with_parent(signal.SIGKILL if ignore_sigterm else signal.SIGTERM)
            if ignore_sigterm:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            for name, value in (limits or {}).items():
                resource.setrlimit(name, (value, value))

        with log_file.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env={**environment, MARKER: marker},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=prepare,  # before this process has threads
            )

    def poll(self) -> int | None:
        """Exit status of the command (negative: the signal that killed it), or None while it runs."""
        return self._process.poll()

    def terminate(self, timeout_s: float) -> None:
        """End the whole tree: SIGTERM, after `timeout_s` seconds as `kill`."""
        send(self._members(), signal.SIGTERM)
        deadline = time.monotonic() + timeout_s
        while self._members() and time.monotonic() < deadline:
            self._reap()
            time.sleep(_POLL_S)
        self.kill()

    def kill(self) -> None:
        """SIGKILL until nothing of the tree is left but what hangs in the kernel for longer than `KILL_TIMEOUT_S`."""
        _kill(self._members, self._marker, self._reap)
        self._reap()

    def _members(self) -> list[int]:
        """Return living processes that carry the marker, or descend from this process though they lost it."""
        members = set(marked_processes(self._marker))
        if _adoption.is_on:
            members.update(child.pid for child in _descendants())
        return sorted(members)

    def _reap(self) -> None:
        """Collect the exit status of the command and of adopted orphans, so that they do not stay as zombies."""
        if self._process.poll() is None:
            return
        try:
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        except ChildProcessError:
            pass


def clear_leftovers(marker: str, timeout_s: float, variable: str = WORKER_MARKER) -> int:
    """Wait for what is left of a worker or of an attempt to end, SIGKILL it after `timeout_s` seconds.

    The supervisor ends ranks when it notices that its worker is gone; until then they hold the GPUs. Returns how many
    processes there were.

    Raises:
        Unavailable: some cannot be ended.
    """
    found = marked_processes(marker, variable)
    deadline = time.monotonic() + timeout_s
    while marked_processes(marker, variable) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    if left := kill_marked(marker, variable):
        pids = ", ".join(map(str, left))
        raise Unavailable(f"earlier ranks of this worker hang in the kernel and hold its GPUs: processes {pids}")
    return len(found)


def kill_marked(marker: str, variable: str = MARKER, meanwhile: Callable[[], None] = lambda: None) -> list[int]:
    """SIGKILL until nothing carries the marker; after `KILL_TIMEOUT_S` return what hangs in the kernel."""
    return _kill(lambda: marked_processes(marker, variable), marker, meanwhile)


def _kill(find: Callable[[], list[int]], marker: str, meanwhile: Callable[[], None]) -> list[int]:
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while left := find():
        if time.monotonic() > deadline:
            logger.error("processes do not end on SIGKILL", extra={"marker": marker, "pids": left})
            break
        send(left, signal.SIGKILL)
        meanwhile()
        time.sleep(_POLL_S)
    return left


def marked_processes(marker: str, variable: str = MARKER) -> list[int]:
    """Return living processes of this user whose environment carries `marker`, wherever they are in the tree."""
    wanted = f"{variable}={marker}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if entry.stat().st_uid != os.getuid() or int(entry.name) == os.getpid():
                continue
            if wanted in (entry / "environ").read_bytes().split(b"\0") and not _is_zombie(entry):
                found.append(int(entry.name))
        except OSError:
            continue  # it ended meanwhile, or it is not ours to read
    return found


def send(pids: Sequence[int], number: signal.Signals) -> None:
    """Signal each process; those that are gone do not matter."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _descendants() -> list[psutil.Process]:
    """Return living processes that descend from this one."""
    try:
        children = psutil.Process().children(recursive=True)
    except psutil.Error:
        return []
    return [child for child in children if not _is_over(child)]


def _is_over(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return True


def _is_zombie(entry: Path) -> bool:
    return (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
