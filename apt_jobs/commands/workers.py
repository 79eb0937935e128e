"""`apt-jobs worker` starts one; `apt-jobs workers` lists those that run, drains one and lets it work again."""

from typing import Annotated

import typer

from apt_jobs.commands.processes import prepare_process
from apt_jobs.commands.terminal import AsJson, echo, load_settings, open_client, print_json, print_table

app = typer.Typer(no_args_is_help=True, help="The workers that run, and what they do.")
start_app = typer.Typer(no_args_is_help=True, help="Start a worker.")
Name = Annotated[str, typer.Argument(help="As `apt-jobs workers list` shows it.")]
NewName = Annotated[
    str | None,
    typer.Option("--name", help="Unique name of this worker; default: one that is the same after a restart."),
]
Gpus = Annotated[str | None, typer.Option(help="Indexes of the GPUs to use, as 0,1 ('': none); default: all.")]
Queue = Annotated[list[str] | None, typer.Option("--queue", help="Queue to serve; may be repeated.")]


@start_app.command("train")
def start_train(
    gpus: Gpus = None,
    queue: Queue = None,
    name: NewName = None,
    num_nodes: Annotated[
        int, typer.Option(min=1, max=64, help="Machines that train together; the others run `worker node`.")
    ] = 1,
) -> None:
    """Start a training worker: as many jobs at once as fit."""
    from apt_jobs.workers.gpus import parse_gpus
    from apt_jobs.workers.names import hold_default_name
    from apt_jobs.workers.train import run_train_worker

    settings = load_settings()
    prepare_process(settings)
    indexes = None if gpus is None else parse_gpus(gpus)
    run_train_worker(
        settings,
        name=name or hold_default_name(settings, "train", indexes),
        queues=queue or ["train"],
        gpus=indexes,
        num_nodes=num_nodes,
    )


@start_app.command("node")
def start_node(
    head: Annotated[str, typer.Option(help="Name of the training worker that this machine belongs to.")],
    node_rank: Annotated[int, typer.Option(min=1, max=63, help="Which of its machines this is; the head is 0.")] = 1,
    gpus: Gpus = None,
) -> None:
    """Start a further machine of a training worker."""
    from apt_jobs.workers.gpus import parse_gpus
    from apt_jobs.workers.node import run_node

    settings = load_settings()
    prepare_process(settings)
    run_node(settings, head=head, node_rank=node_rank, gpus=None if gpus is None else parse_gpus(gpus))


@start_app.command("generate")
def start_generate(queue: Queue = None, name: NewName = None) -> None:
    """Start a generation worker, which keeps models warm."""
    from apt_jobs.workers.generate import run_generate_worker
    from apt_jobs.workers.names import hold_default_name

    settings = load_settings()
    prepare_process(settings)
    name = name or hold_default_name(settings, "generate")
    run_generate_worker(settings, name=name, queues=queue or ["generate"])


@app.command("list")
def list_all(as_json: AsJson = False) -> None:
    """List the workers by name."""
    with open_client() as client:
        rows = client.workers()
    if as_json:
        print_json(rows)
        return
    table = []
    for row in rows:
        state = "lost" if not row["alive"] else "drained" if row["drained"] else "working"
        jobs = ", ".join(job["id"] for job in row["jobs"]) or row["current_job_id"] or ""
        gpus, cpus = str(len(row["gpus"])), ""
        if (resources := row["resources"]) is not None:
            gpus = f"{resources['gpus_free']} of {resources['gpus']}" if resources["gpus"] else "0"
            cpus = f"{resources['cpus_free']} of {resources['cpus']}"
        table.append([row["name"], row["kind"], state, jobs, gpus, cpus, ", ".join(row["queues"])])
    print_table(["name", "kind", "state", "jobs", "free GPUs", "free cores", "queues"], table)


@app.command()
def drain(name: Name) -> None:
    """Have a worker hand back its jobs, with a checkpoint, and claim no other. Its process stays."""
    with open_client() as client:
        client.steer_worker(name, "drain")
    echo(f"{name} is told to hand back its jobs and to claim no other")


@app.command()
def resume(name: Name) -> None:
    """Let a drained worker claim jobs again."""
    with open_client() as client:
        client.steer_worker(name, "resume")
    echo(f"{name} may claim jobs again")
