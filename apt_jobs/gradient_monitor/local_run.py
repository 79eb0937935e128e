"""Where a training outside of any job writes its spools: one folder a run, the same name on all ranks.

`apt-jobs import FOLDER` shows it later (`apt_jobs/supervision/imported_run.py`).
"""

import os
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.distributed as dist

from apt_jobs.events.spool import SpoolWriter
from apt_jobs.jobs.run_file import spool_name

RUNS_DIR = Path("apt_jobs_runs")  # below the folder in which the training was started
MAX_SPOOL_BYTES = 1 << 30  # of a rank: 300,000 steps of 150 layers; later events are dropped and counted


def run_name(device: torch.device) -> str:
    """`TIME-PID` of the first rank. Called by every rank; one collective."""
    mine = torch.tensor([time.time_ns() // 1000, os.getpid()], dtype=torch.int64, device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(mine, 0)
    began_us, pid = mine.tolist()
    return f"{datetime.fromtimestamp(began_us / 1e6, UTC):%Y%m%dT%H%M%S.%f}-{pid}"


def open_local_spool(folder: Path, rank: int) -> SpoolWriter | None:
    """Return the spool of one rank; None, with a warning, if it cannot be written: the training goes on without."""
    try:
        return SpoolWriter(folder / spool_name(rank), MAX_SPOOL_BYTES)
    except OSError as exc:
        warnings.warn(f"this run is not recorded in {folder}: {exc}", RuntimeWarning, stacklevel=3)
        return None
