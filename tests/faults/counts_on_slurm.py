"""A user's script that counts, saves every few steps and when it is asked to stop, and goes on from there.

It notes beside its checkpoints from where each attempt went on, and ends when the file FINISH is there.
"""

import os
import time
from pathlib import Path

import apt_jobs

SAVED_EVERY = 5
STEP_S = 0.05

run = apt_jobs.current_run()
finish = Path(os.environ["FINISH"])
step = int((run.resume_dir / "step").read_text()) if run.resume_dir else 0
(run.output_dir / f"resumed-{run.attempt}").write_text(str(step))
while not finish.exists() and not run.should_stop():
    time.sleep(STEP_S)
    step += 1
    if step % SAVED_EVERY == 0 or run.should_stop():
        folder = run.output_dir / "saved"
        folder.mkdir(exist_ok=True)
        (folder / "step").write_text(str(step))
        run.save_checkpoint(folder, step=step)
