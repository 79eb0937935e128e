"""The command of one node of an attempt, mostly torchrun, and what its ranks may see.

All ranks of a node have one torchrun. With several nodes the head, which has node 0 and so rank 0, opens the
rendezvous; the others join it at the address in the run file.
"""

import os
import resource
import sys
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path

from apt_jobs import run
from apt_jobs.errors import InvalidInput
from apt_jobs.jobs.environment import GPU_MEMORY_VARIABLE, MIRROR_VARIABLE
from apt_jobs.jobs.handover import RUN_FILE_VARIABLE
from apt_jobs.jobs.run_file import RunFile
from apt_jobs.settings import Settings
from apt_jobs.supervision.compile_cache import compile_cache_dir
from apt_jobs.supervision.machine import offered_cpus
from apt_jobs.supervision.network import (
    LOOPBACK_ADDRESS,
    LOOPBACK_INTERFACE,
    addresses_of,
    interface_towards,
    listen_address,
)
from apt_jobs.supervision.prepare_run import run_file_path
from apt_jobs.supervision.process_tree import WORKER_MARKER, ProcessTree
from apt_jobs.supervision.rank_environment import passed_environment
from apt_jobs.supervision.set_up import BUILD_VARIABLES, light_path, needs_set_up

MIRROR_SITE = Path(run.__file__).parent / "mirror_site"  # Python loads what is in it before a script
NO_SECRETS: Mapping[str, str] = {}
PROGRESS_BAR_SWITCHES = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")


def worker_marker(settings: Settings, worker_name: str) -> str:
    """Return what the ranks of a worker carry, so that its next process finds them. Unique on this machine."""
    return f"{settings.root}:{worker_name}"


def start_node(
    settings: Settings,
    run_file: RunFile,
    node_rank: int,
    gpus: Sequence[int],
    worker_name: str,
    secrets: Mapping[str, str] = NO_SECRETS,
    *,
    ignore_sigterm: bool = False,
) -> ProcessTree:
    """Start torchrun with this node's ranks. Call it from the main thread, before there are others: see ProcessTree.

    `secrets` are in the environment of the processes alone: no file has them. `ignore_sigterm`: where another scheduler
    sends SIGTERM to each process of an allocation, so that the ranks live on to save.
    """
    marker = f"{run_file.job_id}:{run_file.attempt}"
    if node_rank:
        marker += f":node-{node_rank}"
    log_file = run_file.run_dir / f"torchrun-{node_rank}.log"
    environment = {**_environment(settings, run_file, node_rank, gpus), **secrets}
    environment[WORKER_MARKER] = worker_marker(settings, worker_name)
    command = _command(settings, run_file, node_rank, ignore_sigterm=ignore_sigterm)
    if needs_set_up(run_file):
        command = [sys.executable, "-m", "apt_jobs.supervision.set_up", str(run_file_path(run_file)), *command]
    limits = limits_of(settings) if run_file.is_user_script else None
    return ProcessTree(command, environment, marker, log_file, limits, ignore_sigterm=ignore_sigterm)


def limits_of(settings: Settings) -> dict[int, int]:
    """Return what the operator allows each process of a user script, by the names of `resource`."""
    limits = {resource.RLIMIT_FSIZE: settings.job_max_file_bytes, resource.RLIMIT_NPROC: settings.job_max_processes}
    return {name: value for name, value in limits.items() if value}


def require_limits(settings: Settings) -> None:
    """Return if the limits of jobs hold for this user.

    Raises:
        InvalidInput: the kernel does not count processes of root, or has a lower limit already.
    """
    if settings.job_max_processes and os.geteuid() == 0:
        raise InvalidInput(
            f"APT_JOBS_JOB_MAX_PROCESSES={settings.job_max_processes} does not hold for root: run the worker as "
            "another user, or leave it out"
        )
    for name, value in limits_of(settings).items():
        hard = resource.getrlimit(name)[1]
        if hard not in (resource.RLIM_INFINITY, -1) and value > hard:
            raise InvalidInput(f"the limit of {value:,} for jobs is above that of this process, {hard:,}: lower it")


