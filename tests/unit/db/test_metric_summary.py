"""The newest and the best value of each metric."""

import math

import pytest

from apt_jobs.db.series.metric_summary import MAX_SUMMARIZED, goal_of, summarized
from apt_jobs.events.kinds import MetricsLogged


@pytest.mark.parametrize(
    ("name", "goal"),
    [
        ("eval/bleu", "max"),
        ("eval_loss", "min"),
        ("val/loss/total", "max"),
        ("eval/accuracy", "max"),
        ("test/wer", "min"),
        ("answer", "max"),
        ("word-error", "min"),
        ("perplexity", "min"),
        ("step_time_ms", "min"),
        ("reward", "max"),
        ("tokens_per_s", "max"),
    ],
)
def test_a_goal_is_guessed_by_the_last_part_of_the_name(name: str, goal: str) -> None:
    assert goal_of(name) == goal


def test_the_best_value_is_kept_and_a_broken_one_is_the_last_but_not_the_best() -> None:
    summary: dict[str, object] = {}
    for step, (bleu, loss) in enumerate([(1.0, 3.0), (5.0, 2.0), (4.0, 2.5), (math.nan, math.inf)]):
        summary = summarized(summary, MetricsLogged(step, 0, {"bleu": bleu, "loss": loss}))
    assert summary == {
        "bleu": {"goal": "max", "rank": 0, "best": 5.0, "best_step": 1, "last": "NaN", "step": 3},
        "loss": {"goal": "min", "rank": 0, "best": 2.0, "best_step": 1, "last": "Infinity", "step": 3},
    }


def test_the_lowest_rank_counts_and_names_are_bounded() -> None:
    summary = summarized(None, MetricsLogged(1, 1, {"a": 9.0}))
    summary = summarized(summary, MetricsLogged(1, 0, {"a": 1.0}))
    summary = summarized(summary, MetricsLogged(2, 1, {"a": 10.0}))
    assert (summary["a"]["last"], summary["a"]["best"]) == (1.0, 1.0)
    summary = summarized(summary, MetricsLogged(3, 0, {f"m{number}": 1.0 for number in range(100)}))
    assert len(summary) == MAX_SUMMARIZED
    assert summarized(summary, MetricsLogged(4, 0, {"a": 3.0}))["a"]["last"] == 3.0
