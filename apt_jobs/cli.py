"""`apt-jobs`: everything that can be started, and what users type.

Process entries are imported inside their commands, the one exception to "imports at the top": `apt-jobs --help` answers
at once, the web process never loads torch, and a generation worker does.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from apt_jobs.addresses import is_wildcard
from apt_jobs.client.client import Client
from apt_jobs.commands import schedules, workers
from apt_jobs.commands.terminal import AsJson, JobFile, console, load_settings, open_client, print_table, read_job
from apt_jobs.directories import prepare_directory
from apt_jobs.errors import AptJobsError, OutOfSpace, Unavailable
from apt_jobs.logs import configure_logging
from apt_jobs.settings import Settings

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="A job queue with a live monitor for language models."
)
worker_app = typer.Typer(no_args_is_help=True, help="Start a worker.")
keys_app = typer.Typer(no_args_is_help=True, help="API keys.")
app.add_typer(worker_app, name="worker")
app.add_typer(keys_app, name="keys")
app.add_typer(schedules.app, name="schedules")
app.add_typer(workers.app, name="workers")

DataDir = Annotated[Path | None, typer.Option("--data-dir", help="Where everything is kept.")]
Port = Annotated[int | None, typer.Option("--port", min=1, max=65535, help="TCP port of the web process.")]
Gpus = Annotated[str | None, typer.Option(help="Indexes of the GPUs to use, as 0,1; default: all.")]
Queue = Annotated[list[str] | None, typer.Option("--queue", help="Queue to serve; may be repeated.")]
Name = Annotated[str | None, typer.Option("--name", help="Unique name of this worker.")]
ENDED = ("succeeded", "failed", "cancelled", "dead")


def main() -> None:
    """Run a command; an error of ours is one sentence and exit status 2."""
    try:
        app()
    except AptJobsError as exc:
        print(f"apt-jobs: {exc}", file=sys.stderr)
        sys.exit(2)


@app.command()
def up(port: Port = None, data_dir: DataDir = None) -> None:
    """Start everything on this machine: Valkey, web, a training and a generation worker."""
    from apt_jobs.workers.embedded import Stack, run_embedded

    settings = load_settings(port=port, data_dir=data_dir)
    configure_logging(settings.log_level)

    def on_ready(stack: Stack) -> None:
        console.print(f"\napt_jobs is up: [bold]{stack.browser_url}[/]", soft_wrap=True)
        console.print(f"data in {settings.root}", markup=False, highlight=False, soft_wrap=True)
        console.print("Open this link once, in the browser that you want to use:")
        console.print(f"  {stack.login_link}", soft_wrap=True)
        if is_wildcard(settings.host) and not settings.allowed_hosts:
            console.print(f"Other machines reach it at the addresses of this one, port {settings.port}, by HTTP only;")
            console.print("APT_JOBS_ALLOWED_HOSTS names it for them.")
        console.print("Ctrl-C stops everything.\n")

    run_embedded(settings, on_ready)


@app.command()
def web() -> None:
    """Start a web process."""
    from apt_jobs.web.serve import run_web

    settings = load_settings()
    _prepare_process(settings)
    run_web(settings)


@worker_app.command("train")
def worker_train(
    gpus: Gpus = None,
    queue: Queue = None,
    name: Name = None,
    num_nodes: Annotated[
        int, typer.Option(min=1, max=64, help="Machines that train together; the others run `worker node`.")
    ] = 1,
) -> None:
    """Start a training worker: one job at a time."""
    from apt_jobs.workers.train import run_train_worker

    settings = load_settings()
    _prepare_process(settings)
    indexes = None if gpus is None else _gpu_indexes(gpus)
    run_train_worker(
        settings,
        name=name or _worker_name("train"),
        queues=queue or ["train"],
        gpus=indexes,
        num_nodes=num_nodes,
    )


@worker_app.command("node")
def worker_node(
    head: Annotated[str, typer.Option(help="Name of the training worker that this machine belongs to.")],
    node_rank: Annotated[int, typer.Option(min=1, max=63, help="Which of its machines this is; the head is 0.")] = 1,
    gpus: Gpus = None,
) -> None:
    """Start a further machine of a training worker."""
    from apt_jobs.workers.node import run_node

    settings = load_settings()
    _prepare_process(settings)
    run_node(settings, head=head, node_rank=node_rank, gpus=None if gpus is None else _gpu_indexes(gpus))


@worker_app.command("generate")
def worker_generate(queue: Queue = None, name: Name = None) -> None:
    """Start a generation worker, which keeps models warm."""
    from apt_jobs.workers.generate import run_generate_worker

    settings = load_settings()
    _prepare_process(settings)
    run_generate_worker(settings, name=name or _worker_name("generate"), queues=queue or ["generate"])


@app.command()
def migrate() -> None:
    """Bring the database's schema up to date."""
    from apt_jobs.db.upgrade import upgrade_database

    with _database() as database:
        upgrade_database(database)
    console.print("the database is up to date")


