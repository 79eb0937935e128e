"""What both clients do with comparisons: the request, and the answer with its types."""

from collections.abc import Sequence
from typing import Any, Literal, TypedDict

from apt_jobs.client.async_transport import AsyncTransport
from apt_jobs.client.calls import Call
from apt_jobs.client.transport import Transport
from apt_jobs.errors import InvalidInput

Axis = Literal["step", "tokens", "seconds", "epoch"]
MAX_REPEATS = 20  # of a request while the service still reads long logs


class ComparedJob(TypedDict):
    """One of the jobs; its place in `jobs` is its place in every list of the comparison."""

    id: str
    name: str | None
    state: str
    step: int | None
    num_steps: int | None
    created_at: str
    finished_at: str | None
    sweep_id: str | None
    without_x: str | None


class ComparedMetric(TypedDict):
    """What each job reached; None: it has no such value. What is not finite is "NaN", "Infinity" or "-Infinity"."""

    goal: Literal["min", "max"] | None
    last: list[float | str | None]
    best: list[float | None]
    at: list[float | str | None] | None
    last_delta: list[float | None] | None
    best_delta: list[float | None] | None
    at_delta: list[float | None] | None


class Comparison(TypedDict):
    """Jobs side by side, as `GET /api/compare` answers."""

    object: Literal["comparison"]
    jobs: list[ComparedJob]
    not_compared: list[dict[str, str]]
    num_matched: int
    baseline: str | None
    objective: dict[str, str] | None
    settings: dict[str, list[Any]]
    num_settings_left_out: int
    metrics: dict[str, ComparedMetric]
    x: Axis
    points: list[float]
    series: dict[str, list[list[float | str | None]]]
    is_complete: bool


def compare_jobs(
    jobs: Sequence[str] | None,
    *,
    sweep: str | None,
    filter: str | None,
    metrics: Sequence[str] | None,
    x: Axis,
    points: int | None,
    at_step: int | None,
    baseline: str | None,
) -> Call[Comparison]:
    """Build the request.

    Raises:
        InvalidInput: an id or a name has a comma, which stands between them.
    """
    for values, what in ((jobs, "an id"), (metrics, "the name of a metric")):
        if wrong := [value for value in values or () if "," in value]:
            raise InvalidInput(f"{what} has a comma, which cannot be asked for: {wrong[0][:100]!r}")
    params = {
        "jobs": None if jobs is None else ",".join(jobs),
        "sweep": sweep,
        "filter": filter,
        "metrics": None if metrics is None else ",".join(metrics),
        "x": x,
        "points": points,
        "at_step": at_step,
        "baseline": baseline,
    }
    given = {name: value for name, value in params.items() if value is not None}
    return Call("GET", "/api/compare", _as_comparison, params=given)


def _as_comparison(answer: Any) -> Comparison:
    comparison: Comparison = answer
    return comparison


class CompareCalls(Transport):
    """The part of `Client` that is about comparisons."""

    def compare(
        self,
        jobs: Sequence[str] | None = None,
        *,
        sweep: str | None = None,
        filter: str | None = None,
        metrics: Sequence[str] | None = None,
        x: Axis = "step",
        points: int | None = None,
        at_step: int | None = None,
        baseline: str | None = None,
    ) -> Comparison:
        """Compare up to 100 training jobs: settings that differ, last and best values, series on one axis.

        Args:
            jobs: Ids.
            sweep: Id of a sweep instead: its jobs, the best first.
            filter: As of `iter_jobs` instead: the newest jobs that it matches.
            metrics: Whose series are wanted; default: the first five.
            x: Axis of the series: `step`, `tokens`, `seconds` or `epoch`.
            points: Most points of a series.
            at_step: Return the values at this step, too.
            baseline: Id of the job that the others are compared with.

        Example:
            found = client.compare(["job_a", "job_b"], metrics=["val_loss"], baseline="job_a")
            print(found["settings"], found["metrics"]["val_loss"]["best_delta"])
        """
        call = compare_jobs(
            jobs,
            sweep=sweep,
            filter=filter,
            metrics=metrics,
            x=x,
            points=points,
            at_step=at_step,
            baseline=baseline,
        )
        for _ in range(MAX_REPEATS):
            if (found := self._send(call))["is_complete"]:
                break
        return found


class AsyncCompareCalls(AsyncTransport):
    """The part of `AsyncClient` that is about comparisons."""

    async def compare(
        self,
        jobs: Sequence[str] | None = None,
        *,
        sweep: str | None = None,
        filter: str | None = None,
        metrics: Sequence[str] | None = None,
        x: Axis = "step",
        points: int | None = None,
        at_step: int | None = None,
        baseline: str | None = None,
    ) -> Comparison:
        """Compare up to 100 training jobs, as `Client.compare`."""
        call = compare_jobs(
            jobs,
            sweep=sweep,
            filter=filter,
            metrics=metrics,
            x=x,
            points=points,
            at_step=at_step,
            baseline=baseline,
        )
        for _ in range(MAX_REPEATS):
            if (found := await self._send(call))["is_complete"]:
                break
        return found
