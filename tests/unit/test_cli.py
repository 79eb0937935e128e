"""What the commands print of a job, also of one that does not say how many steps it will take."""

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
