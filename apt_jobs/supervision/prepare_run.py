"""From a job's row to the run file of one attempt: every reference resolved, every refusal in words."""

import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orjson

from apt_jobs.artifacts.adapters import MAX_ADAPTERS, base_model_of, is_adapter_dir
from apt_jobs.artifacts.checkpoints import checkpoint_dir, checkpoints_of_job, complete_checkpoint_dir
from apt_jobs.artifacts.code import unpack_code
from apt_jobs.artifacts.datasets import identify_dataset
from apt_jobs.artifacts.models import local_model_dir, resolve_model
from apt_jobs.artifacts.runs import run_dir, runs_of_job
from apt_jobs.artifacts.shared_space import prune_shared
from apt_jobs.db.checkpoints import get_checkpoint, newest_of_job
from apt_jobs.db.dataset_pins import pin_dataset
from apt_jobs.db.engine import Database
from apt_jobs.db.gangs import gang_of
from apt_jobs.db.models import Checkpoint, Job
from apt_jobs.db.workers import list_workers, node_name
from apt_jobs.errors import InvalidCheckpoint, InvalidDataset, InvalidInput, NotFound, WorkerLacks
from apt_jobs.git_hosts import host_of
from apt_jobs.jobs.environment import as_flag
from apt_jobs.jobs.run_file import SCRIPT_SUFFIX, EnvironmentPlan, GitPlan, NamedSource, RunFile
from apt_jobs.jobs.spec import BUILTIN_DATASET, BUILTIN_ENTRY_POINT, CHECKPOINT_ID_PATTERN, TrainSpec
from apt_jobs.operations.data_directory import require_room
from apt_jobs.operations.liveness import alive_within_s
from apt_jobs.settings import Settings
from apt_jobs.supervision.machine import offered_cpus

RUN_FILE = "run.json"  # in the folder of an attempt
OUTPUT_FOLDER = "output"  # beside the attempts of a job


def plan_attempt(
    settings: Settings,
    database: Database,
    job: Job,
    gpus: Sequence[int],
    num_nodes: int,
    rendezvous: Callable[[], str],
    threads_per_rank: int | None = None,
) -> RunFile:
    """Write the run file of the job's current attempt and return it.

    `num_nodes` is how many nodes the worker has; `rendezvous` says where they meet, if the job wants several.

    Raises:
        WorkerLacks: the job asks for what this worker does not have; the message names both.
        InvalidDataset: its data set cannot be read, or is not the one that its first attempt found.
        InvalidCheckpoint: the job starts from a checkpoint that was deleted: no worker can run it.
        Unavailable: the nodes find no place to meet.
        OSError, OutOfSpace: the data directory cannot be used, or has no room to start.
    """
    spec = TrainSpec.model_validate_json(orjson.dumps(job.spec))
    spec = spec.model_copy(update={"device": _device(settings, spec, gpus)})
    node_names = _further_nodes(settings, database, spec, job, num_nodes)
    folder = run_dir(settings, job.id, job.attempt)
    folder.mkdir(parents=True, exist_ok=True)
    require_room(settings)
    sources = _pinned_sources(settings, database, job.id, spec)
    prune_shared(settings.prepared_dir, settings.max_prepared_bytes)
    output_dir = runs_of_job(settings, job.id) / OUTPUT_FOLDER
    run_file = RunFile(
        job_id=job.id,
        attempt=job.attempt,
        spec=spec,
        **_what_to_run(settings, spec, output_dir),
        **_dataset_fields(sources),
        prepared_dir=settings.prepared_dir,
        **_base_fields(settings, database, spec),
        **_resume_fields(settings, database, job.id),
        datasets_dir=settings.datasets_dir,
        output_dir=output_dir,
        rendezvous=rendezvous() if spec.num_nodes > 1 else None,
        node_names=node_names,
        threads_per_rank=_threads_per_rank(settings, job, threads_per_rank),
        num_cpus=offered_cpus(settings),
        run_dir=folder,
        checkpoints_dir=checkpoints_of_job(settings, job.id),
        checkpoint_prefix=job.id,
    )
    _write(run_file)
    return run_file


