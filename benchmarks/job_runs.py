"""Trainings of the project's own on several GPUs that something happens to: a NaN on one rank, a kill -9 of one rank.

They run as the supervisor runs them: torchrun started by `apt_jobs/supervision/launch.py` with a run file, the
built-in trainer, checkpoints, spools; a broken attempt goes on from the newest checkpoint in a second one.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from apt_jobs.diagnosis.rank_watch import RankWatch
from apt_jobs.events.kinds import IncidentChanged, LineLogged, StepTrained
from apt_jobs.events.spool import SpoolReader
from apt_jobs.jobs.run_file import RunFile
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.settings import Settings
from apt_jobs.supervision.launch import start_node
from apt_jobs.supervision.process_tree import ProcessTree, adopt_orphans, marked_processes

POISONED_ENTRY_POINT = "benchmarks.poisoned_job:train_poisoned"
POISONED_STEP = 7
STEPS_AFTER_POISON = 5
CHECKPOINT_EVERY = 8
KILLED_AT_STEP = 2 * CHECKPOINT_EVERY + 4  # one checkpoint is certainly complete, and some steps are lost
KILLED_RUN_STEPS = 4 * CHECKPOINT_EVERY
DEADLINE_S = 240.0
GPU_RELEASE_S = 10.0  # in which the driver forgets a process that is gone
POLL_S = 0.02
LARGE = {"d_model": 768, "num_layers": 12, "num_attention_heads": 12, "vocab_size": 8192, "max_seq_len": 512}
TINY = {"d_model": 16, "num_layers": 2, "num_attention_heads": 2, "vocab_size": 300, "max_seq_len": 32}
TINY_TEXT = "A short text that is trained on, over and over again.\n" * 1_000


@dataclass(frozen=True, slots=True)
class Poisoned:
    """What became of a NaN on one rank."""

    fault: str
    rank: int
    step: int
    layer: str | None  # None: the loss had it already
    found_ranks: tuple[int, ...]
    found_step: int | None
    found_layer: str | None
    message: str
    num_incidents: int
    is_skipped_everywhere: bool  # no bit of a weight changed at that step, on any rank
    is_trained_on: bool  # and at the next step they did
    is_finite: bool  # every weight of every rank, at the end

    @property
    def is_right(self) -> bool:
        place = (self.found_ranks, self.found_step, self.found_layer) == ((self.rank,), self.step, self.layer)
        return (
            place and self.num_incidents == 1 and self.is_skipped_everywhere and self.is_trained_on and self.is_finite
        )


@dataclass(frozen=True, slots=True)
class Killed:
    """What became of a training one of whose ranks was killed."""

    rank: int
    at_step: int
    resumed_from_step: int
    num_steps: int
    num_files: int  # of the last checkpoint: weights, optimizer, random generators of each rank
    different_files: tuple[str, ...]
    ended_after_s: float  # from the kill until torchrun and all ranks were gone
    processes_left: tuple[int, ...]
    gpu_processes: tuple[str, ...]  # that hold a GPU and did not before
    steps_per_s: float

    @property
    def is_right(self) -> bool:
        return not (self.different_files or self.processes_left or self.gpu_processes)


class JobRuns:
    """Trainings in `folder` with a rank for each of `num_ranks` GPUs, or that many on a CPU."""

    def __init__(self, folder: Path, num_ranks: int, device: str) -> None:
        self._folder, self._num_ranks, self._device = folder, num_ranks, device
        self._settings = Settings(data_dir=folder)
        self._model = LARGE if device == "cuda" else TINY
        self._text = None if device == "cuda" else folder / "text.txt"
        if self._text is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._text.write_text(TINY_TEXT)
        adopt_orphans()

    def poison(self, fault: str) -> Poisoned:
        """Put one NaN on the last rank at one step: in its batch (`nan_batch`) or backward pass (`nan_gradient`)."""
        rank, block = self._num_ranks - 1, self._model["num_layers"] // 2
        arguments = {"fault": fault, "rank": rank, "step": POISONED_STEP, "block": block}
        num_steps = POISONED_STEP + STEPS_AFTER_POISON
        run_file = self._run_file(fault, num_steps, entry_point=POISONED_ENTRY_POINT, arguments=arguments)
        self._finish(run_file)
        recorded = [
            json.loads((run_file.run_dir / f"weights-{rank}.json").read_text()) for rank in range(self._num_ranks)
        ]
        incidents = [event for event in self._watched(run_file) if event.phase == "begun"]
        first = incidents[0] if incidents else None
        skipped = [
            event for event in _events(run_file, 0) if isinstance(event, LineLogged) and "is skipped" in event.message
        ]
        is_gradient = fault == "nan_gradient"
        return Poisoned(
            fault=fault,
            rank=rank,
            step=POISONED_STEP,
            layer=f"model.layers.{block}.mlp.down_proj.weight" if is_gradient else None,
            found_ranks=first.ranks if first else (),
            found_step=first.began_step if first else None,
            found_layer=first.origin if first else None,
            message=first.message if first else "no incident",
            num_incidents=len(incidents),
            is_skipped_everywhere=len(skipped) == 1 and all(of["before"] == of["after"] for of in recorded),
            is_trained_on=all(of["after"] != of["next"] for of in recorded)
            and len({of["next"] for of in recorded}) == 1,
            is_finite=all(of["is_finite"] for of in recorded),
        )

    def kill(self) -> Killed:
        """Kill the last rank with SIGKILL in the middle, resume, and compare with a training without a break."""
        whole = self._run_file("whole", KILLED_RUN_STEPS)
        began = time.monotonic()
        held_before = gpu_holders()
        self._finish(whole)
        steps_per_s = KILLED_RUN_STEPS / (time.monotonic() - began)
        broken = self._run_file("broken", KILLED_RUN_STEPS)
        tree, rank = self._start(broken), self._num_ranks - 1
        at_step = self._wait_for_step(broken, tree, rank)
        killed_at = time.monotonic()
        os.kill(_pid_of(rank, broken), signal.SIGKILL)
        _wait(tree)
        tree.kill()
        ended_after_s = time.monotonic() - killed_at
        left = marked_processes(f"{broken.job_id}:{broken.attempt}")
        holders = _holders_after(held_before)
        source = max(folder for folder in broken.checkpoints_dir.iterdir() if (folder / "manifest.json").exists())
        resumed = self._run_file("broken", KILLED_RUN_STEPS, attempt=2, resume_dir=source)
        self._finish(resumed)
        names = [f"step-{KILLED_RUN_STEPS:08d}-a{attempt}" for attempt in (1, 2)]
        hashes = [_hashes(run.checkpoints_dir / name) for run, name in zip((whole, resumed), names, strict=True)]
        different = {name for name in hashes[0].keys() | hashes[1].keys() if hashes[0].get(name) != hashes[1].get(name)}
        return Killed(
            rank=rank,
            at_step=at_step,
            resumed_from_step=int(source.name.split("-")[1]),
            num_steps=KILLED_RUN_STEPS,
            num_files=len(hashes[0]),
            different_files=tuple(sorted(different)),
            ended_after_s=ended_after_s,
            processes_left=tuple(left),
            gpu_processes=tuple(sorted(holders)),
            steps_per_s=steps_per_s,
        )

    def _run_file(
        self,
        name: str,
        num_steps: int,
        attempt: int = 1,
        resume_dir: Path | None = None,
        entry_point: str | None = None,
        arguments: dict[str, Any] | None = None,
    ) -> RunFile:
        training = {
            "max_steps": num_steps,
            "epochs": 1_000,
            "batch_size": 8 if self._device == "cuda" else 2,
            "gradient_accumulation_steps": 2,
            "warmup_steps": 4,
            "checkpoint_every_steps": CHECKPOINT_EVERY,
            "keep_checkpoints": 10,
            "compile": "auto" if entry_point is None else "off",  # a fault is put in by hooks on all modules
        }
        run_dir, checkpoints = self._folder / name / f"attempt-{attempt}", self._folder / name / "checkpoints"
        for folder in (run_dir, checkpoints):
            folder.mkdir(parents=True, exist_ok=True)
        run_file = RunFile(
            job_id=f"job_{name}",
            attempt=attempt,
            spec=TrainSpec.model_validate(
                {
                    "kind": "train",
                    "num_ranks": self._num_ranks,
                    "device": self._device,
                    "model": {**self._model, "dropout": 0.1},
                    "training": training,
                    "arguments": arguments or {},
                }
            ),
            entry_point=entry_point,
            dataset_file=self._text,
            base_model_dir=None,
            resume_dir=resume_dir,
            run_dir=run_dir,
            checkpoints_dir=checkpoints,
            checkpoint_prefix=name,
        )
        (run_dir / "run.json").write_text(run_file.model_dump_json())
        return run_file

    def _start(self, run_file: RunFile) -> ProcessTree:
        return start_node(self._settings, run_file, 0, range(self._num_ranks), "benchmark")

    def _finish(self, run_file: RunFile) -> None:
        tree = self._start(run_file)
        try:
            status = _wait(tree)
        finally:
            tree.kill()
        if status != 0 or not run_file.outcome_path.exists():
            logs = sorted(run_file.run_dir.rglob("*.log"))
            raise RuntimeError("\n".join(f"{log}: {log.read_text()[-3_000:]}" for log in logs if log.stat().st_size))

    def _wait_for_step(self, run_file: RunFile, tree: ProcessTree, rank: int) -> int:
        """Until rank 0 has recorded of `KILLED_AT_STEP` and a checkpoint is complete; the step that it is at."""
        deadline, reader, step = time.monotonic() + DEADLINE_S, SpoolReader(run_file.spool_path(0)), 0
        while step < KILLED_AT_STEP or not any(run_file.checkpoints_dir.glob("step-*")):
            if tree.poll() is not None or time.monotonic() > deadline or step == KILLED_RUN_STEPS:
                tree.kill()
                raise RuntimeError(f"rank {rank} could not be killed in time: the training is at step {step}")
            step = max([step, *(event.step for _, event in reader.read() if isinstance(event, StepTrained))])
            time.sleep(POLL_S)
        return step

    def _watched(self, run_file: RunFile) -> list[IncidentChanged]:
        """Return the events that the supervisor makes of the spools."""
        watch = RankWatch(run_file.spec)
        at = datetime.now(UTC)
        recorded = [event for rank in range(self._num_ranks) for event in _events(run_file, rank)]
        found = [result for event in recorded for _, result in watch.add(at, event)]
        found += [event for _, event in watch.end()]
        return [event for event in found if isinstance(event, IncidentChanged)]


def gpu_holders() -> set[str]:
    """Process ids that hold a GPU, as the driver says. Empty without a GPU."""
    if shutil.which("nvidia-smi") is None:
        return set()
    command = ["nvidia-smi", "--query-compute-apps=gpu_uuid,pid,used_memory", "--format=csv,noheader"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split("\n")) - {
        ""
    }


def _holders_after(before: set[str]) -> set[str]:
    deadline = time.monotonic() + GPU_RELEASE_S
    while (left := gpu_holders() - before) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return left


def _pid_of(rank: int, run_file: RunFile) -> int:
    wanted = f"RANK={rank}".encode()
    for pid in marked_processes(f"{run_file.job_id}:{run_file.attempt}"):
        if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return pid
    raise RuntimeError(f"there is no process of rank {rank}")


def _wait(tree: ProcessTree) -> int:
    deadline = time.monotonic() + DEADLINE_S
    while (status := tree.poll()) is None:
        if time.monotonic() > deadline:
            tree.kill()
            raise RuntimeError(f"the training did not end within {DEADLINE_S:g} s")
        time.sleep(POLL_S)
    return status


def _events(run_file: RunFile, rank: int) -> list[Any]:
    reader, events = SpoolReader(run_file.spool_path(rank)), list[Any]()
    while more := [event for _, event in reader.read()]:
        events += more
    return events


def _hashes(checkpoint: Path) -> dict[str, str]:
    """Return the sizes of its tensors, as its manifest has them."""
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    return {name: about["sha256"] for name, about in files.items() if name.endswith(".safetensors")}
