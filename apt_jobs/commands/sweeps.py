"""`apt-jobs sweep` and `apt-jobs sweeps`: many trainings as one."""

import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from apt_jobs.client.calls import is_over
from apt_jobs.client.client import Client
from apt_jobs.client.sweep_calls import POLL_S
from apt_jobs.commands.terminal import AsJson, echo, open_client, print_json, print_table, read_job
from apt_jobs.errors import InvalidInput

start_app = typer.Typer()
app = typer.Typer(no_args_is_help=True, help="Trainings that differ in some fields, as one.")
SweepId = Annotated[str, typer.Argument(help="As `apt-jobs sweeps list` shows it.")]
RANGE = re.compile(r"(?P<min>[^,]+)\.\.(?P<max>[^,:]+)(?P<log>:log)?")


@start_app.command()
def sweep(
    file: Annotated[
        Path | None, typer.Argument(help="A sweep or a training job as JSON; - reads standard input.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="FIELD=VALUE,VALUE,... or FIELD=MIN..MAX[:log]; may be repeated."),
    ] = None,
    method: Annotated[str | None, typer.Option(help="grid, random, list, halving or tpe")] = None,
    num_jobs: Annotated[int | None, typer.Option(help="How many settings random and halving sample.")] = None,
    min_steps: Annotated[int | None, typer.Option(help="Of halving: steps before the first comparison.")] = None,
    metric: Annotated[str | None, typer.Option(help="What to compare; default: val_loss.")] = None,
    goal: Annotated[str | None, typer.Option(help="minimize or maximize")] = None,
    max_running: Annotated[int | None, typer.Option(help="Most of its jobs at once.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Jobs of each setting, with seeds of their own.")] = None,
    name: Annotated[str | None, typer.Option(help="Shown in lists.")] = None,
    detach: Annotated[bool, typer.Option("-d", "--detach", help="Do not follow it.")] = False,
) -> None:
    """Submit a sweep and follow it; the exit status is 0 if it succeeds. Ctrl-C only stops following."""
    request = _request(None if file is None else read_job(file), set_ or [])
    options: dict[str, Any] = {"method": method, "num_jobs": num_jobs, "metric": metric, "goal": goal, "name": name}
    options |= {"max_running": max_running, "repeats": repeats}
    options["halving"] = None if min_steps is None else {**(request.get("halving") or {}), "min_steps": min_steps}
    request |= {key: value for key, value in options.items() if value is not None}
    with open_client() as client:
        made = client.create_sweep(request)
        echo(f"{made['id']} has {made['num_jobs']} jobs")
        if not detach and _follow(client, made["id"])["state"] != "succeeded":
            raise typer.Exit(1)


@app.command("list")
def list_all(as_json: AsJson = False) -> None:
    """List sweeps, newest first."""
    with open_client() as client:
        rows = client.sweeps()
    if as_json:
        print_json(rows)
        return
    table = [
        [row["id"], row["state"], f"{row['progress']['ended']}/{row['progress']['total']}", row["metric"], row["name"]]
        for row in rows
    ]
    print_table(["id", "state", "jobs", "metric", "name"], [[cell or "" for cell in row] for row in table])


@app.command()
def show(sweep_id: SweepId, as_json: AsJson = False) -> None:
    """Show the settings of a sweep, the best first."""
    with open_client() as client:
        found = client.sweep(sweep_id)
    if as_json:
        print_json(found)
    else:
        _print(found)


@app.command()
def watch(sweep_id: SweepId) -> None:
    """Follow a sweep to its end; the exit status is 0 if it succeeds, else 1."""
    with open_client() as client:
        if _follow(client, sweep_id)["state"] != "succeeded":
            raise typer.Exit(1)


@app.command()
def cancel(sweep_id: SweepId) -> None:
    """Cancel all jobs of a sweep."""
    with open_client() as client:
        echo(f"{sweep_id} is {client.steer_sweep(sweep_id, 'cancel')['state']}")


@app.command()
def pause(sweep_id: SweepId) -> None:
    """Pause all jobs of a sweep; trainings save first."""
    with open_client() as client:
        echo(f"{sweep_id} is {client.steer_sweep(sweep_id, 'pause')['state']}")


@app.command()
def resume(sweep_id: SweepId) -> None:
    """Let a paused sweep go on."""
    with open_client() as client:
        echo(f"{sweep_id} is {client.steer_sweep(sweep_id, 'resume')['state']}")


def _request(content: Mapping[str, Any] | None, given: Sequence[str]) -> dict[str, Any]:
    """Return the sweep of a file, or that of the job in it; with the parameters of `--set`."""
    if content is None and not given:
        raise InvalidInput("there is nothing to vary: name a file, or --set training.learning_rate=0.001,0.003")
    is_sweep = content is not None and "parameters" in content
    request = dict(content or {}) if is_sweep else {"spec": dict(content or {"kind": "train"}), "parameters": {}}
    parameters = [_parameter(text) for text in given]
    names = [name for name, _ in parameters]
    if len(names) > len(set(names)):
        raise InvalidInput(f"--set names a field twice, of {', '.join(names)}: write FIELD=VALUE,VALUE once")
    for field in ("parameters", "halving"):
        if not isinstance(request.get(field, {}), dict):
            raise InvalidInput(f"{field!r} of the sweep is a {type(request[field]).__name__}; expected an object")
    request["parameters"] = {**request["parameters"], **dict(parameters)}
    return request


def _parameter(text: str) -> tuple[str, dict[str, Any]]:
    """Return the parameter that `FIELD=VALUE,VALUE` or `FIELD=MIN..MAX:log` names.

    Raises:
        InvalidInput: it is neither.
    """
    name, equals, values = text.partition("=")
    if not name or not equals or not values:
        raise InvalidInput(f"--set {text[:100]!r} is no FIELD=VALUE,VALUE,... and no FIELD=MIN..MAX[:log]")
    if found := RANGE.fullmatch(values):
        scale = {"scale": "log"} if found["log"] else {}
        return name, {"min": _value(found["min"]), "max": _value(found["max"]), **scale}
    try:
        return name, {"values": json.loads(f"[{values}]")}  # also of lists, objects and texts in quotes
    except ValueError:
        return name, {"values": [_value(value) for value in values.split(",")]}


def _value(text: str) -> Any:
    """Return a number, true, false or null as what it is; all else is text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _follow(client: Client, sweep_id: str) -> dict[str, Any]:
    """Print a line whenever the sweep got further, and its table at the end."""
    shown = ""
    while True:
        found = client.sweep(sweep_id)
        if (line := _line(found)) != shown:
            echo(line)
            shown = line
        if is_over(found):
            _print(found)
            return found
        time.sleep(POLL_S)


def _line(found: Mapping[str, Any]) -> str:
    progress, best = found["progress"], found["best"]
    states = ", ".join(f"{count} {state}" for state, count in sorted(progress["states"].items()))
    ahead = "" if best is None else f"; best {found['metric']} {best['value']:.6g} of #{best['number']}"
    return f"{progress['ended']}/{progress['total']} jobs ended ({states}){ahead}"


def _print(found: Mapping[str, Any]) -> None:
    names = list(found["parameters"])
    rows = []
    for trial in found["table"]:
        settings = [json.dumps(trial["parameters"].get(name)) for name in names]
        states = sorted({job["state"] for job in trial["jobs"]})
        rows.append([str(trial["number"]), _shown(trial), *settings, ",".join(states), trial["jobs"][0]["id"]])
    print_table(["#", found["metric"], *names, "state", "job"], rows)
    if found["reason"] is not None:
        echo(f"{found['id']} is {found['state']}: {found['reason']}")


def _shown(trial: Mapping[str, Any]) -> str:
    if trial["value"] is None:
        return ""
    if trial["interval"] is None:
        return f"{trial['value']:.6g}"
    return f"{trial['value']:.6g} ± {trial['interval'][1] - trial['value']:.2g}"