def _threads_per_rank(settings: Settings, job: Job, proposed: int | None) -> int | None:
    """Return the threads of an earlier attempt on as many cores, else `proposed`.

    Sums come out differently with another number of threads: an attempt that resumes beside neighbours would not equal
    a training without a break, were it not for this.
    """
    for number in range(job.attempt - 1, 0, -1):
        try:
            earlier = RunFile.model_validate_json((run_dir(settings, job.id, number) / RUN_FILE).read_bytes())
        except (OSError, ValueError):
            continue  # it ended before it was planned
        return earlier.threads_per_rank if earlier.num_cpus == offered_cpus(settings) else proposed
    return proposed


def _write(run_file: RunFile) -> None:
    """Make the folders of a run, then its file: nodes look for it, so it appears whole."""
    run_file.checkpoints_dir.mkdir(parents=True, exist_ok=True)
    if run_file.output_dir is not None:
        run_file.output_dir.mkdir(exist_ok=True)
    temporary = run_file.run_dir / ".run.json"
    temporary.write_text(run_file.model_dump_json(indent=1))
    temporary.rename(run_file_path(run_file))


def run_file_path(run_file: RunFile) -> Path:
    """Return where `plan_attempt` writes it."""
    return run_file.run_dir / RUN_FILE


def _device(settings: Settings, spec: TrainSpec, gpus: Sequence[int]) -> str:
    device = spec.device if spec.device != "auto" else "cuda" if gpus else "cpu"
    if device == "cuda" and spec.ranks_per_node > len(gpus):
        raise WorkerLacks(
            f"the job wants {spec.ranks_per_node} ranks a node, one GPU each, and this worker has {len(gpus)} GPUs; "
            "ask for fewer ranks or another queue"
        )
    if device == "cpu" and spec.ranks_per_node > settings.max_cpu_ranks:
        raise WorkerLacks(
            f"the job wants {spec.ranks_per_node} ranks on CPU, where this worker allows {settings.max_cpu_ranks}; "
            "ask for fewer ranks, or raise APT_JOBS_MAX_CPU_RANKS"
        )
    return device


def _further_nodes(settings: Settings, database: Database, spec: TrainSpec, job: Job, num_nodes: int) -> list[str]:
    """Return the nodes beside this worker: those of the claimed gang, or else those that were started for it."""
    if spec.num_nodes > num_nodes:
        raise WorkerLacks(
            f"the job wants {spec.num_nodes} nodes, and this worker has {num_nodes}; ask for another queue, or start "
            "the worker with --num-nodes and a worker node on each further machine"
        )
    head = job.lease_owner or ""
    with database.read() as session:
        names = gang_of(session, job.id, job.attempt)
        alive = {row.name for row in list_workers(session, alive_within_s(settings))}
    for name in names:
        if name not in alive:
            raise WorkerLacks(f"{name}, which was claimed with the job, is gone")
    if names:
        return names
    names = [node_name(head, rank) for rank in range(1, spec.num_nodes)]
    for rank, name in enumerate(names, 1):
        if name not in alive:
            raise WorkerLacks(f"node {rank} of worker {head} is not up: apt-jobs worker node --head {head}")
    return names


def _entry_point(settings: Settings, spec: TrainSpec) -> str | None:
    if spec.entry_point == BUILTIN_ENTRY_POINT or spec.code is not None:
        return None
    if spec.entry_point not in settings.entry_points:
        known = ", ".join([BUILTIN_ENTRY_POINT, *sorted(settings.entry_points)])
        raise WorkerLacks(f"this worker has no entry point {spec.entry_point!r}; it has: {known}")
    registered = settings.entry_points[spec.entry_point]
    if not registered.endswith(SCRIPT_SUFFIX):
        return registered
    script = Path(registered).expanduser().resolve()
    if not script.is_file():
        raise WorkerLacks(f"the entry point {spec.entry_point!r} of this worker is {script}, which is no file")
    return str(script)