@app.command()
def openapi() -> None:
    """Print the OpenAPI document."""
    from apt_jobs.web.app import document

    print(json.dumps(document(), indent=2))


@app.command("import")
def import_folder(
    folder: Annotated[
        Path, typer.Argument(help="What a training outside of any job wrote, as apt_jobs_runs/TIME-PID.")
    ],
    name: Annotated[str | None, typer.Option(help="Shown in lists; default: the folder's.")] = None,
) -> None:
    """Show a training that ran outside of any job. It becomes a job that has ended; doing it twice changes nothing."""
    from apt_jobs.db.upgrade import upgrade_database
    from apt_jobs.supervision.imported_run import import_run

    settings = load_settings()
    with _database() as database:
        if settings.database_url is None:  # as `apt-jobs up` would, which may never have run here
            settings.root.mkdir(parents=True, exist_ok=True)
            upgrade_database(database)
        job_id, is_new = import_run(database, folder, name)
    console.print(f"{job_id} {'is imported' if is_new else 'was imported before'}")


@keys_app.command("create")
def create(name: str, role: Annotated[str, typer.Option(help="viewer, submitter or admin")] = "submitter") -> None:
    """Make an API key. It is shown once."""
    from apt_jobs.db.access import Role, create_key

    if role not in list(Role):
        raise typer.BadParameter(f"{role!r} is no role; use {', '.join(Role)}")
    with _database() as database, database.write() as session:
        print(create_key(session, name, Role(role)))


@keys_app.command("list")
def list_all_keys() -> None:
    """List the API keys, without their secrets."""
    from apt_jobs.db.access import list_keys

    with _database() as database, database.read() as session:
        rows = list_keys(session)
    print_table(
        ["id", "name", "role", "revoked"], [[row.id, row.name, row.role, str(row.revoked_at or "")] for row in rows]
    )


@keys_app.command("revoke")
def revoke(key_id: str) -> None:
    """End an API key at once."""
    from apt_jobs.db.access import revoke_key

    with _database() as database, database.write() as session:
        revoke_key(session, key_id)


@app.command("login-link")
def login_link() -> None:
    """Print a link that logs one browser in, once, within an hour."""
    from apt_jobs.db.access import Role, create_login_token

    with _database() as database, database.write() as session:
        token = create_login_token(session, Role.ADMIN, 3600.0)
    print(f"{_service_url()}/login?token={token}")


@app.command()
def submit(
    file: JobFile,
    detach: Annotated[bool, typer.Option("-d", "--detach", help="Do not follow it.")] = False,
) -> None:
    """Submit a job and follow it; the exit status is 0 if it succeeds. Ctrl-C only stops following."""
    spec = read_job(file)
    with open_client() as client:
        job = client.submit(spec)
        console.print(f"{job['id']} is {job['state']}")
        if not detach and follow(client, job["id"])["state"] != "succeeded":
            raise typer.Exit(1)


@app.command()
def ps(
    as_json: AsJson = False, state: Annotated[list[str] | None, typer.Option(help="Only in this state.")] = None
) -> None:
    """List jobs, newest first."""
    with open_client() as client:
        rows = client.list_jobs(state=state or [])
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    print_table(
        ["id", "kind", "name", "state", "step", "created"],
        [[row["id"], row["kind"], row["name"] or "", row["state"], _steps(row), row["created_at"]] for row in rows],
    )


@app.command()
def inspect(job_id: str) -> None:
    """Print all about one job, as JSON."""
    with open_client() as client:
        print(json.dumps(client.get(job_id), indent=2, ensure_ascii=False))


@app.command()
def logs(
    job_id: str, follow_on: Annotated[bool, typer.Option("-f", "--follow", help="Go on until it ends.")] = False
) -> None:
    """Print what a job's ranks printed."""
    with open_client() as client:
        head = client.get(job_id)["last_seq"]
        for event in client.events(job_id):
            if event["kind"] == "log":
                print(f"[{event['source']}] {event['message']}")
            if event["seq"] >= head and not follow_on:
                break


@app.command()
def watch(job_id: str) -> None:
    """Follow a job with a progress bar."""
    with open_client() as client:
        follow(client, job_id)


@app.command()
def cancel(job_id: str) -> None:
    """Cancel a job."""
    with open_client() as client:
        job = client.cancel(job_id)
    console.print(f"{job_id} is {job['state']}" + ("" if job["state"] == "cancelled" else ", and told to stop"))


@app.command()
def pause(job_id: str) -> None:
    """Pause a job; a training saves first."""
    with open_client() as client:
        job = client.pause(job_id)
    console.print(f"{job_id} is {job['state']}")


