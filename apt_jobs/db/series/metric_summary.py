"""The newest and the best value of each metric that a user script logged: what the row of its job shows of them."""

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from apt_jobs.events.codec import finite_or_name
from apt_jobs.events.kinds import MetricsLogged

MAX_SUMMARIZED = 20  # names of a job, those that it logs first; lists show hundreds of jobs
_LOWER_IS_BETTER = re.compile(
    r"loss|err(or)?s?$|perplexity|ppl|(^|_)(wer|cer|mse|mae|rmse|fid|nll|bpc|bpb|bits_per\w*|time|latency)(_|$)|_ms$",
    re.IGNORECASE,
)


def goal_of(name: str) -> Literal["min", "max"]:
    """Guess by its name whether a metric is better when it is small."""
    last = name.rsplit("/", 1)[-1]
    return "min" if _LOWER_IS_BETTER.search(last.replace("-", "_")) else "max"


def summarized(known: Mapping[str, Any] | None, event: MetricsLogged) -> dict[str, Any]:
    """Return the summary with an event in it. Of a name that several ranks log, the lowest rank counts."""
    summary = dict(known or {})
    for name, value in event.values.items():
        entry = summary.get(name)
        if entry is None and len(summary) >= MAX_SUMMARIZED:
            continue
        if entry is None or event.rank < entry["rank"]:
            entry = {"goal": goal_of(name), "rank": event.rank, "best": None, "best_step": None}
        elif event.rank > entry["rank"]:
            continue
        entry = {**entry, "last": finite_or_name(float(value)), "step": event.step}
        if math.isfinite(value) and _is_better(value, entry["best"], entry["goal"]):
            entry |= {"best": float(value), "best_step": event.step}
        summary[name] = entry
    return summary


def _is_better(value: float, best: float | None, goal: str) -> bool:
    return best is None or (value < best if goal == "min" else value > best)
