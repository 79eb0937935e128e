"""Finds what an attempt runs with and notes it in its row, beside the training: only its own end waits for that."""

import importlib.metadata
import logging
import platform
import re
import socket
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import ValidationError
from sqlalchemy import select

from apt_jobs.backoff import Backoff
from apt_jobs.db.attempt_facts import record_facts
from apt_jobs.db.engine import Database
from apt_jobs.db.models import WorkerRow
from apt_jobs.errors import AptJobsError
from apt_jobs.jobs.attempt_facts import MAX_PACKAGES, AttemptFacts, PythonFacts
from apt_jobs.jobs.run_file import RunFile

logger = logging.getLogger(__name__)

PYTHON_FACTS = "python.json"  # of an attempt's folder, written by `set_up` before the command begins
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
MAX_TRIES = 5
CLOSE_TIMEOUT_S = 5.0
RETRY = Backoff(0.5, 5.0)
_LOOK_S = 0.2
_DRIVER = re.compile(r"\b\d{3}\.\d+(\.\d+)?\b")


class FactsRecorder:
    """A thread that finds and notes the facts of one attempt."""

    def __init__(self, database: Database, run_file: RunFile, worker_name: str, gpus: Sequence[int]) -> None:
        self._database, self._run_file = database, run_file
        self._worker_name, self._gpus = worker_name, frozenset(gpus)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="facts", daemon=True)

    def __enter__(self) -> Self:
        """Begin. Nothing that goes wrong here reaches the attempt."""
        self._thread.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give what is found a moment to be noted."""
        self._ending.set()
        self._thread.join(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        try:
            python = self._python()
            if python is not None:
                self._record(python)
        except Exception:  # the edge of the thread: an attempt without facts is one all the same
            logger.exception("the facts of the attempt are not noted", extra={"job_id": self._run_file.job_id})

    def _python(self) -> PythonFacts | None:
        """Return what runs; None: the attempt ended before its environment was there."""
        if self._run_file.environment is None:
            return PythonFacts(python=platform.python_version(), packages=installed_packages())
        file = self._run_file.run_dir / PYTHON_FACTS
        while not file.is_file():
            if self._ending.wait(_LOOK_S):
                return None
        try:
            return PythonFacts.model_validate_json(file.read_bytes())
        except ValidationError:
            return None

    def _record(self, python: PythonFacts) -> None:
        run_file = self._run_file
        for number in range(1, MAX_TRIES + 1):
            try:
                with self._database.read() as session:
                    row = session.scalar(select(WorkerRow.gpus).where(WorkerRow.name == self._worker_name))
                gpus = [str(gpu.get("name")) for gpu in row or [] if gpu.get("index") in self._gpus]
                facts = attempt_facts(run_file, python, gpus)
                with self._database.write() as session:
                    record_facts(session, run_file.job_id, run_file.attempt, facts)
                return
            except AptJobsError as exc:
                logger.warning("the facts of the attempt wait", extra={"job_id": run_file.job_id, "why": str(exc)})
                if self._ending.wait(RETRY.wait_s(number)):
                    return


def attempt_facts(run_file: RunFile, python: PythonFacts, gpus: Sequence[str]) -> AttemptFacts:
    """Put together what an attempt runs with."""
    code, validation = run_file.spec.code, run_file.validation_source
    return AttemptFacts(
        **dict(python),
        host=socket.gethostname(),
        system=platform.platform(),
        gpus=list(gpus),
        gpu_driver=_gpu_driver() if gpus else None,
        dataset_sha256=run_file.dataset_sha256,
        validation_dataset_sha256=None if validation is None else validation.sha256,
        code=None if code is None else code.sha256 or (code.git.commit if code.git else None),
    )


def installed_packages(folders: Iterable[str] | None = None) -> list[str]:
    """Return the packages of this Python, or of other folders, as `name==version`."""
    found = (
        importlib.metadata.distributions() if folders is None else importlib.metadata.distributions(path=list(folders))
    )
    names = {f"{one.metadata['Name']}=={one.version}" for one in found if one.metadata and one.metadata["Name"]}
    return sorted(names, key=str.lower)[:MAX_PACKAGES]


def _gpu_driver() -> str | None:
    try:
        found = _DRIVER.search(NVIDIA_DRIVER.read_text())
    except OSError:
        return None
    return found[0] if found else None