@app.command()
def resume(job_id: str) -> None:
    """Let a paused job go on."""
    with open_client() as client:
        job = client.resume(job_id)
    console.print(f"{job_id} is {job['state']}")


@app.command()
def retry(job_id: str) -> None:
    """Queue a failed, cancelled or dead job again, from its last checkpoint."""
    with open_client() as client:
        job = client.retry(job_id)
    console.print(f"{job_id} is {job['state']}")


@app.command()
def export(
    job_id: str,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.", dir_okay=False)],
    form: Annotated[str, typer.Option("--format", help="csv, json, parquet, tensorboard or wandb.")] = "csv",
) -> None:
    """Write a job's full histories to a file."""
    with open_client() as client:
        client.export(job_id, form, output)
    print(f"wrote {output} ({output.stat().st_size:,} bytes)")


@app.command()
def checkpoints(job_id: Annotated[str | None, typer.Argument()] = None, as_json: AsJson = False) -> None:
    """List checkpoints, newest first."""
    with open_client() as client:
        rows = client.checkpoints(job_id)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    columns = ["id", "job_id", "global_step", "val_loss", "file_size_mb", "is_best"]
    print_table(columns, [[str(row[column]) for column in columns] for row in rows])


@app.command()
def generate(text: str, max_length: int = 100, temperature: float = 0.0, model: str | None = None) -> None:
    """Continue a text with the newest checkpoint, or with `--model`."""
    with open_client() as client:
        answer = client.generate(text, max_length=max_length, temperature=temperature, model=model)
    print(answer["input_text"] + answer["generated_text"])


@app.command()
def demo(port: Port = None) -> None:
    """Start everything, train a small model, show it live, generate from it. APT_JOBS_DEMO_EXIT=1 ends it then."""
    from apt_jobs.demo import run_demo

    run_demo(load_settings(port=port), console, follow)


def follow(client: Client, job_id: str) -> dict[str, Any]:
    """Show a job's progress until it ends; returns the job."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[words]}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("waiting", total=None, words="")
        for event in client.events(job_id):
            if event["kind"] == "started":
                progress.update(
                    bar, description="training", total=event["num_steps"], completed=event["resumed_from_step"]
                )
            elif event["kind"] == "metric":
                progress.update(bar, completed=event["step"], words=_metric_words(event, progress.tasks[0].total))
            elif event["kind"] == "anomaly":
                progress.console.print(f"[red]anomaly at step {event['step']}[/]: {len(event['layers'])} layers")
            elif event["kind"] == "state":
                progress.update(bar, description=event["state"])
                if event["state"] in ENDED and client.get(job_id)["state"] in ENDED:  # else it was retried
                    break
    job = client.get(job_id)
    if job["state"] != "succeeded":
        console.print(f"[red]{job['state']}[/]: {job['reason'] or ''}", markup=True, highlight=False)
        if job["error"] and job["error"].get("traceback"):
            console.print(job["error"]["traceback"], markup=False, highlight=False)
    return job


def _metric_words(event: dict[str, Any], total: float | None) -> str:
    words = f"epoch {event['epoch'] + 1}  step {_place(event['step'], total)}  loss {float(event['train_loss']):.3f}"
    if total is None:
        return words
    left_s = (total - event["step"]) * event["step_time_ms"] / 1000.0
    return f"{words}  {event['tokens_per_s']:,.0f} tokens/s  ETA {time.strftime('%M:%S', time.gmtime(left_s))}"


def _prepare_process(settings: Settings) -> None:
    """Do what each process of the service begins with. On a full disk it starts: what is there can be read."""
    configure_logging(settings.log_level)
    with suppress(OutOfSpace):
        prepare_directory(settings.root, "APT_JOBS_DATA_DIR")


def _service_url() -> str:
    """Where a browser of this user finds the service: what runs on this data directory, else what the settings say."""
    try:
        with open_client() as client:
            return client.browser_url
    except Unavailable:
        return load_settings().browser_url


@contextmanager
def _database() -> Iterator[Any]:
    from apt_jobs.db.engine import Database

    database = Database(load_settings().database)
    try:
        yield database
    finally:
        database.dispose()


def _worker_name(kind: str) -> str:
    return f"{kind}-{socket.gethostname()}-{os.getpid()}"


def _gpu_indexes(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError as exc:
        raise typer.BadParameter(f"{text!r} is no list of GPU indexes; write 0,1") from exc


def _steps(job: dict[str, Any]) -> str:
    if job["step"] is None:
        return ""
    return _place(job["step"], job["num_steps"])


def _place(step: int, num_steps: float | None) -> str:
    """Own training code does not say how many steps it will take."""
    return f"{step}" if num_steps is None else f"{step}/{int(num_steps)}"
