"""`apt-jobs schedules`: jobs that come due by themselves."""

from typing import Annotated, Any

import typer

from apt_jobs.commands.terminal import AsJson, JobFile, echo, open_client, print_json, print_table, read_job

app = typer.Typer(no_args_is_help=True, help="Jobs that come due by a cron expression.")
ScheduleId = Annotated[str, typer.Argument(help="As `apt-jobs schedules list` shows it.")]


@app.command("list")
def list_all(as_json: AsJson = False) -> None:
    """List the schedules by name."""
    with open_client() as client:
        rows = client.schedules()
    if as_json:
        print_json(rows)
        return
    columns = ["id", "cron", "time zone", "next run", "last run", "name"]
    table = [[row["id"], row["cron"], row["time_zone"], _next(row), _last(row), row["name"]] for row in rows]
    print_table(columns, table)


@app.command()
def create(
    name: str,
    cron: Annotated[str, typer.Argument(help="Five fields in quotes, or @hourly, @daily, @nightly, @weekly, ...")],
    file: JobFile,
    time_zone: Annotated[str, typer.Option(help="IANA name, as Europe/Berlin.")] = "UTC",
    overlap: Annotated[str, typer.Option(help="skip, queue or cancel")] = "skip",
    catch_up: Annotated[str, typer.Option(help="skip, latest or all")] = "latest",
) -> None:
    """Add a schedule."""
    job = read_job(file)
    with open_client() as client:
        row = client.create_schedule(
            name=name, cron=cron, job=job, time_zone=time_zone, overlap=overlap, catch_up=catch_up
        )
    echo(f"{row['id']} is due next at " + ", ".join(row["next_runs"]))


@app.command()
def inspect(schedule_id: ScheduleId) -> None:
    """Print all about one schedule with its runs, as JSON."""
    with open_client() as client:
        print_json(client.schedule(schedule_id))


@app.command()
def pause(schedule_id: ScheduleId) -> None:
    """Stop firing."""
    with open_client() as client:
        client.steer_schedule(schedule_id, "pause")
    echo(f"{schedule_id} is paused")


@app.command()
def resume(schedule_id: ScheduleId) -> None:
    """Fire again, from the next due time on."""
    with open_client() as client:
        row = client.steer_schedule(schedule_id, "resume")
    echo(f"{schedule_id} is due next at {row['next_run_at']}")


@app.command()
def run(schedule_id: ScheduleId) -> None:
    """Submit the schedule's job now."""
    with open_client() as client:
        job = client.steer_schedule(schedule_id, "run")
    echo(f"{job['id']} is {job['state']}")


@app.command()
def delete(schedule_id: ScheduleId) -> None:
    """Delete a schedule; its jobs stay."""
    with open_client() as client:
        client.delete_schedule(schedule_id)


def _next(row: dict[str, Any]) -> str:
    return "paused" if row["paused"] else row["next_run_at"] or "never"


def _last(row: dict[str, Any]) -> str:
    last = row["last_run"]
    return "" if last is None else f"{last['outcome']} {last['job_state'] or ''}".rstrip()
