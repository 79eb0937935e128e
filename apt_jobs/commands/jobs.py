"""`apt-jobs submit`, `ps`, `watch`, `logs` and all else that is about jobs and what comes of them."""

from contextlib import suppress
from typing import Annotated, Any, Literal, cast, get_args

import typer

from apt_jobs.client.output_file import is_stream
from apt_jobs.commands.preflight import print_preflight
from apt_jobs.commands.progress import follow, place
from apt_jobs.commands.terminal import (
    AsJson,
    JobFile,
    echo,
    open_client,
    print_json,
    print_table,
    read_job,
)
from apt_jobs.errors import InvalidInput, NotFound
from apt_jobs.jobs.merge_patch import patch_of

app = typer.Typer()
JobId = Annotated[str, typer.Argument(help="As `apt-jobs ps` shows it.")]
Action = Literal["cancel", "pause", "resume", "retry", "delete"]
PAGE = 200  # jobs


@app.command()
def submit(
    file: JobFile,
    detach: Annotated[bool, typer.Option("-d", "--detach", help="Do not follow it.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take and which worker could run it; queue nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Submit a job and follow it; the exit status is 0 if it succeeds. Ctrl-C only stops following.

    With --dry-run it is 1 if no worker that is alive could run the job. --json is for that alone.
    """
    spec = read_job(file)
    with open_client() as client:
        if dry_run:
            found = client.preflight(spec)
            print_json(found) if as_json else print_preflight(found)
            raise typer.Exit(1 if found["fits"] is False else 0)
        job = client.submit(spec)
        echo(f"{job.id} is {job.state}")
        if not detach and follow(client, job.id).state != "succeeded":
            raise typer.Exit(1)


@app.command()
def clone(
    job_id: JobId,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="training.max_steps=10; JSON or text, null removes; may be repeated."),
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="The same packages and data, or none.")] = False,
    checkpoint: Annotated[str | None, typer.Option(help="Start from its checkpoint: best or latest.")] = None,
    watched: Annotated[bool, typer.Option("--watch", help="Follow it as watch does.")] = False,
) -> None:
    """Submit a job again, with changes; prints the new job's id. Its code is the very same."""
    if checkpoint not in (None, "best", "latest"):
        raise InvalidInput(f"--checkpoint {checkpoint!r} is neither best nor latest")
    patch = patch_of(changes or [])
    with open_client() as client:
        which = cast("Literal['best', 'latest'] | None", checkpoint)
        job = client.clone(job_id, patch, exact=exact, checkpoint=which)
        echo(job.id)
        if watched and follow(client, job.id).state != "succeeded":
            raise typer.Exit(1)


@app.command()
def ps(
    as_json: AsJson = False,
    state: Annotated[list[str] | None, typer.Option(help="Only in this state; may be repeated.")] = None,
    filter_: Annotated[
        str | None, typer.Option("--filter", help='As "state:running label:team=a lr>1e-3"; docs/how-to/many_jobs.md.')
    ] = None,
    sort: Annotated[
        str | None,
        typer.Option(
            help="active, or created_at, priority, step, name, queue, metrics.NAME.last; with a minus downwards."
        ),
    ] = None,
    limit: Annotated[int, typer.Option("-n", "--limit", min=1, max=100_000, help="Most jobs to show.")] = 50,
) -> None:
    """List jobs, newest first if nothing else is asked for."""
    rows = []
    with open_client() as client:
        for job in client.iter_jobs(state=state or [], filter=filter_, sort=sort, limit=min(limit, PAGE)):
            rows.append(job)
            if len(rows) == limit:
                break
    if as_json:
        print_json(rows)
        return
    print_table(
        ["id", "kind", "state", "step", "created", "name"],
        [[row["id"], row["kind"], _state(row), _steps(row), row["created_at"], row["name"] or ""] for row in rows],
    )


@app.command()
def inspect(job_id: JobId) -> None:
    """Print all about one job, as JSON; with the commit and the diff of the code that it brought."""
    with open_client() as client:
        job = client.get(job_id)
        if (code := job["spec"].get("code")) is not None and code.get("sha256"):
            with suppress(NotFound):
                job["code"] = client.code(code["sha256"])
        print_json(job)


@app.command()
def logs(
    job_id: JobId, follow_on: Annotated[bool, typer.Option("-f", "--follow", help="Go on until it ends.")] = False
) -> None:
    """Print what a job's ranks printed."""
    with open_client() as client:
        client.get(job_id)  # a service that is away is an error at the start; later it is waited for
        read = client.events if follow_on else client.stored_events
        for event in read(job_id, kinds=("log",)):
            echo(f"[{event['source']}] {event['message']}", keep="\t")


@app.command()
def watch(job_id: JobId) -> None:
    """Follow a job with a progress bar; the exit status is 0 if it succeeds, else 1."""
    with open_client() as client:
        if follow(client, job_id).state != "succeeded":
            raise typer.Exit(1)


@app.command("many")
def steer_many(
    action: Annotated[str, typer.Argument(help="cancel, pause, resume, retry or delete")],
    job_ids: Annotated[list[str] | None, typer.Argument(help="As `apt-jobs ps` shows them.")] = None,
    filter_: Annotated[str | None, typer.Option("--filter", help="All that it matches now, instead of ids.")] = None,
) -> None:
    """Steer many jobs at once; the exit status is 1 if one of them is refused."""
    if action not in get_args(Action):
        raise InvalidInput(f"{action!r} is nothing that many jobs can be asked; expected {', '.join(get_args(Action))}")
    with open_client() as client:
        answer = client.steer_jobs(cast(Action, action), job_ids or None, filter=filter_)
    echo(f"{answer['changed']} of {answer['matched']} jobs changed")
    for refused in answer["refused"]:
        echo(f"{refused['id']}: {refused['why']}")
    if answer["refused"]:
        raise typer.Exit(1)


@app.command()
def cancel(job_id: JobId) -> None:
    """Cancel a job."""
    with open_client() as client:
        job = client.cancel(job_id)
    echo(f"{job_id} is {job.state}" + ("" if job.state == "cancelled" else ", and told to stop"))


@app.command()
def pause(job_id: JobId) -> None:
    """Pause a job; a training saves first."""
    with open_client() as client:
        job = client.pause(job_id)
    echo(f"{job_id} is {job.state}")


@app.command()
def resume(job_id: JobId) -> None:
    """Let a paused job go on."""
    with open_client() as client:
        job = client.resume(job_id)
    echo(f"{job_id} is {job.state}")


@app.command()
def retry(job_id: JobId) -> None:
    """Queue a failed, cancelled or dead job again, from its last checkpoint."""
    with open_client() as client:
        job = client.retry(job_id)
    echo(f"{job_id} is {job.state}")


@app.command()
def export(
    job_id: JobId,
    output: Annotated[str, typer.Option("--output", "-o", help="File to write; - is standard output.")],
    form: Annotated[str, typer.Option("--format", help="csv, json, parquet, tensorboard or wandb.")] = "csv",
) -> None:
    """Write a job's full histories to a file."""
    with open_client() as client:
        _print_written(output, client.export(job_id, form, output))


@app.command()
def checkpoints(job_id: Annotated[str | None, typer.Argument()] = None, as_json: AsJson = False) -> None:
    """List checkpoints, newest first."""
    with open_client() as client:
        rows = client.checkpoints(job_id)
    if as_json:
        print_json(rows)
        return
    columns = ["id", "job_id", "global_step", "val_loss", "file_size_mb", "is_best"]
    print_table(columns, [[str(row[column]) for column in columns] for row in rows])


@app.command()
def download(
    checkpoint_id: Annotated[str, typer.Argument(help="As `apt-jobs checkpoints` shows it.")],
    output: Annotated[str, typer.Option("--output", "-o", help="File to write; - is standard output.")],
    merged: Annotated[
        bool, typer.Option("--merged", help="The whole model alone, an adapter added to its base model.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="Of the merged weights: float32 (default), bfloat16 or float16.")
    ] = None,
) -> None:
    """Write a checkpoint's tar file."""
    with open_client() as client:
        _print_written(output, client.download(checkpoint_id, output, merged=merged, dtype=dtype))


def _print_written(output: str, num_bytes: int) -> None:
    if not is_stream(output):
        echo(f"wrote {output} ({num_bytes:,} bytes)")


def _state(job: dict[str, Any]) -> str:
    times = job["num_preemptions"]
    return f"{job['state']} (preempted {times}x)" if times and job["finished_at"] is None else str(job["state"])


def _steps(job: dict[str, Any]) -> str:
    return "" if job["step"] is None else place(job["step"], job["num_steps"])