def _command(settings: Settings, run_file: RunFile, node_rank: int, *, ignore_sigterm: bool = False) -> list[str]:
    spec = run_file.spec
    if spec.launcher == "none":
        return [sys.executable, "-m", "apt_jobs.run.command"]
    endpoint, options = f"{LOOPBACK_ADDRESS}:0", f"node_rank={node_rank}"
    if run_file.rendezvous is not None:
        endpoint = run_file.rendezvous
        if node_rank == 0:
            options += f",listen={listen_address(settings)}"
    return [
        *(sys.executable, "-m", "apt_jobs.training.launch_ranks"),
        f"--nnodes={spec.num_nodes}",
        f"--nproc-per-node={spec.ranks_per_node}",
        "--rdzv-backend=apt-jobs",
        f"--rdzv-endpoint={endpoint}",
        f"--rdzv-conf={options}",
        f"--rdzv-id={run_file.job_id}-{run_file.attempt}",
        "--max-restarts=0",
        *(["--signals-to-handle=SIGINT"] if ignore_sigterm else []),
        f"--log-dir={run_file.run_dir / 'torchrun' / f'node-{node_rank}'}",
        "--redirects=3",
        *("-m", "apt_jobs.training.run", "--run-file", str(run_file_path(run_file))),
    ]


def _environment(settings: Settings, run_file: RunFile, node_rank: int, gpus: Sequence[int]) -> dict[str, str]:
    """Return what the ranks see: no setting of the service, no secret of the operator's shell."""
    spec, is_script = run_file.spec, run_file.is_user_script
    environment = passed_environment(os.environ, settings.pass_environment)
    is_offline = environment.get("HF_HUB_OFFLINE", "1") if is_script else "1"
    if spec.code is not None:
        gpus = gpus[: ceil(spec.resources.gpus or spec.ranks_per_node)]
    if run_file.environment is not None:
        environment = _with_its_own_python(environment, run_file)
    elif spec.code is not None:  # `python`, `torchrun`, `accelerate` are those of this installation
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    threads = run_file.threads_per_rank if node_rank == 0 else None
    if threads is None:
        threads = max(1, offered_cpus(settings) // spec.ranks_per_node)
    environment |= {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": is_offline,
        "TORCHINDUCTOR_CACHE_DIR": str(compile_cache_dir(settings)),  # a shape is compiled once, not in each attempt
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # without it cuBLAS may give other bits each time
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # as NVML counts, by which the worker chose
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)) if spec.device == "cuda" else "",
    }
    fractions = [settings.gpu_memory_fractions.get(gpu, 1.0) * spec.resources.gpu_share for gpu in gpus]
    if spec.device == "cuda" and any(fraction < 1 for fraction in fractions):
        environment[GPU_MEMORY_VARIABLE] = ",".join(f"{fraction:g}" for fraction in fractions)
    # Threads that wait in a busy loop cost a time slice for each operation where a machine has other work.
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    environment |= spec.env | {RUN_FILE_VARIABLE: str(run_file_path(run_file))}
    if is_script and environment.get(MIRROR_VARIABLE):
        paths = [str(MIRROR_SITE), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    if not is_script:  # the trainer's own progress bars say nothing that its events do not
        environment |= dict.fromkeys(PROGRESS_BAR_SWITCHES, "1")
    return environment | _interfaces(settings, run_file, node_rank, environment)


def _with_its_own_python(environment: Mapping[str, str], run_file: RunFile) -> dict[str, str]:
    """Return it without what leads to other Pythons' packages; `set_up` adds PATH once its own is there."""
    plan = run_file.environment
    of_others = ("PYTHONPATH", "VIRTUAL_ENV", "CONDA_PREFIX")
    kept = {name: value for name, value in environment.items() if name not in of_others}
    if plan is not None and plan.registered_dir is None:
        kept |= {name: value for name, value in os.environ.items() if name.startswith(BUILD_VARIABLES)}
    return {**kept, "PYTHONPATH": str(light_path(run_file))}


def _interfaces(
    settings: Settings, run_file: RunFile, node_rank: int, environment: Mapping[str, str]
) -> dict[str, str]:
    """Return where gloo and NCCL listen: left alone they take any address of the machine, for a single node too."""
    interface: str | None = LOOPBACK_INTERFACE
    if run_file.rendezvous is not None:
        interface = settings.network_interface
        if interface is not None:
            addresses_of(interface)  # a wrong name would be found by the ranks only, in the words of gloo
        else:
            interface = interface_towards(run_file.rendezvous, node_rank)
    names = ["GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"]
    if run_file.rendezvous is not None and settings.network_interface is None:
        names = [name for name in names if name not in environment]  # the operator has named one there
    return dict.fromkeys(names, interface) if interface is not None else {}
