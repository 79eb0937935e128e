"""`make demo`'s program: it ends well, its loss falls, it prints a text, it leaves nothing behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import some_port


@pytest.mark.timeout(400)
def test_the_demo_trains_generates_and_leaves_nothing(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "APT_JOBS_DEMO_EXIT": "1",
        "APT_JOBS_DATA_DIR": str(tmp_path / "data"),
        "APT_JOBS_PORT": str(some_port()),
    }
    command = [sys.executable, "-m", "apt_jobs", "demo"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=380, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "generated from the new checkpoint" in done.stdout
    assert "The class statement" in done.stdout
    left = [
        entry.name
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and str(tmp_path) in _environment_of(entry)
    ]
    assert left == []


def _environment_of(entry: Path) -> str:
    try:
        return (entry / "environ").read_text(errors="replace")
    except OSError:
        return ""
