"""The tracker of `accelerate`, in a real Accelerator: what a script logs becomes events of its job."""

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from apt_jobs.events.spool import SpoolReader
from apt_jobs.gradient_monitor.callbacks.accelerate_run import RunTracker
from apt_jobs.jobs.handover import Handover
from apt_jobs.run.current import Run


def test_numbers_texts_images_and_tables_of_an_accelerator_reach_the_job(tmp_path: Path) -> None:
    run = Run(Handover("job_x", 1, 1, tmp_path, tmp_path / "output", tmp_path / "checkpoints", "job_x", 3), rank=0)
    (tmp_path / "output").mkdir()
    accelerator = Accelerator(cpu=True, log_with=RunTracker(run))
    accelerator.init_trackers("mine", config={"lr": 3e-4, "name": "small"})
    values = {"loss": torch.tensor(1.5), "eval/bleu": np.float32(2.0), "by_task": {"a": 1}, "note": "as expected"}
    accelerator.log(values, step=3)
    accelerator.log({"loss": 1}, step=4)
    tracker = accelerator.get_tracker("apt_jobs")
    tracker.log_images({"sample": [np.zeros((2, 2))]}, step=4)
    tracker.log_table("answers", columns=["a", "b"], data=[[1, "x"]], step=4)
    assert accelerator.get_tracker("apt_jobs", unwrap=True) is run
    accelerator.end_training()
    events = [event for _, event in SpoolReader(run_spool(tmp_path)).read()]
    metrics = [(event.step, event.values) for event in events if event.kind == "metrics"]  # type: ignore[attr-defined]
    assert metrics == [(3, {"loss": 1.5, "eval/bleu": 2.0, "by_task/a": 1}), (4, {"loss": 1})]
    lines = [event.message for event in events if event.kind == "log"]  # type: ignore[attr-defined]
    assert lines == ["configuration: lr=0.0003 name=small", "note: as expected"]
    media = [(event.name, event.form, event.step) for event in events if event.kind == "media"]  # type: ignore[attr-defined]
    assert media == [("sample", "image", 4), ("answers", "table", 4)]


def run_spool(folder: Path) -> Path:
    return folder / "rank-0.spool"
