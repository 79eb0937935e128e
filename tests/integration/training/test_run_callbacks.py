"""The trainers of others as jobs: stopped within a step, resumed from what they saved, with their own metrics."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from apt_jobs.events.kinds import CheckpointSaved, MetricsLogged, ProgressReported
from apt_jobs.events.spool import SpoolReader
from apt_jobs.jobs.run_file import RunFile
from apt_jobs.jobs.spec import TrainSpec

SCRIPT = Path(__file__).with_name("run_of_trainers.py")
ROOT = Path(__file__).resolve().parents[3]


def attempt(folder: Path, number: int, name: str, resume_dir: Path | None) -> tuple[int, list[Any]]:
    """Run one attempt as its supervisor would; the step that it reached, and its events."""
    run_dir, output_dir = folder / "attempt", folder / "output"
    run_dir.mkdir(exist_ok=True)
    output_dir.mkdir(exist_ok=True)
    for left in run_dir.iterdir():
        left.unlink()
    run_file = RunFile(
        job_id="job_1",
        attempt=number,
        spec=TrainSpec(kind="train"),
        entry_point=str(SCRIPT),
        resume_dir=resume_dir,
        output_dir=output_dir,
        run_dir=run_dir,
        checkpoints_dir=folder / "checkpoints",
        checkpoint_prefix="job_1",
    )
    (run_dir / "run.json").write_text(run_file.model_dump_json())
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")},
        **{"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "APT_JOBS_RUN_FILE": str(run_dir / "run.json")},
    }
    done = subprocess.run(
        [sys.executable, str(SCRIPT), name],
        cwd=output_dir,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    events = [event for _, event in SpoolReader(run_file.spool_path(0)).read()]
    return int(done.stdout.split()[-1]), events


@pytest.mark.parametrize(("name", "val_loss"), [("hugging_face", "eval_loss"), ("lightning", "val_loss")])
def test_a_trainer_is_stopped_within_a_step_and_goes_on_from_its_own_checkpoint(
    tmp_path: Path, name: str, val_loss: str
) -> None:
    step, events = attempt(tmp_path, 1, name, None)
    assert step == 4
    saved = [event for event in events if isinstance(event, CheckpointSaved)]
    assert [event.step for event in saved] == [3, 4]
    assert saved[-1].val_loss is not None
    logged = [event for event in events if isinstance(event, MetricsLogged)]
    assert sorted({event.step for event in logged if "loss" in event.values}) == [1, 2, 3, 4]
    assert 3 in [event.step for event in logged if val_loss in event.values]
    progress = [event for event in events if isinstance(event, ProgressReported)]
    assert (progress[-1].step, progress[-1].num_steps) == (4, 8)
    folder = tmp_path / "checkpoints" / saved[-1].filename.removeprefix("job_1/")
    step, events = attempt(tmp_path, 2, name, folder)
    assert step == 8
    logged = [event for event in events if isinstance(event, MetricsLogged)]
    assert sorted({event.step for event in logged if "loss" in event.values}) == [5, 6, 7, 8]