def _what_to_run(settings: Settings, spec: TrainSpec, output_dir: Path) -> dict[str, Any]:
    """Return what the run file says of the code; that of a job that brings some is unpacked where it runs."""
    if spec.brings_code and settings.code_role is None:
        raise WorkerLacks(
            "this worker runs no code and installs no packages that jobs bring: its operator has not set "
            "APT_JOBS_ALLOW_CODE"
        )
    entry_point = _entry_point(settings, spec)
    return {
        "entry_point": entry_point,
        "command": _command(settings, spec, entry_point, output_dir),
        "git": _git_plan(settings, spec),
        "environment": _environment_plan(settings, spec),
    }


def _git_plan(settings: Settings, spec: TrainSpec) -> GitPlan | None:
    if spec.code is None or spec.code.git is None:
        return None
    if host_of(spec.code.git.url, settings.git_hosts) is None:
        raise WorkerLacks(f"this worker fetches nothing from {spec.code.git.url}: APT_JOBS_GIT_HOSTS does not list it")
    return GitPlan(
        cache_dir=settings.git_dir,
        timeout_s=settings.git_timeout_s,
        max_bytes=settings.max_git_bytes,
        max_cache_bytes=settings.max_environments_bytes,
    )


def _environment_plan(settings: Settings, spec: TrainSpec) -> EnvironmentPlan | None:
    if spec.environment is None:
        return None
    registered = _registered_environment(settings, spec.environment.name) if spec.environment.name else None
    return EnvironmentPlan(
        registered_dir=registered,
        environments_dir=settings.environments_dir,
        python=spec.environment.python or f"{sys.version_info.major}.{sys.version_info.minor}",
        timeout_s=settings.environment_timeout_s,
        max_bytes=settings.max_environments_bytes,
        max_unused_s=86_400.0 * settings.environment_days,
    )


def _registered_environment(settings: Settings, name: str) -> Path:
    if name not in settings.environments:
        known = ", ".join(sorted(settings.environments)) or "none"
        raise WorkerLacks(f"this worker has no environment {name!r} in APT_JOBS_ENVIRONMENTS; it has: {known}")
    folder = Path(settings.environments[name]).expanduser().absolute()
    if not (folder / "bin" / "python").is_file():
        raise WorkerLacks(f"the environment {name!r} of this worker is {folder}, which has no bin/python")
    return folder


def _command(settings: Settings, spec: TrainSpec, entry_point: str | None, output_dir: Path) -> list[str] | None:
    if spec.code is not None:
        output_dir.mkdir(parents=True, exist_ok=True)
        try:
            if spec.code.sha256 is not None:  # a commit is fetched in the attempt's own processes
                unpack_code(settings.code_dir, spec.code.sha256, output_dir)
        except NotFound as exc:
            raise WorkerLacks(f"the job's code is not on this worker: {exc}") from exc
        return list(spec.argv)
    if entry_point is None or (spec.launcher != "none" and spec.environment is None):
        return None
    if not entry_point.endswith(SCRIPT_SUFFIX):
        what = "launcher='none'" if spec.environment is None else "a job with an environment"
        raise InvalidInput(f"{what} runs scripts, and the entry point {spec.entry_point!r} is a function")
    flags = (as_flag(name, value) for name, value in spec.arguments.items())
    python = sys.executable if spec.environment is None else "python"  # the first of its PATH
    return [python, entry_point, *spec.argv, *flags]


def _pinned_sources(settings: Settings, database: Database, job_id: str, spec: TrainSpec) -> dict[str, NamedSource]:
    """Return all data sets of the job, by their fields. The first attempt pins their content, the others check it."""
    sources = {field: _source(settings, name) for field, name in spec.dataset_fields.items()}
    hashes = [source.sha256 for source in sources.values() if source.sha256 is not None]
    if not hashes:
        return sources
    content = hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()
    with database.write() as session:
        pinned = pin_dataset(session, job_id, content)
    if pinned != content:
        names = " or ".join(repr(source.name) for source in sources.values())
        raise InvalidDataset(
            f"data set {names} was replaced since this job began: its content has the SHA-256 {content}, the job "
            f"trains on {pinned}; bring that content back and retry, or submit a new job"
        )
    return sources


