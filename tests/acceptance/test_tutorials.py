"""Every command of the tutorials, of one how-to page and of the README, run as it stands, in order, in one folder.

A fenced block with the title `Terminal 1` starts the service, one with another title is a file of that name, `sh` and
`python` blocks are run, and anything else (`text`: what a command prints) is only shown.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from apt_jobs.client.client import Client
from tests.acceptance.stack import DEADLINE_S, EXAMPLES, has_both_workers, until
from tests.conftest import some_port

ROOT = Path(__file__).resolve().parents[2]
TUTORIALS = [
    ROOT / "docs" / "tutorials" / f"{name}.md"
    for name in ("first_training", "first_user_script", "first_nightly_run", "first_fine_tuning")
]
HOW_TO = [ROOT / "docs" / "how-to" / f"{name}.md" for name in ("fine_tune", "fine_tune_with_lora")]
RUN_ELSEWHERE = ("make ", "pip install ")  # test_demo.py, test_wheel.py; `make test` is what runs this
SERVICE = "Terminal 1"
BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCK_DEADLINE_S = 240.0


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block of a page."""

    language: str
    title: str | None
    text: str


class Reader:
    """Somebody who does what a page says, with a terminal for the service and one for all else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.service: subprocess.Popen[str] | None = None
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("APT_JOBS_")},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "APT_JOBS_PORT": str(some_port()),
            "APT_JOBS_STOP_TIMEOUT_S": "3",
            "OMP_NUM_THREADS": "1",
        }

    def do(self, block: Block) -> None:
        """Start the service, write a file, or run a block to its end."""
        if block.title == SERVICE:
            self.start_service(block.text)
        elif block.title is not None:
            (self.folder / block.title).write_text(block.text)
        elif block.language == "sh":
            self.run(["bash", "-euo", "pipefail", "-c", block.text])
        elif block.language == "python":
            self.run([sys.executable, "-W", "error", "-c", block.text])

    def run(self, command: list[str]) -> None:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=BLOCK_DEADLINE_S,
            check=False,
        )
        assert done.returncode == 0, f"{command[-1]}\n{done.stdout}"

    def start_service(self, command: str) -> None:
        """Start it, after an end of the one before, as Ctrl-C in its terminal would."""
        self.stop_service()
        with (self.folder / "up.log").open("a") as log:
            self.service = service = subprocess.Popen(
                ["bash", "-c", f"exec env {command}"],
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        local = self.folder / ".apt_jobs" / "local.json"
        until(lambda: local.exists() or service.poll() is not None)
        assert service.poll() is None, (self.folder / "up.log").read_text()
        with Client(data_dir=self.folder / ".apt_jobs") as client:
            until(lambda: has_both_workers(client))

    def stop_service(self) -> None:
        if self.service is not None:
            self.service.send_signal(signal.SIGINT)
            self.service.wait(DEADLINE_S)
            self.service = None


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    found = [Block(*parts) for parts in BLOCK.findall(text)]
    assert len(found) * 2 == len(re.findall(r"^```", text, re.MULTILINE)), f"{page.name}: a fence that is not read"
    return [Block(block.language, block.title or None, block.text) for block in found]


@contextmanager
def reading(folder: Path) -> Iterator[Reader]:
    reader = Reader(folder)
    try:
        yield reader
    finally:
        reader.stop_service()


@pytest.mark.timeout(600)
def test_all_commands_of_the_tutorials_and_the_readme_work(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(EXAMPLES)
    (tmp_path / "my.txt").write_text("A text of somebody who read the README. " * 400)
    with reading(tmp_path) as reader:
        for page in [*TUTORIALS, *HOW_TO, ROOT / "README.md"]:
            for block in blocks_of(page):
                if not block.text.startswith(RUN_ELSEWHERE):
                    reader.do(block)
        with Client(data_dir=tmp_path / ".apt_jobs") as client:
            states = {row["name"]: row["state"] for row in client.iter_jobs()}
    assert states["my first training"] == states["my loop"] == states["fine-tuned"] == "succeeded"
    assert set(states.values()) == {"succeeded"}


def test_the_readme_names_only_targets_that_the_makefile_has() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"make ([a-z-]+)", "\n".join(block.text for block in blocks_of(ROOT / "README.md")))
    assert named
    assert set(named) <= targets


def test_files_of_the_tutorials_that_are_json_are_json() -> None:
    for page in TUTORIALS:
        for block in blocks_of(page):
            if block.language == "json":
                assert isinstance(json.loads(block.text), dict)
