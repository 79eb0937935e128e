"""The progress line: what fits, what is dropped first, how times are written."""

from typing import Any

import pytest

from apt_jobs.client import Client, Job
from apt_jobs.commands.progress import ProgressLine, duration

METRIC: dict[str, Any] = {
    "kind": "metric",
    "epoch": 0,
    "step": 5,
    "train_loss": 2.5,
    "tokens_per_s": 1_000.0,
    "step_time_ms": 2_000.0,
}


def line_of(num_steps: int | None, state: str = "running", **values: Any) -> ProgressLine:
    """A line whose clock stands still."""
    client = Client("http://127.0.0.1:9", "apt_k_s")
    job = {"id": "job_1", "state": state, "step": None, "num_steps": num_steps, "waiting_for": None, **values}
    return ProgressLine(Job(job, client), clock=lambda: 0.0)


@pytest.mark.parametrize(
    ("num_steps", "text"),
    [
        (9, "running  step 5/9  epoch 1  loss 2.500  1,000 tokens/s  ETA 00:08  elapsed 00:00"),
        (None, "running  step 5  epoch 1  loss 2.500  1,000 tokens/s  elapsed 00:00"),
    ],
)
def test_a_line_promises_no_end_that_is_not_known(num_steps: int | None, text: str) -> None:
    line = line_of(num_steps)
    line.update(METRIC)
    assert line.text() == text


@pytest.mark.parametrize(("step", "num_steps"), [(5, 9), (123_456, 1_000_000), (5, None), (99_999_999, 100_000_000)])
def test_a_line_fits_any_width(step: int, num_steps: int | None) -> None:
    line = line_of(num_steps)
    line.update({**METRIC, "step": step})
    for width in [*range(1, 121), 200, 1_000]:
        assert 0 < len(line.text(width)) <= width


def test_the_most_important_parts_stay() -> None:
    line = line_of(1_000_000)
    line.update({**METRIC, "step": 123_456, "step_time_ms": 3_000.0})
    assert line.text(40) == "running 123456/1000000 ETA 730:27:12"
    assert "ETA 730:27:12" in line.text(80)
    assert line.text(200).startswith("running  [#####-")
    assert "step 123456/1000000  epoch 1  loss 2.500  1,000 tokens/s  ETA 730:27:12  elapsed" in line.text(200)


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_are_not_finite_are_words_of_the_line(word: str) -> None:
    line = line_of(9)
    line.update({**METRIC, "train_loss": word, "tokens_per_s": word, "step_time_ms": word})
    text = line.text()
    assert "tokens/s" not in text
    assert f"loss {float(word):.3f}" in text
    assert "ETA --:--" in text


def test_what_a_job_waits_for_is_shown_escaped_until_it_runs() -> None:
    line = line_of(None, state="queued", waiting_for="no worker serves [x]\x1b[2J")
    assert line.text() == "queued  no worker serves [x]\\x1b[2J  elapsed 00:00"
    line.update({"kind": "state", "state": "running", "reason": None})
    assert line.text() == "running  elapsed 00:00"


def test_steps_beyond_the_last_one_are_no_negative_time() -> None:
    line = line_of(4)
    line.update(METRIC)
    assert "ETA 00:00" in line.text(200)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "00:00"),
        (59.4, "00:59"),
        (59.6, "01:00"),
        (3_599, "59:59"),
        (3_599.6, "1:00:00"),
        (3_723, "1:02:03"),
        (90_061, "25:01:01"),
        (-5, "00:00"),
        (float("nan"), "--:--"),
        (float("inf"), "--:--"),
    ],
)
def test_times_are_right_beyond_an_hour(seconds: float, text: str) -> None:
    assert duration(seconds) == text