def _source(settings: Settings, name: str) -> NamedSource:
    if name == BUILTIN_DATASET:
        return NamedSource(name=name, file=None)
    try:
        record = identify_dataset(settings.datasets_dir, name)
    except NotFound as exc:
        raise WorkerLacks(f"there is no data set {name!r} on this worker; GET /api/datasets lists them") from exc
    return NamedSource(
        name=name,
        file=record.file(settings.datasets_dir),
        format=record.format,
        column=record.column,
        sha256=record.sha256,
    )


def _dataset_fields(sources: dict[str, NamedSource]) -> dict[str, Any]:
    """Return what the run file says of the data sets to train on, and of those to validate and evaluate on."""
    first, *mixed = [source for field, source in sources.items() if field.startswith("dataset")]
    prefix = "validation_datasets/"
    return {
        **{f"dataset_{field}": value for field, value in first if field != "name"},
        "mixed_sources": mixed,
        "validation_source": sources.get("validation_dataset"),
        "evaluation_sources": {
            field.removeprefix(prefix): source for field, source in sources.items() if field.startswith(prefix)
        },
    }


def _base_fields(settings: Settings, database: Database, spec: TrainSpec) -> dict[str, Any]:
    """Return where the weights are to start from; of an adapter's checkpoint its own base model, too."""
    if spec.base_model is None:
        return {"base_model_dir": None}
    folder, adapters = _base_model_dir(settings, database, spec.base_model), list[Path]()
    while is_adapter_dir(folder) and len(adapters) < MAX_ADAPTERS:
        adapters.insert(0, folder)
        folder = _base_model_dir(settings, database, base_model_of(folder))
    if adapters and spec.entry_point != BUILTIN_ENTRY_POINT:
        raise InvalidCheckpoint(
            f"base_model {spec.base_model!r} is an adapter, and entry point {spec.entry_point!r} is given one folder: "
            "download it with ?merged=true and use that model"
        )
    return {"base_model_dir": folder, "base_adapter_dirs": adapters}


def _base_model_dir(settings: Settings, database: Database, base_model: str) -> Path:
    try:
        with database.read() as session:
            base_model = resolve_model(session, base_model)
    except NotFound as exc:
        raise InvalidCheckpoint(f"base_model {base_model!r}: {exc}") from exc
    if not CHECKPOINT_ID_PATTERN.match(base_model):
        local = local_model_dir(settings, base_model)
        if local is None:
            raise WorkerLacks(f"base_model {base_model!r} is not on this worker; GET /api/models lists them")
        return local
    try:
        with database.read() as session:
            return _checkpoint_dir(settings, get_checkpoint(session, base_model))
    except NotFound as exc:
        raise InvalidCheckpoint(f"base_model {base_model!r} does not exist any more") from exc


def _resume_fields(settings: Settings, database: Database, job_id: str) -> dict[str, Any]:
    """Return what the run file says of the job's furthest checkpoint."""
    with database.read() as session:
        checkpoint = newest_of_job(session, job_id)
    if checkpoint is None:
        return {"resume_dir": None}
    return {"resume_dir": _checkpoint_dir(settings, checkpoint), "resume_step": checkpoint.step}


def _checkpoint_dir(settings: Settings, checkpoint: Checkpoint) -> Path:
    """Return the folder of a checkpoint to train on from.

    Raises:
        InvalidCheckpoint: its row leads out of the checkpoints: no worker may read it.
        WorkerLacks: this machine does not have it.
    """
    if checkpoint_dir(settings, checkpoint.filename) is None:
        raise InvalidCheckpoint(f"checkpoint {checkpoint.id} is registered outside of the checkpoints")
    folder = complete_checkpoint_dir(settings, checkpoint.filename)
    if folder is None:
        raise WorkerLacks(f"checkpoint {checkpoint.id} is registered, but its files are not complete on this worker")
    return folder
