"""Python environments that `uv` builds for jobs: `<environments>/<hash>`, once for each hash, shared by jobs.

Who uses one holds `<hash>.lock` beside it with others, who builds it holds it alone, and nothing that is held is
removed. A file that is written last tells that it is whole; without it the next job builds it again.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from apt_jobs.artifacts.shared_space import prune_shared, size_of_folder
from apt_jobs.errors import InvalidInput, OutOfSpace, WorkerLacks
from apt_jobs.folder_lock import FolderLock, lock_path
from apt_jobs.jobs.python_environment import environment_hash
from apt_jobs.jobs.run_file import EnvironmentPlan

RECORD_NAME = ".apt_jobs.json"
CACHE_NAME = ".cache"  # of what uv downloaded
PROGRESS_EVERY_S = 15.0
MAX_REASON_CHARS = 1_500
MAX_REASON_LINES = 20
_POLL_S = 0.1
_TAIL_BYTES = 16_384
_NO_ROOM = "No space left on device"
_NETWORK = ("error sending request", "dns error", "HTTP status", "operation timed out", "network was disabled")
_OF_A_PACKAGE = "Failed to build"  # whatever it lacked, the job chose it


class EnvironmentRecord(BaseModel):
    """What a whole environment has."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    python: str
    packages: list[str]  # name==version
    built_at: datetime


class StopRequested(Exception):  # no error: the attempt was asked to end
    """The attempt was asked to stop while its environment was built."""


class EnvironmentBuilder:
    """Finds or builds the environment of one attempt. Constructing it touches nothing."""

    def __init__(
        self, plan: EnvironmentPlan, log_file: Path, environment: Mapping[str, str], wait: Callable[[], None]
    ) -> None:
        """`environment` is what uv sees; `wait` is called often, and raises when the attempt is to end."""
        self._plan, self._log_file, self._wait_once = plan, log_file, wait
        self._root = plan.environments_dir
        self._deadline_s = time.monotonic() + plan.timeout_s
        self._noted_s = time.monotonic()
        self._environment = {
            **{name: value for name, value in environment.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")},
            "UV_CACHE_DIR": str(self._root / CACHE_NAME),
            "UV_PYTHON_INSTALL_DIR": str(self._root / ".pythons"),
            "UV_NO_PROGRESS": "1",
            "NO_COLOR": "1",
        }

    def provide(self, packages: str, *, is_lock: bool) -> tuple[Path, FolderLock]:
        """Return a whole environment and its lock, held with others.

        Args:
            packages: Lines of a requirements file.
            is_lock: They are all that is installed; nothing is resolved.

        Raises:
            InvalidInput: it cannot be built of these packages; the message has uv's last lines.
            WorkerLacks: uv, the Python or the network is not there, or it took too long.
            OutOfSpace: the disk is full.
        """
        folder = self._root / environment_hash(self._plan.python, packages, is_lock=is_lock)
        lock = FolderLock(lock_path(folder))
        while True:
            if lock.try_shared() and find_environment(folder) is not None:
                os.utime(folder)
                return folder, lock
            if lock.try_exclusive():
                if find_environment(folder) is None:
                    self._build(folder, packages, is_lock=is_lock)
                    self._prune()
            else:
                self._wait(f"waits for another job that builds the environment {folder.name[:12]}")

    def _build(self, folder: Path, packages: str, *, is_lock: bool) -> None:
        uv = find_uv()
        if folder.exists():
            shutil.rmtree(folder)
        self._note(f"builds the environment {folder.name[:12]}: Python {self._plan.python}")
        try:
            if status := self._run(
                [uv, "venv", "--quiet", "--no-project", "--python", _base_python(self._plan), str(folder)]
            ):
                raise _fault(status, self._tail(), f"this worker has no Python {self._plan.python}", is_python=True)
            listed, python = folder / "requirements.txt", str(folder / "bin" / "python")
            listed.write_text(packages)
            how = ["sync", "--allow-empty-requirements"] if is_lock else ["install", "-r"]
            if status := self._run([uv, "pip", *how, str(listed), "--python", python]):
                raise _fault(status, self._tail(), "the environment cannot be built")
            _write_record(folder, self._environment, uv)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._note("the environment is built")

    def _prune(self) -> None:
        """Remove what is too much; of uv's cache, which nothing else bounds, all."""
        prune_shared(self._root, self._plan.max_bytes, self._plan.max_unused_s)
        if size_of_folder(self._root / CACHE_NAME) > self._plan.max_bytes:
            self._run([find_uv(), "cache", "clean"])

    def _run(self, words: Sequence[str]) -> int:
        """Run uv; return its exit status. Its output joins the log of the attempt."""
        self._began_bytes = self._log_file.stat().st_size
        with self._log_file.open("ab") as log:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment, cwd=self._root
            )
        try:
            while process.poll() is None:
                self._wait("is still building the environment")
            return process.returncode
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()

    def _wait(self, what: str) -> None:
        self._wait_once()
        now_s = time.monotonic()
        if now_s > self._deadline_s:
            raise WorkerLacks(
                f"the environment was not ready within {self._plan.timeout_s:g} s: list fewer packages, or have the "
                "operator raise APT_JOBS_ENVIRONMENT_TIMEOUT_S"
            )
        if now_s - self._noted_s > PROGRESS_EVERY_S:
            self._note(what)
        time.sleep(_POLL_S)

    def _note(self, message: str) -> None:
        self._noted_s = time.monotonic()
        with self._log_file.open("a") as log:
            log.write(f"{message}\n")

    def _tail(self) -> str:
        """Return the last lines of what `_run` ran."""
        with self._log_file.open("rb") as log:
            log.seek(max(self._began_bytes, self._log_file.stat().st_size - _TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-MAX_REASON_LINES:])[-MAX_REASON_CHARS:]


