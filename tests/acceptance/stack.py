"""A running stack for acceptance tests: `apt-jobs up` in a folder of its own, and how to look at it from outside."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from apt_jobs.client.client import Client
from apt_jobs.db.engine import Database
from apt_jobs.errors import Unavailable
from apt_jobs.supervision.process_tree import MARKER
from tests.conftest import some_port

DEADLINE_S = 120.0
STORY_CHARS = 2_000  # of each file
SCRIPTS = Path(__file__).resolve().parent
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ENTRY_POINTS = {
    "plain-loop": str(EXAMPLES / "plain_loop.py"),
    "hugging-face": str(EXAMPLES / "hugging_face_trainer.py"),
    "lightning": str(EXAMPLES / "lightning_trainer.py"),
    "soon-done": str(SCRIPTS / "soon_done.py"),
    "uses-its-run": str(SCRIPTS / "uses_its_run.py"),
    "waits-once": str(SCRIPTS / "waits_once.py"),
}
TINY: dict[str, Any] = {
    "kind": "train",
    "num_ranks": 2,
    "model": {"d_model": 16, "num_layers": 1, "num_attention_heads": 2, "vocab_size": 300, "max_seq_len": 32},
    "training": {
        "max_steps": 12,
        "batch_size": 2,
        "learning_rate": 0.01,
        "warmup_steps": 2,
        "validation_fraction": 0.001,
        "validate_every_steps": 6,
        "checkpoint_every_steps": 6,
    },
}
SOON_DONE: dict[str, Any] = {"kind": "train", "num_ranks": 2, "entry_point": "soon-done"}  # loads no torch
WAITS_ONCE: dict[str, Any] = {**SOON_DONE, "entry_point": "waits-once"}
LONG: dict[str, Any] = {**TINY, "training": {**TINY["training"], "max_steps": 5_000, "checkpoint_every_steps": 20}}


class Stack:
    """One `apt-jobs up` in a folder of its own."""

    python = sys.executable
    cwd: Path | None = None

    def __init__(self, folder: Path, **environment: str) -> None:
        self.data_dir = folder
        self.port = some_port()
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("APT_JOBS_")},
            "APT_JOBS_DATA_DIR": str(folder),
            "APT_JOBS_PORT": str(self.port),
            "APT_JOBS_LEASE_S": "6",
            "APT_JOBS_HEARTBEAT_S": "1",
            "APT_JOBS_STOP_TIMEOUT_S": "3",
            "APT_JOBS_WORKER_CPUS": "2",  # two ranks fill the worker, whatever the machine has
            "MY_SECRET": "of the operator",
            "APT_JOBS_ENTRY_POINTS": json.dumps(ENTRY_POINTS),
            **environment,
        }
        self.process = self.command("up")

    def command(self, *arguments: str) -> "subprocess.Popen[str]":
        """`apt-jobs ARGUMENTS` with this stack's settings."""
        return self._started(arguments, subprocess.PIPE)

    def worker(self, name: str, *arguments: str) -> "subprocess.Popen[str]":
        """`apt-jobs worker ARGUMENTS`, whose log joins those of the other processes."""
        with (self.data_dir / "logs" / f"{name}.log").open("a") as log:
            return self._started(("worker", *arguments), log)

    def _started(self, arguments: Sequence[str], output: "IO[str] | int") -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [self.python, "-m", "apt_jobs", *arguments],
            env=self.environment,
            cwd=self.cwd,
            stdout=output,
            stderr=output,
            text=True,
            start_new_session=True,
        )

    def client(self) -> Client:
        return Client(data_dir=self.data_dir)

    @contextmanager
    def database(self) -> Iterator[Database]:
        """Of a stack on SQLite."""
        database = Database(f"sqlite:///{self.data_dir / 'apt_jobs.sqlite3'}")
        try:
            yield database
        finally:
            database.dispose()

    def story(self) -> str:
        """What happened to the newest jobs, and what all processes said last: for a test that failed."""
        parts: list[str] = []
        try:
            with self.client() as client:
                jobs = [client.get(row["id"]) for row in client.list_jobs(limit=3)]
            keys = ("id", "queue", "state", "reason", "step", "attempts")
            parts += [json.dumps({key: job[key] for key in keys}, default=str) for job in jobs]
        except Exception as exc:  # whatever keeps the service from answering is a part of the story
            parts.append(f"the service does not answer: {exc!r}")
        logs = [*self.data_dir.glob("logs/*.log"), *self.data_dir.glob("runs/*/*/torchrun-*.log")]
        ranks = self.data_dir.glob("runs/*/*/torchrun/**/stderr.log")
        for file in sorted([*logs, *ranks], key=lambda file: file.stat().st_mtime)[-12:]:
            text = file.read_text(errors="replace")
            parts.append(f"--- {file.relative_to(self.data_dir)}\n{text[-STORY_CHARS:]}")
        return "\n".join(parts)

    def pids(self, *words: str) -> list[int]:
        """Living processes of this stack whose command line has all the words."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                environment = (entry / "environ").read_bytes()
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (OSError, ValueError):
                continue
            belongs = str(self.data_dir).encode() in environment or str(self.data_dir) in line
            if entry.name.isdigit() and belongs and line and all(word in line for word in words):
                found.append(int(entry.name))
        return found


def until(what: Callable[[], Any], deadline_s: float = DEADLINE_S) -> Any:
    """Poll until `what` is true; its value."""
    deadline = time.monotonic() + deadline_s
    while not (value := what()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)
    return value


def has_both_workers(client: Client) -> bool:
    """Whether the training and the generation worker of `apt-jobs up` are alive."""
    try:
        return {row["kind"] for row in client.workers() if row["alive"]} >= {"train", "generate"}
    except Unavailable:
        return False


def attempts_of(client: Client, job_id: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = client.get(job_id)["attempts"]
    return rows


def marked(job_id: str) -> list[int]:
    """Processes that carry the marker of an attempt of this job."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if f"{MARKER}={job_id}:".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except (OSError, ValueError):
            continue
    return found
