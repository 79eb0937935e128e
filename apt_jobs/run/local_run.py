"""A script outside of any job: the same contract on a local folder, which `apt-jobs import` shows later.

The folder is below `apt_jobs_runs/` where the script was started. Ranks of one torchrun share it: they have the same
parent, whose start and process id name the folder.
"""

import json
import os
from datetime import UTC, datetime
from pathlib import Path

from apt_jobs.jobs.handover import RUN_FILE_VARIABLE, Handover
from apt_jobs.run.event_file import print_error

RUNS_DIR = Path("apt_jobs_runs")
MAX_SPOOL_BYTES = 1 << 30  # of a rank


def open_local_run(num_ranks: int) -> Handover:
    """Make the folder, and name its run file in the environment for children and for the gradient monitor."""
    is_rank = "RANK" in os.environ
    pid = os.getppid() if is_rank else os.getpid()
    folder = Path.cwd() / RUNS_DIR / f"{_began(pid):%Y%m%dT%H%M%S}-{pid}"
    handover = Handover(
        job_id=None,
        attempt=1,
        num_ranks=num_ranks,
        run_dir=folder,
        output_dir=folder / "output",
        checkpoints_dir=folder / "checkpoints",
        checkpoint_prefix="local",
        keep_checkpoints=1_000,
    )
    try:
        handover.output_dir.mkdir(parents=True, exist_ok=True)
        document = {
            "job_id": None,
            "attempt": 1,
            "spec": {"num_ranks": num_ranks, "training": {"keep_checkpoints": handover.keep_checkpoints}},
            "run_dir": str(folder),
            "output_dir": str(handover.output_dir),
            "checkpoints_dir": str(handover.checkpoints_dir),
            "checkpoint_prefix": handover.checkpoint_prefix,
        }
        temporary = folder / f".run-{os.getpid()}.json"
        temporary.write_text(json.dumps(document, indent=1))
        temporary.rename(folder / "run.json")
        os.environ[RUN_FILE_VARIABLE] = str(folder / "run.json")
    except OSError as exc:
        print_error(f"apt_jobs: this run is not recorded in {folder}: {exc}")
    return handover


def _began(pid: int) -> datetime:
    """Return when a process began, the same for all who ask; now where /proc does not say it."""
    try:
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        lines = Path("/proc/stat").read_text().splitlines()
        booted_s = next(int(line.split()[1]) for line in lines if line.startswith("btime "))
        return datetime.fromtimestamp(booted_s + ticks // os.sysconf("SC_CLK_TCK"), UTC)
    except (OSError, ValueError, IndexError, StopIteration):
        return datetime.now(UTC)
