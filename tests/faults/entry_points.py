"""Trainings without a model: one counts, one ignores SIGTERM, one dies at once. Without torch they start soon."""

import os
import signal
import time

from apt_jobs.artifacts.manifest import MANIFEST, manifest_of
from apt_jobs.events.kinds import CheckpointSaved, LineLogged, StepTrained, TrainingStarted
from apt_jobs.events.spool import SpoolWriter
from apt_jobs.jobs.ids import new_checkpoint_id
from apt_jobs.jobs.run_file import RunFile
from apt_jobs.run.stopping import STOPPED
from apt_jobs.training.torchrun import read_rank_info

STEP_S = 0.05
SAVED_EVERY = 10  # steps


def count_steps(run_file: RunFile, spool: SpoolWriter) -> None:
    """Count until stopped, from where the last checkpoint was; rank 0 says so."""
    step = 0
    if run_file.resume_dir is not None:
        step = int((run_file.resume_dir / "step").read_text())
    if read_rank_info().rank == 0:
        spool.append(TrainingStarted(2, "cpu", "none", 0, 1_000_000, 1_000_000, 1, step, {}))
    while True:
        time.sleep(STEP_S)
        step += 1
        if read_rank_info().rank == 0:
            spool.append(StepTrained(step, 0, 1.0, 0.1, 1.0, 1000 * STEP_S, 1.0))
            if step % SAVED_EVERY == 0:
                save(run_file, spool, step)


def count_until_stopped(run_file: RunFile, spool: SpoolWriter) -> None:
    """Count as `count_steps`; asked to save and stop, do so."""
    step = 0
    if run_file.resume_dir is not None:
        step = int((run_file.resume_dir / "step").read_text())
    spool.append(TrainingStarted(2, "cpu", "none", 0, 1_000_000, 1_000_000, 1, step, {}))
    while not run_file.stop_path.exists():
        time.sleep(STEP_S)
        step += 1
        spool.append(StepTrained(step, 0, 1.0, 0.1, 1.0, 1000 * STEP_S, 1.0))
        if step % SAVED_EVERY == 0:
            save(run_file, spool, step)
    save(run_file, spool, step)
    (run_file.run_dir / STOPPED).touch()


def save(run_file: RunFile, spool: SpoolWriter, step: int) -> None:
    checkpoint_id = new_checkpoint_id()
    folder = run_file.checkpoints_dir / checkpoint_id
    folder.mkdir()
    (folder / "step").write_text(str(step))
    (folder / MANIFEST).write_text(manifest_of(folder).model_dump_json())
    name = f"{run_file.checkpoint_prefix}/{checkpoint_id}"
    spool.append(CheckpointSaved(checkpoint_id, name, step, 0, None, None, 1, False))


def ignore_sigterm(run_file: RunFile, spool: SpoolWriter) -> None:
    """Never ends by itself, whoever asks."""
    del run_file
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    spool.append(LineLogged("info", "rank", "running"))
    while True:
        time.sleep(1.0)


def die(run_file: RunFile, spool: SpoolWriter) -> None:
    """Ends without a word, each time."""
    del run_file, spool
    os._exit(1)
