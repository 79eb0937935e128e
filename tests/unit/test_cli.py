"""What the commands print of a job, also of one that does not say how many steps it will take."""

import functools
import signal
import subprocess
import sys
from typing import Any

import pytest

from apt_jobs import cli

EVENT: dict[str, Any] = {"epoch": 0, "step": 5, "train_loss": 2.5, "tokens_per_s": 1_000.0, "step_time_ms": 2_000.0}


@pytest.mark.parametrize(
    ("step", "num_steps", "text"), [(None, None, ""), (None, 9, ""), (5, 9, "5/9"), (5, None, "5")]
)
def test_a_row_says_where_a_job_is(step: int | None, num_steps: int | None, text: str) -> None:
    assert cli._steps({"step": step, "num_steps": num_steps}) == text


@pytest.mark.parametrize(
    ("total", "words"),
    [
        (9.0, "epoch 1  step 5/9  loss 2.500  1,000 tokens/s  ETA 00:08"),
        (None, "epoch 1  step 5  loss 2.500"),
    ],
)
def test_a_progress_bar_promises_no_end_that_is_not_known(total: float | None, words: str) -> None:
    assert cli._metric_words(EVENT, total) == words


def test_a_loss_that_is_not_finite_is_a_word_of_the_line() -> None:
    assert cli._metric_words({**EVENT, "train_loss": "NaN"}, None) == "epoch 1  step 5  loss nan"


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
