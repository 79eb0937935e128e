"""Promise 8: a committed checkpoint always loads, whatever happened while the next one was saved."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from apt_jobs.artifacts.folders import sweep
from apt_jobs.artifacts.manifest import require_whole
from apt_jobs.errors import InvalidCheckpoint
from apt_jobs.training.checkpoint import OPTIMIZER
from tests.faults.record import Campaign, campaign, count

Saver = subprocess.Popen[str]


@pytest.fixture(scope="module")
def saver() -> Iterator[Saver]:
    command = [sys.executable, "-m", "tests.faults.checkpoint_saver"]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}  # no threads: it forks
    with Saver(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert line_of(process) == "ready"
        yield process
        assert process.stdin is not None
        process.stdin.close()


def test_a_save_that_is_killed_leaves_every_earlier_one_whole(tmp_path: Path, saver: Saver) -> None:
    with campaign(8, "kill -9 while saving") as found:
        chance = random.Random(found.seed)
        for _ in range(count(5, 200)):
            pid = begin(saver, tmp_path, 0)
            first = line_of(saver)
            killer = threading.Timer(chance.uniform(0.0, 0.4), os.kill, (pid, signal.SIGKILL))
            killer.start()
            found.fault("kill")
            judge(tmp_path, [first, *rest_of(saver)], found)
            killer.join()


def test_a_full_disk_leaves_every_earlier_one_whole(tmp_path: Path, saver: Saver) -> None:
    """The kernel refuses to write beyond a size, in whichever file comes to it first."""
    with campaign(8, "the disk refuses a write while saving") as found:
        chance = random.Random(found.seed)
        for _ in range(count(2, 20)):
            begin(saver, tmp_path, chance.randrange(1, 500_000))
            found.fault("refused write")
            *committed, last = rest_of(saver)
            if last != "full":
                found.violations.append(f"it ended with {last!r}")
            if left := list(tmp_path.glob(".tmp-*")):
                found.violations.append(f"what could not be written was left: {left}")
            judge(tmp_path, committed, found)


def begin(saver: Saver, folder: Path, max_file_bytes: int) -> int:
    """Start a child that saves into `folder`; its pid."""
    assert saver.stdin is not None
    saver.stdin.write(f"{folder} {max_file_bytes}\n")
    saver.stdin.flush()
    return int(line_of(saver))


def line_of(saver: Saver) -> str:
    assert saver.stdout is not None
    return saver.stdout.readline().strip()


def rest_of(saver: Saver) -> list[str]:
    """All that the child still says."""
    return list(iter(lambda: line_of(saver), "gone"))


def judge(folder: Path, committed: list[str], found: Campaign) -> None:
    """What was reported as saved is there and whole; so is all that has a name; the rest can be swept away."""
    found.trials += 1
    for name in committed:
        if not (folder / name).is_dir():
            found.violations.append(f"{name} was committed and is gone")
    sweep(folder)
    for checkpoint in folder.iterdir():
        try:
            require_whole(checkpoint)
        except InvalidCheckpoint as exc:
            found.violations.append(str(exc))
            continue
        number = float(checkpoint.name.rpartition("-")[2])
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        tensors = [*model.parameters(), *load_file(checkpoint / OPTIMIZER).values()]
        if any((tensor != number).any() for tensor in tensors):
            found.violations.append(f"{checkpoint.name} holds weights of another step")
        shutil.rmtree(checkpoint)
