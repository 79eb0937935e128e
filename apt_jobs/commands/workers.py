"""`apt-jobs worker` starts one; `apt-jobs workers` lists those that run, drains one and lets it work again."""

from typing import Annotated

import typer

from apt_jobs.commands.processes import prepare_process
from apt_jobs.commands.terminal import AsJson, echo, load_settings, open_client, print_json, print_table
from apt_jobs.errors import InvalidInput
from apt_jobs.jobs.spec import NAME_PATTERN

app = typer.Typer(no_args_is_help=True, help="The workers that run, and what they do.")
start_app = typer.Typer(no_args_is_help=True, help="Start a worker.")
Name = Annotated[str, typer.Argument(help="As `apt-jobs workers list` shows it.")]
NewName = Annotated[
    str | None,
    typer.Option("--name", help="Unique name of this worker; default: one that is the same after a restart."),
]
Gpus = Annotated[str | None, typer.Option(help="Indexes of the GPUs to use, as 0,1 ('': none); default: all.")]
Queue = Annotated[list[str] | None, typer.Option("--queue", help="Queue to serve; may be repeated.")]

Pool = Annotated[str | None, typer.Option(help="Pool of nodes, any of which a training over several machines takes.")]
MetricsPort = Annotated[
    int | None,
    typer.Option(min=1, max=65535, help="TCP port where Prometheus scrapes this worker, on APT_JOBS_METRICS_HOST."),
]


def pool_name(pool: str | None) -> str | None:
    """Return the name of a pool.

    Raises:
        InvalidInput: it is no name.
    """
    if pool is not None and not NAME_PATTERN.match(pool):
        raise InvalidInput(f"{pool!r} is no name of a pool; take up to 100 letters, digits, dots, dashes, underscores")
    return pool


@start_app.command("train")
def start_train(
    gpus: Gpus = None,
    queue: Queue = None,
    name: NewName = None,
    num_nodes: Annotated[
        int, typer.Option(min=1, max=64, help="Machines that train together; the others run `worker node`.")
    ] = 1,
    pool: Pool = None,
    metrics_port: MetricsPort = None,
) -> None:
    """Start a training worker: as many jobs at once as fit."""
    from apt_jobs.workers.gpus import parse_gpus
    from apt_jobs.workers.names import hold_default_name
    from apt_jobs.workers.train import run_train_worker

    if pool is not None and num_nodes > 1:
        raise InvalidInput(f"a worker has {num_nodes} machines of its own or those of a pool: leave one of them out")
    settings = load_settings()
    prepare_process(settings)
    indexes = None if gpus is None else parse_gpus(gpus)
    run_train_worker(
        settings,
        name=name or hold_default_name(settings, "train", indexes),
        queues=queue or ["train"],
        gpus=indexes,
        num_nodes=num_nodes,
        pool=pool_name(pool),
        metrics_port=metrics_port,
    )


@start_app.command("slurm")
def start_slurm(
    partition: Annotated[str | None, typer.Option(help="Partition of Slurm; default: the cluster's.")] = None,
    queue: Queue = None,
    name: NewName = None,
    max_jobs: Annotated[int, typer.Option(min=1, max=256, help="Most jobs at once, waiting in Slurm or running.")] = 16,
    sbatch: Annotated[
        list[str] | None, typer.Option("--sbatch", help="Further option of sbatch, as --account=team; may be repeated.")
    ] = None,
    gpu_memory_gb: Annotated[
        float, typer.Option(min=0, max=10_000, help="Memory of each GPU in GB, for jobs that ask for some.")
    ] = 0.0,
    submit_timeout_s: Annotated[float, typer.Option(min=1, max=3_600, help="Longest wait for sbatch.")] = 120.0,
    max_pending_hours: Annotated[
        float, typer.Option(min=0.01, max=8_760, help="Longest wait in Slurm; then the job is handed back.")
    ] = 168.0,
    poll_s: Annotated[float, typer.Option(min=0.2, max=300, help="Time between two looks at Slurm.")] = 5.0,
) -> None:
    """Start a worker that submits its jobs to Slurm, from a machine that has sbatch."""
    from apt_jobs.workers.names import hold_default_name
    from apt_jobs.workers.slurm.attempt import SlurmOptions
    from apt_jobs.workers.slurm.worker import run_slurm_worker

    if wrong := [option for option in sbatch or [] if not option.startswith("--")]:
        raise InvalidInput(f"{wrong[0]!r} is no option of sbatch; write it as --sbatch=--account=team")
    if name is not None and not NAME_PATTERN.match(name):
        raise InvalidInput(f"{name!r} is no name that Slurm takes: letters, digits, dots, dashes, underscores")
    settings = load_settings()
    prepare_process(settings)
    options = SlurmOptions(
        partition=partition,
        max_jobs=max_jobs,
        options=tuple(sbatch or ()),
        submit_timeout_s=submit_timeout_s,
        poll_s=poll_s,
        max_pending_s=3_600 * max_pending_hours,
        gpu_memory_gb=gpu_memory_gb,
    )
    name = name or hold_default_name(settings, "slurm")
    run_slurm_worker(settings, options, name=name, queues=queue or ["slurm"])


@start_app.command("node")
def start_node(
    head: Annotated[
        str | None, typer.Option(help="Name of the one training worker that this machine belongs to.")
    ] = None,
    node_rank: Annotated[int, typer.Option(min=1, max=63, help="Which of its machines this is; the head is 0.")] = 1,
    pool: Pool = None,
    name: NewName = None,
    gpus: Gpus = None,
) -> None:
    """Start a further machine for trainings that span several: of a pool, or of one training worker."""
    from apt_jobs.workers.gpus import parse_gpus
    from apt_jobs.workers.names import hold_default_name
    from apt_jobs.workers.node import run_node, run_pool_node

    if (head is None) == (pool is None):
        raise InvalidInput("a node belongs to a pool or to one worker: give either --pool NAME or --head NAME")
    settings = load_settings()
    indexes = None if gpus is None else parse_gpus(gpus)
    if head is not None:
        prepare_process(settings)
        run_node(settings, head=head, node_rank=node_rank, gpus=indexes)
    elif (checked := pool_name(pool)) is not None:
        prepare_process(settings)
        run_pool_node(settings, pool=checked, name=name or hold_default_name(settings, "node", indexes), gpus=indexes)


@start_app.command("generate")
def start_generate(queue: Queue = None, name: NewName = None, metrics_port: MetricsPort = None) -> None:
    """Start a generation worker, which keeps models warm."""
    from apt_jobs.workers.generate import run_generate_worker
    from apt_jobs.workers.names import hold_default_name

    settings = load_settings()
    prepare_process(settings)
    name = name or hold_default_name(settings, "generate")
    run_generate_worker(settings, name=name, queues=queue or ["generate"], metrics_port=metrics_port)


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
