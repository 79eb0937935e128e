"""How a rank's process ends: what it was asked to do at its end is done, and then nothing can break it any more."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from apt_jobs.jobs.spec import TrainSpec
from tests.integration.run_files import run_file_in

SCRIPT = """
import atexit, os, sys, threading, time

class Fragile:
    def __del__(self):
        os.abort()  # as C++ does, when what it needs has been destroyed before

def late():
    time.sleep(0.3)
    print("the thread is done")

fragile = sys.modules["fragile"] = Fragile()  # lives until the interpreter is taken apart
atexit.register(print, "what was registered is done")
threading.Thread(target=late).start()
{last_line}
"""


@pytest.mark.parametrize(("last_line", "status"), [("", 0), ("raise ValueError('no')", 1)])
def test_a_rank_is_not_taken_apart(tmp_path: Path, last_line: str, status: int) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(last_line=last_line))
    run_file = run_file_in(tmp_path, TrainSpec(kind="train", entry_point="script"), entry_point=str(script))
    (tmp_path / "run.json").write_text(run_file.model_dump_json())
    command = [sys.executable, "-m", "apt_jobs.training.run", "--run-file", str(tmp_path / "run.json")]
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == status, ended.stderr
    assert ended.stdout.splitlines() == ["the thread is done", "what was registered is done"]
    assert run_file.outcome_path.exists() == (status == 0)
