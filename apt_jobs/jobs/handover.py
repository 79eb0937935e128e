"""The run file as a user's script reads it: found through the environment, with the standard library alone.

`APT_JOBS_RUN_FILE` names it, so children, spawned processes and other virtual environments find it. The ranks of the
built-in trainer read the same file as `jobs/run_file.py`, whose checks need pydantic, which a script may lack.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apt_jobs.jobs.media import MEDIA_FOLDER

RUN_FILE_VARIABLE = "APT_JOBS_RUN_FILE"


@dataclass(frozen=True, slots=True)
class Handover:
    """What a script is given. Paths are absolute."""

    job_id: str | None  # None: outside of a job
    attempt: int
    num_ranks: int  # whose spools are read
    run_dir: Path
    output_dir: Path
    checkpoints_dir: Path
    checkpoint_prefix: str
    keep_checkpoints: int
    dataset: str | None = None
    dataset_file: Path | None = None
    datasets_dir: Path | None = None
    base_model_dir: Path | None = None
    resume_dir: Path | None = None
    resume_step: int = 0
    command: tuple[str, ...] = ()  # of a job that brings code

    @property
    def media_dir(self) -> Path:
        """Where images and tables go, the same for all attempts."""
        return self.output_dir.parent / MEDIA_FOLDER

    def spool_path(self, rank: int) -> Path:
        """Return the spool for a process of this rank; ranks that the script started itself use that of rank 0."""
        return self.run_dir / f"rank-{rank if rank < self.num_ranks else 0}.spool"


def read_handover() -> Handover | None:
    """Return what the environment hands over; None outside of a job, and where the file cannot be read."""
    name = os.environ.get(RUN_FILE_VARIABLE)
    if not name:
        return None
    try:
        return _parsed(json.loads(Path(name).read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def rank_of_process() -> int:
    """Return this process's rank as its launcher names it; 0 where nothing launched it."""
    for name in ("RANK", "SLURM_PROCID"):
        value = os.environ.get(name, "")
        if value.isdecimal():
            return int(value)
    return 0


def _parsed(document: dict[str, Any]) -> Handover:
    run_dir, spec = Path(document["run_dir"]), document["spec"]
    output_dir = document.get("output_dir")
    return Handover(
        job_id=document["job_id"],
        attempt=int(document["attempt"]),
        num_ranks=int(spec["num_ranks"]),
        run_dir=run_dir,
        output_dir=Path(output_dir) if output_dir else run_dir / "output",
        checkpoints_dir=Path(document["checkpoints_dir"]),
        checkpoint_prefix=str(document["checkpoint_prefix"]),
        keep_checkpoints=int(spec.get("training", {}).get("keep_checkpoints", 3)),
        dataset=spec.get("dataset"),
        dataset_file=_path(document, "dataset_file"),
        datasets_dir=_path(document, "datasets_dir"),
        base_model_dir=_path(document, "base_model_dir"),
        resume_dir=_path(document, "resume_dir"),
        resume_step=int(document.get("resume_step") or 0),
        command=tuple(map(str, document.get("command") or ())),
    )


def _path(document: dict[str, Any], name: str) -> Path | None:
    value = document.get(name)
    return Path(value) if value else None
