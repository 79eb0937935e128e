"""What is left of the ranks' last steps after a kill -9, which asks nobody: all of them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from apt_jobs.events.kinds import RankGradientsRecorded
from apt_jobs.events.spool import SpoolReader

SCRIPT = Path(__file__).with_name("killed_ranks.py")
ROOT = Path(__file__).resolve().parents[3]
KEPT_STEPS = 64
DEADLINE_S = 120.0


def test_the_last_64_steps_of_every_rank_are_readable_after_kill_9(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "apt_jobs.training.launch_ranks", "--nproc-per-node=2", "--rdzv-backend=apt-jobs"),
        *("--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", str(SCRIPT), str(tmp_path)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as torchrun:
        try:
            wait_for_steps(tmp_path, KEPT_STEPS + 20)
        finally:
            for path in tmp_path.glob("pid-*"):
                os.kill(int(path.read_text()), signal.SIGKILL)
        assert torchrun.wait(DEADLINE_S) != 0
    for rank in range(2):
        done = steps_done(tmp_path, rank)
        assert done > KEPT_STEPS
        steps = steps_kept(tmp_path / f"rank-{rank}.spool")
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) in (done, done + 1)  # killed between the record and its own word of it


def wait_for_steps(folder: Path, count: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while min(steps_done(folder, rank) for rank in range(2)) < count:
        assert time.monotonic() < deadline, "the ranks do not train"
        time.sleep(0.05)


def steps_done(folder: Path, rank: int) -> int:
    path = folder / f"done-{rank}"
    return int(path.read_bytes() or b"0") if path.exists() else 0


def steps_kept(spool: Path) -> list[int]:
    reader, steps = SpoolReader(spool), list[int]()
    while events := list(reader.read()):
        records = (event for _, event in events if isinstance(event, RankGradientsRecorded))
        for record in records:
            assert len(record.norms) == 4
            assert record.loss is not None
            steps.append(record.step)
    return steps
