"""`apt-jobs workers`: look at the running workers, drain one for maintenance, let it work again."""

import json
from typing import Annotated

import typer

from apt_jobs.commands.terminal import AsJson, console, open_client, print_table

app = typer.Typer(no_args_is_help=True, help="The workers that run, and what they do.")
Name = Annotated[str, typer.Argument(help="As `apt-jobs workers list` shows it.")]


@app.command("list")
def list_all(as_json: AsJson = False) -> None:
    """List the workers by name."""
    with open_client() as client:
        rows = client.workers()
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    columns = ["name", "kind", "queues", "state", "job", "GPUs"]
    table = []
    for row in rows:
        state = "lost" if not row["alive"] else "drained" if row["drained"] else "working"
        job, gpus = row["current_job_id"] or "", str(len(row["gpus"]))
        table.append([row["name"], row["kind"], ", ".join(row["queues"]), state, job, gpus])
    print_table(columns, table)


@app.command()
def drain(name: Name) -> None:
    """Have a worker hand back its job, with a checkpoint, and claim no other. Its process stays."""
    with open_client() as client:
        client.steer_worker(name, "drain")
    console.print(f"{name} is told to hand back its job and to claim no other")


@app.command()
def resume(name: Name) -> None:
    """Let a drained worker claim jobs again."""
    with open_client() as client:
        client.steer_worker(name, "resume")
    console.print(f"{name} may claim jobs again")
