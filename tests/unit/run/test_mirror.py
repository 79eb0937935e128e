"""What an unchanged script writes for TensorBoard or Weights & Biases is logged by its run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from apt_jobs.events.kinds import LineLogged, MetricsLogged
from apt_jobs.events.spool import SpoolReader
from apt_jobs.run import mirror

SITE = Path(mirror.__file__).parent / "mirror_site"
SCRIPT = """
import sys
from torch.utils.tensorboard import SummaryWriter
import torch
writer = SummaryWriter("tb")
writer.add_scalar("train/loss", 2.5, 1)
writer.add_scalar(tag="train/loss", scalar_value=torch.tensor(1.5), global_step=2)
writer.add_scalars("eval", {"bleu": 30.0, "wer": 0.5}, global_step=2)
writer.close()
print(sys.flags.interactive)
"""


OF_WANDB = """
import numpy, wandb
run = wandb.init(project="unchanged", settings=wandb.Settings(silent=True))
run.log({"loss": 2.5, "eval": {"bleu": 30, "deep": {"er": numpy.float32(0.5)}}, "text": "no number", "flag": True})
wandb.log({"half": 1}, commit=False)
run.log({"loss": numpy.array(1.5), "picture": wandb.Histogram([1, 2])})
wandb.log(data={"loss": float("nan")}, step=7)
run.log({"text": "only"})
run.finish()
"""


def ran(folder: Path, script: str, names: str) -> list[object]:
    """Run a script as a job with the mirror would; the events of its spool."""
    run_file = folder / "run.json"
    document = {
        "job_id": "job_1",
        "attempt": 1,
        "spec": {"num_ranks": 1},
        "run_dir": str(folder),
        "output_dir": str(folder / "output"),
        "checkpoints_dir": str(folder),
        "checkpoint_prefix": "job_1",
    }
    run_file.write_text(json.dumps(document))
    environment = {**os.environ, "APT_JOBS_RUN_FILE": str(run_file), "APT_JOBS_MIRROR": names}
    environment["PYTHONPATH"] = os.pathsep.join([str(SITE), str(folder / "other"), str(SITE.parents[2])])
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [event for _, event in SpoolReader(folder / "rank-0.spool").read()]


@pytest.mark.filterwarnings("ignore")
def test_scalars_of_tensorboard_are_metrics_and_are_still_written(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "sitecustomize.py").write_text("open('ran', 'w').close()")
    logged = [event for event in ran(tmp_path, SCRIPT, "tensorboard") if isinstance(event, MetricsLogged)]
    assert [(event.step, dict(event.values)) for event in logged] == [
        (1, {"train/loss": 2.5}),
        (2, {"train/loss": 1.5}),
        (2, {"eval/bleu": 30.0, "eval/wer": 0.5}),
    ]
    assert list((tmp_path / "tb").glob("events.*"))
    assert (tmp_path / "ran").exists()  # the machine's own


def test_scalars_of_wandb_are_metrics_and_are_still_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    logged = [event for event in ran(tmp_path, OF_WANDB, "tensorboard, wandb") if isinstance(event, MetricsLogged)]
    assert [(event.step, dict(event.values)) for event in logged[:3]] == [
        (0, {"loss": 2.5, "eval.bleu": 30, "eval.deep.er": 0.5, "flag": 1}),
        (1, {"half": 1}),
        (1, {"loss": 1.5}),
    ]
    assert [(event.step, list(event.values)) for event in logged[3:]] == [(7, ["loss"])]
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_what_cannot_be_mirrored_is_noted_once_and_hurts_nothing(tmp_path: Path) -> None:
    events = ran(tmp_path, "print('hello')", "tensorbored")
    assert [event.message for event in events if isinstance(event, LineLogged)] == [
        "APT_JOBS_MIRROR names tensorbored; it knows tensorboard, wandb"
    ]