def find_environment(folder: Path) -> EnvironmentRecord | None:
    """Return what a built environment has; None: it is not whole."""
    try:
        return EnvironmentRecord.model_validate_json((folder / RECORD_NAME).read_bytes())
    except (OSError, ValidationError):
        return None


def find_uv() -> str:
    """Return the path of uv: that beside this Python, else the first of PATH.

    Raises:
        WorkerLacks: there is none.
    """
    beside = Path(sys.executable).with_name("uv")
    found = str(beside) if beside.is_file() else shutil.which("uv")
    if found is None:
        raise WorkerLacks("this worker has no uv, which builds environments: pip install uv")
    return found


def _base_python(plan: EnvironmentPlan) -> str:
    """Return what uv is to begin with: the Python of this service, if it is of the version, else any that uv finds."""
    is_ours = plan.python == f"{sys.version_info.major}.{sys.version_info.minor}"
    return str(getattr(sys, "_base_executable", sys.executable)) if is_ours else plan.python


def _write_record(folder: Path, environment: Mapping[str, str], uv: str) -> None:
    python = str(folder / "bin" / "python")
    frozen = _output([uv, "pip", "freeze", "--python", python], environment)
    version = _output([python, "-c", "import platform; print(platform.python_version())"], environment)
    record = EnvironmentRecord(
        python=version.strip(), packages=frozen.splitlines(), built_at=datetime.now(UTC).replace(microsecond=0)
    )
    temporary = folder / f"{RECORD_NAME}.new"
    temporary.write_text(record.model_dump_json())
    temporary.replace(folder / RECORD_NAME)


def _output(words: Sequence[str], environment: Mapping[str, str]) -> str:
    try:
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=True, timeout=60.0).stdout
    except (OSError, subprocess.SubprocessError) as exc:
        raise WorkerLacks(f"the environment was built and cannot be read: {exc}") from exc


def _fault(status: int, tail: str, what: str, *, is_python: bool = False) -> InvalidInput | WorkerLacks | OutOfSpace:
    """Return whose fault it is that uv ended so."""
    message = f"{what}: {tail}" if tail.strip() else f"{what}: uv exited with {status}"
    if _NO_ROOM in tail:
        return OutOfSpace(message)
    has_network = _OF_A_PACKAGE in tail or not any(word in tail for word in _NETWORK)
    if status < 0 or is_python or not has_network:
        return WorkerLacks(message)
    return InvalidInput(message)
