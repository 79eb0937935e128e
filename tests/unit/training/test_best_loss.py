"""Which validation loss is the best so far."""

import math

import pytest

from apt_jobs.training.progress import is_better


@pytest.mark.parametrize(
    ("val_loss", "best", "expected"),
    [
        (2.0, None, True),
        (1.0, 2.0, True),
        (2.0, 2.0, False),
        (math.nan, None, False),
        (math.nan, 2.0, False),
        (math.inf, None, False),
        (-math.inf, 2.0, False),
        (1e300, None, True),
    ],
)
def test_only_a_finite_loss_below_the_best_is_the_best(val_loss: float, best: float | None, expected: bool) -> None:
    assert is_better(val_loss, best) is expected
