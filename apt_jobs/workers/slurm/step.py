"""The step of an allocation: `srun python -m apt_jobs.workers.slurm.step`. It is to the supervisor what a worker is.

Slurm sends SIGTERM to all processes of a step before it takes the allocation away: this one has the supervisor save
and leave; the ranks ignore it. Of several allocations of one attempt, as after a repeated submission, the first works.
"""

import argparse
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from apt_jobs.db.engine import Database
from apt_jobs.db.jobs import owns
from apt_jobs.errors import AptJobsError, WorkerLacks
from apt_jobs.logs import configure_logging
from apt_jobs.private_files import keep_private
from apt_jobs.settings import Settings
from apt_jobs.supervision.lease import kept_until_first_beat
from apt_jobs.workers.slurm.allocation import (
    is_of_this_allocation,
    node_rank_of,
    num_nodes_of,
    serve_node,
    take_nodes,
)
from apt_jobs.workers.slurm.request import Attempt

logger = logging.getLogger(__name__)

BEGUN = "slurm-step"  # file in the folder of an attempt: id of the Slurm job that works on it
ENVIRONMENT = "slurm-environment.json"  # of the worker; the step removes it, as it has passwords
POLL_S = 0.2
OF_THE_ALLOCATION = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "TMPDIR")


def step_environment(environment: Mapping[str, str], data_dir: Path) -> dict[str, str]:
    """Return what a step gets of its worker's environment: nothing of Slurm or of a surrounding allocation."""
    kept = {name: value for name, value in environment.items() if not name.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
    if (path := kept.pop("LD_LIBRARY_PATH", None)) is not None:
        folders = [folder for folder in path.split(os.pathsep) if folder and "slurm" not in folder.lower()]
        kept |= {"LD_LIBRARY_PATH": os.pathsep.join(folders)} if folders else {}
    return {**kept, "APT_JOBS_DATA_DIR": str(data_dir)}


def begin(folder: Path) -> bool:
    """Take the attempt for this allocation; False: another one has it."""
    try:
        fd = os.open(folder / BEGUN, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return False
    with os.fdopen(fd, "w") as file:
        file.write(os.environ.get("SLURM_JOB_ID", ""))
    return True


def take_environment(folder: Path) -> bool:
    """Become a process with the worker's environment, and what Slurm says of the allocation.

    Returns:
        False: the worker took it away, as the attempt ended before its allocation began.
    """
    file = folder / ENVIRONMENT
    try:
        given: dict[str, str] = json.loads(file.read_text())
        if num_nodes_of(os.environ) == 1:  # else the worker removes it, when all have read it
            file.unlink()
    except FileNotFoundError:
        return False
    own = {name: value for name, value in os.environ.items() if name.startswith("SLURM_") or name in OF_THE_ALLOCATION}
    os.environ.clear()
    os.environ.update({**given, **own})
    if (cpus := own.get("SLURM_CPUS_PER_TASK", own.get("SLURM_CPUS_ON_NODE", ""))).isdigit():
        os.environ["APT_JOBS_WORKER_CPUS"] = cpus
    if num_nodes_of(own) > 1:
        os.environ.setdefault("APT_JOBS_RENDEZVOUS_HOST", socket.gethostname())
    return True


def gpus_of_allocation(environment: Mapping[str, str]) -> list[int]:
    """Return the indexes of the GPUs that Slurm gave.

    Raises:
        WorkerLacks: it names them otherwise.
    """
    names = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if not all(name.strip().isdigit() for name in names):
        raise WorkerLacks(f"Slurm names GPUs {', '.join(names)}, where indexes are expected")
    return [int(name) for name in names]


class Step:
    """The supervisor of one attempt, and the pipe to it."""

    def __init__(self, settings: Settings, database: Database, job_id: str, attempt: int, worker_name: str) -> None:
        self._settings, self._database = settings, database
        self._job_id, self._attempt, self._worker_name = job_id, attempt, worker_name
        self._pool = Attempt(job_id, attempt, worker_name, settings.root).name

    def run(self, leave: threading.Event) -> int:
        """Return the supervisor's exit status. `leave`: set once the allocation ends."""
        attempt = (self._job_id, self._attempt)
        with kept_until_first_beat(self._database, self._settings, *attempt) as beating_fd:
            if not take_nodes(self._settings, self._database, attempt, self._pool):
                return 0
            supervisor = subprocess.Popen(
                [*self._command(), f"--beating-fd={beating_fd}"],
                stdin=subprocess.PIPE,
                text=True,
                start_new_session=True,
                pass_fds=[beating_fd],
            )
        is_asked = False
        while True:
            try:
                return supervisor.wait(POLL_S)
            except subprocess.TimeoutExpired:
                if leave.is_set() and not is_asked:
                    is_asked = True
                    _ask_to_leave(supervisor)

    def serve_node(self) -> int:
        """Be one of the further machines."""
        attempt = (self._job_id, self._attempt)
        serve_node(self._settings, self._database, attempt, self._pool, gpus_of_allocation(os.environ))
        return 0

    def _command(self) -> list[str]:
        gpus = gpus_of_allocation(os.environ)
        return [
            *(sys.executable, "-m", "apt_jobs.supervision.supervise"),
            f"--job-id={self._job_id}",
            f"--attempt={self._attempt}",
            f"--gpus={','.join(map(str, gpus))}",
            f"--num-nodes={num_nodes_of(os.environ)}",
            f"--worker-name={self._worker_name}",
            "--ignore-sigterm",
        ]


def _ask_to_leave(supervisor: "subprocess.Popen[str]") -> None:
    assert supervisor.stdin is not None
    try:
        supervisor.stdin.write("leave\n")
        supervisor.stdin.flush()
    except BrokenPipeError:
        logger.warning("the supervisor ended while it was asked to leave")


def main() -> int:
    """Entry of the process."""
    leave = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: leave.set())
    parser = argparse.ArgumentParser(description="Supervise an attempt on an allocation of Slurm.")
    parser.add_argument("--job-id", required=True)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--worker-name", required=True)
    parser.add_argument("--folder", type=Path, required=True, help="of the attempt")
    arguments = parser.parse_args()
    node_rank = node_rank_of(os.environ)
    if not (is_of_this_allocation(arguments.folder / BEGUN) if node_rank else begin(arguments.folder)):
        logger.warning("another allocation works on this attempt")
        return 0
    if not take_environment(arguments.folder):
        logger.warning("the attempt was over before its allocation began")
        return 0
    settings = Settings()
    configure_logging(settings.log_level)
    keep_private(settings.root)
    database = Database(settings.database)
    try:
        with database.read() as session:
            is_owner = owns(session, arguments.job_id, arguments.attempt)
        if not is_owner:
            logger.warning("the attempt is over already")
            return 0
        step = Step(settings, database, arguments.job_id, arguments.attempt, arguments.worker_name)
        return step.serve_node() if node_rank else step.run(leave)
    except AptJobsError as exc:
        logger.error("cannot supervise", extra={"why": str(exc)})
        return 1
    finally:
        database.dispose()


if __name__ == "__main__":
    sys.exit(main())
