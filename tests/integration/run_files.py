"""Run files of attempts that no supervisor planned."""

from pathlib import Path
from typing import Any

from apt_jobs.jobs.run_file import RunFile
from apt_jobs.jobs.spec import TrainSpec


def run_file_in(folder: Path, spec: TrainSpec, **fields: Any) -> RunFile:
    """The first attempt of a job, all of it in one folder; `fields` differ."""
    usual: dict[str, Any] = {
        "job_id": "job_x",
        "attempt": 1,
        "run_dir": folder,
        "checkpoints_dir": folder / "checkpoints",
        "checkpoint_prefix": "job_x",
    }
    return RunFile(spec=spec, **{**usual, **fields})
