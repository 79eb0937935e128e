"""A user's script that uses all that a job gives it; it is killed once, paused once, and goes on from its own files."""

import json
import os
import pathlib
import sys
import time

import apt_jobs

run = apt_jobs.current_run()
first = 1
if run.resume_dir:
    first = json.loads((run.resume_dir / "state.json").read_text())["step"] + 1
if run.rank == 0:
    print(json.dumps({"argv": sys.argv[1:], "cwd": str(pathlib.Path.cwd()), "secret": os.environ.get("MY_SECRET")}))
    print(json.dumps({"offline": os.environ["HF_HUB_OFFLINE"], "mine": os.environ.get("MINE")}))
    assert pathlib.Path.cwd() == run.output_dir
    assert run.dataset().stat().st_size > 1_000
for step in range(first, 41):
    run.set_progress(step, 40)
    run.log({"eval/bleu": step / 2, f"rank{run.rank}/seen": step, "resumed_from": first}, step=step)
    if run.rank == 0 and step % 5 == 0:
        pathlib.Path("state").mkdir(exist_ok=True)
        pathlib.Path("state/state.json").write_text(json.dumps({"step": step}))
        run.save_checkpoint("state", step=step, metrics={"eval_loss": 1 / step})
    if run.rank == 0 and step == 12 and run.attempt == 1:
        os.kill(os.getpid(), 9)
    if run.should_stop():
        break
    time.sleep(0.25)
