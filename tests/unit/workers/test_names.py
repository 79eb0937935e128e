"""A worker that was given no name has the same one after each restart, and no other worker has it."""

import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from apt_jobs.errors import Unavailable
from apt_jobs.settings import Settings
from apt_jobs.workers.names import hold_default_name

HOST = socket.gethostname()
HOLD = """
import sys, time
from pathlib import Path
from apt_jobs.settings import Settings
from apt_jobs.workers.names import hold_default_name
print(hold_default_name(Settings(data_dir=Path(sys.argv[1])), "train"), flush=True)
time.sleep(600)
"""


def settings(folder: Path, **fields: Any) -> Settings:
    return Settings(data_dir=folder, **fields)


def started(folder: Path) -> "tuple[subprocess.Popen[str], str]":
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_a_restarted_worker_has_its_name_again_and_a_second_one_a_number(tmp_path: Path) -> None:
    first, name = started(tmp_path)
    assert name == f"train-{HOST}"
    second, numbered = started(tmp_path)
    assert numbered == f"train-{HOST}-2"
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert hold_default_name(settings(tmp_path), "train") == name
    second.send_signal(signal.SIGSTOP)  # frozen, but there
    assert hold_default_name(settings(tmp_path), "train") == f"train-{HOST}-3"
    second.kill()
    second.communicate()
    assert hold_default_name(settings(tmp_path), "train") == numbered


def test_what_differs_in_kind_gpus_or_data_directory_has_another_name(tmp_path: Path) -> None:
    shared = {"database_url": SecretStr("postgresql+psycopg://db.test/jobs")}
    names = [
        hold_default_name(settings(tmp_path), "train"),
        hold_default_name(settings(tmp_path), "generate"),
        hold_default_name(settings(tmp_path), "train", [0]),
        hold_default_name(settings(tmp_path), "train", [0, 1]),
        hold_default_name(settings(tmp_path), "train", []),
        hold_default_name(settings(tmp_path / "a", **shared), "train"),
        hold_default_name(settings(tmp_path / "b", **shared), "train"),
    ]
    assert len(set(names)) == len(names)
    assert names[2:5] == [f"train-{HOST}-gpus-0", f"train-{HOST}-gpus-0-1", f"train-{HOST}-gpus-none"]
    assert not any(name.endswith("-2") for name in names)


def test_a_folder_that_takes_no_lock_is_named(tmp_path: Path) -> None:
    (tmp_path / "locks").write_text("a file")
    with pytest.raises(Unavailable, match="give it a --name"):
        hold_default_name(settings(tmp_path), "train")
