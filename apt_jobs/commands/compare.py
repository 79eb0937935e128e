"""`apt-jobs compare`: jobs side by side in the terminal."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from apt_jobs.client.comparison import ComparedJob, ComparedMetric, Comparison
from apt_jobs.commands.terminal import AsJson, echo, open_client, print_json, print_table
from apt_jobs.errors import InvalidInput

app = typer.Typer()
MAX_SIDE_BY_SIDE = 4  # jobs as columns; more of them are rows


@app.command()
def compare(
    job_ids: Annotated[list[str] | None, typer.Argument(help="Two jobs or more, as `apt-jobs ps` shows them.")] = None,
    sweep: Annotated[str | None, typer.Option(help="The jobs of a sweep instead, the best first.")] = None,
    filter_: Annotated[str | None, typer.Option("--filter", help="The jobs that it matches instead.")] = None,
    metrics: Annotated[
        list[str] | None, typer.Option("--metric", help="Only this metric; may be repeated. The first one is a column.")
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="Id of the job that the others are compared with.")] = None,
    at_step: Annotated[int | None, typer.Option(min=0, help="Show the values at this step, too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare training jobs: the settings in which they differ, the last and best values of their metrics."""
    if (bool(job_ids), sweep is not None, filter_ is not None).count(True) != 1:
        raise InvalidInput("name jobs, or --sweep, or --filter: one of the three")
    # The table has all metrics; series, for which long logs of scripts are read, are for --json and --at-step alone.
    wanted = metrics or None if as_json or at_step is not None else ["train_loss"]
    with open_client() as client:
        found = client.compare(
            job_ids or None,
            sweep=sweep,
            filter=filter_,
            metrics=wanted,
            points=None if as_json else 1,
            at_step=at_step,
            baseline=baseline,
        )
    if as_json:
        print_json(found)
        return
    shown = _chosen(found, metrics or [])
    if len(found["jobs"]) <= MAX_SIDE_BY_SIDE:
        _print_side_by_side(found, shown)
    else:
        _print_rows(found, shown)
    _print_rest(found)


def _chosen(found: Comparison, wanted: Sequence[str]) -> dict[str, ComparedMetric]:
    """Return the metrics to show, that of the sweep first.

    Raises:
        InvalidInput: no job has one that is wanted.
    """
    metrics = found["metrics"]
    for name in wanted:
        if name not in metrics:
            raise InvalidInput(f"no job has a metric {name!r}; they have {', '.join(metrics) or 'none'}")
    objective = (found["objective"] or {}).get("metric", "").replace("best_val_loss", "val_loss")
    names = list(wanted) or sorted(metrics, key=lambda name: name != objective)
    return {name: metrics[name] for name in names}


def _print_side_by_side(found: Comparison, metrics: Mapping[str, ComparedMetric]) -> None:
    """Print a column for each job, under the number that the first lines give it."""
    marks = [_mark(number, job, found["baseline"]) for number, job in enumerate(found["jobs"], 1)]
    rows = [
        [mark, job["id"], job["state"], _steps(job), job["name"] or ""]
        for mark, job in zip(marks, found["jobs"], strict=True)
    ]
    print_table(["", "job", "state", "step", "name"], rows)
    echo("")
    rows = [[path, *map(_setting, values)] for path, values in found["settings"].items()]
    for name, metric in metrics.items():
        for what, values, deltas in _values(metric):
            if any(value is not None for value in values):
                rows.append([f"{name} {what}", *_numbers(values, deltas)])
    print_table(["", *marks], rows)


def _print_rows(found: Comparison, metrics: Mapping[str, ComparedMetric]) -> None:
    """Print a row for each job: the first metric, and all settings that differ in the last column."""
    first = next(iter(metrics.items()), None)
    columns: list[tuple[str, list[str]]] = []
    if first is not None:
        name, metric = first
        for what, values, deltas in _values(metric):
            if any(value is not None for value in values):
                columns.append((f"{name} {what}", _numbers(values, deltas)))
    settings = found["settings"]
    rows = []
    for index, job in enumerate(found["jobs"]):
        varied = " ".join(f"{path}={_setting(values[index])}" for path, values in settings.items())
        mark = "* " if job["id"] == found["baseline"] else ""
        rows.append([f"{mark}{job['id']}", job["state"], *(values[index] for _, values in columns), varied])
    print_table(["job", "state", *(name for name, _ in columns), "settings"], rows)


def _print_rest(found: Comparison) -> None:
    for one in found["not_compared"]:
        echo(f"not compared: {one['id']}: {one['why']}")
    if found["num_matched"] > len(found["jobs"]):
        echo(f"{len(found['jobs'])} of {found['num_matched']} jobs")
    if found["num_settings_left_out"]:
        echo(f"{found['num_settings_left_out']} more settings differ")


def _mark(number: int, job: ComparedJob, baseline: str | None) -> str:
    return f"#{number}{'*' if job['id'] == baseline else ''}"


def _steps(job: ComparedJob) -> str:
    if job["step"] is None:
        return ""
    return str(job["step"]) if job["num_steps"] is None else f"{job['step']}/{job['num_steps']}"


def _values(metric: ComparedMetric) -> list[tuple[str, Sequence[Any], Sequence[float | None] | None]]:
    shown: list[tuple[str, Sequence[Any], Sequence[float | None] | None]] = [
        ("last", metric["last"], metric["last_delta"]),
        ("best", metric["best"], metric["best_delta"]),
    ]
    return [*shown, ("at", metric["at"], metric["at_delta"])] if metric["at"] is not None else shown


def _numbers(values: Sequence[Any], deltas: Sequence[float | None] | None) -> list[str]:
    shown = []
    for index, value in enumerate(values):
        delta = None if deltas is None else deltas[index]
        text = "" if value is None else f"{value:.5g}" if isinstance(value, int | float) else str(value)
        shown.append(f"{text} ({delta:+.2g})" if delta else text)
    return shown


def _setting(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value)
