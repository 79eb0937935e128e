"""What the commands read and print."""

import functools
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from apt_jobs.commands import jobs, terminal
from apt_jobs.errors import InvalidInput


@pytest.mark.parametrize(
    ("step", "num_steps", "text"), [(None, None, ""), (None, 9, ""), (5, 9, "5/9"), (5, None, "5")]
)
def test_a_row_says_where_a_job_is(step: int | None, num_steps: int | None, text: str) -> None:
    assert jobs._steps({"step": step, "num_steps": num_steps}) == text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        (b"", "no JSON"),
        (b"{kind: train}", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[1]", "a job is an object"),
        (b" " * (terminal.MAX_JOB_BYTES + 1), "no job"),
    ],
)
def test_a_file_that_is_no_job_is_named_with_what_is_wrong(tmp_path: Path, content: bytes | None, words: str) -> None:
    file = tmp_path / "job.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InvalidInput, match=words) as raised:
        terminal.read_job(file)
    assert str(file) in str(raised.value)


def test_a_job_is_read_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "job.json"
    file.write_text('{"kind": "train", "name": "\u4e2d\u6587"}')
    assert terminal.read_job(file) == {"kind": "train", "name": "\u4e2d\u6587"}


def test_ctrl_c_while_the_commands_are_imported_shows_no_traceback() -> None:
    program = """
import os, signal, sys
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "apt_jobs.cli":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
from apt_jobs.__main__ import main
main()
"""
    with_ctrl_c = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, preexec_fn=with_ctrl_c
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
