"""`apt-jobs prune`: remove what is kept no longer, or say what would go."""

from typing import Annotated, Any

import typer

from apt_jobs.commands.terminal import AsJson, echo, open_client, print_json
from apt_jobs.errors import InvalidInput

app = typer.Typer()
Days = Annotated[float | None, typer.Option(help="Keep ended jobs for so many days.")]
COUNTED = {
    "num_jobs": "jobs",
    "num_checkpoints": "checkpoints of other jobs",
    "num_run_folders": "run folders of other jobs",
    "num_log_lines": "texts of log lines",
    "num_workers": "workers",
    "num_keys": "keys",
    "num_sessions": "sessions",
    "num_orphans": "folders without a row",
}


@app.command()
def prune(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")] = False,
    days: Days = None,
    label: Annotated[
        list[str] | None, typer.Option(help="Days of jobs with a label instead, as run=smoke:7 (0: for good).")
    ] = None,
    max_jobs: Annotated[int | None, typer.Option(min=0, help="Keep so many ended jobs, the newest.")] = None,
    max_bytes: Annotated[int | None, typer.Option(min=0, help="Keep so many bytes of checkpoints.")] = None,
    checkpoint_days: Annotated[float | None, typer.Option(help="Then one checkpoint of a job is left.")] = None,
    run_days: Annotated[float | None, typer.Option(help="Then run folders of ended jobs go.")] = None,
    log_days: Annotated[float | None, typer.Option(help="Then texts of their log lines go.")] = None,
    as_json: AsJson = False,
) -> None:
    """Remove ended jobs and what they left, by APT_JOBS_RETENTION of the service or by the options given here."""
    given: dict[str, Any] = {
        "days": days,
        "label_days": _label_days(label or []),
        "max_jobs": max_jobs,
        "max_bytes": max_bytes,
        "checkpoint_days": checkpoint_days,
        "run_days": run_days,
        "log_days": log_days,
    }
    policy = {name: value for name, value in given.items() if value not in (None, {})}
    with open_client() as client:
        answer = client.prune(policy or None, dry_run=dry_run)
        while not answer["is_complete"] and not dry_run:
            answer = _added_up(answer, client.prune(policy or None, dry_run=False))
    if as_json:
        print_json(answer)
        return
    if answer["policy"] is None:
        echo("there is no policy: set APT_JOBS_RETENTION for the service, or give --days, for instance")
        return
    parts = [f"{answer[name]:,} {what}" for name, what in COUNTED.items() if answer[name]]
    verb = "would remove" if dry_run else "removed"
    echo(f"{verb} {', '.join(parts) or 'nothing'}; {answer['num_bytes']:,} bytes of checkpoints")
    for why, number in sorted(answer["kept"].items()):
        echo(f"{number:,} jobs stay: {why}")


def _added_up(before: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    """Return the answer of a further run with what those before removed."""
    sums = {name: before[name] + answer[name] for name in answer if name.startswith("num_")}
    return {**answer, **sums, "job_ids": before["job_ids"]}


def _label_days(texts: list[str]) -> dict[str, float]:
    found = {}
    for text in texts:
        label, separator, days = text.rpartition(":")
        try:
            found[label] = float(days)
        except ValueError:
            separator = ""
        if not separator or not label:
            raise InvalidInput(f"{text!r} is no label with days; write it as run=smoke:7")
    return found
