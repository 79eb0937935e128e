"""The torchrun command of one node of an attempt, and what its ranks may see.

All ranks of a node have one torchrun. With several nodes the head, which has node 0 and so rank 0, opens the
rendezvous; the others join it at the address in the run file.
"""

import os
import random
import socket
import sys
from collections.abc import Sequence

from apt_jobs.errors import Unavailable
from apt_jobs.jobs.run_file import RunFile
from apt_jobs.settings import Settings
from apt_jobs.supervision.plan import run_file_path
from apt_jobs.supervision.process_tree import WORKER_MARKER, ProcessTree

RENDEZVOUS_PORTS = range(10_000, 32_000)  # below those of outgoing connections (ip_local_port_range of Linux)
MAX_TRIES = 100


def worker_marker(settings: Settings, worker_name: str) -> str:
    """What the ranks of a worker carry, so that its next process can find them. Unique on this machine."""
    return f"{settings.root}:{worker_name}"


def start_node(
    settings: Settings, run_file: RunFile, node_rank: int, gpus: Sequence[int], worker_name: str
) -> ProcessTree:
    """Start torchrun with this node's ranks. Call it from the main thread, before there are others: see ProcessTree."""
    marker = f"{run_file.job_id}:{run_file.attempt}"
    if node_rank:
        marker += f":node-{node_rank}"
    log_file = run_file.run_dir / f"torchrun-{node_rank}.log"
    environment = _environment(settings, run_file, gpus) | {WORKER_MARKER: worker_marker(settings, worker_name)}
    return ProcessTree(_command(run_file, node_rank), environment, marker, log_file)


def rendezvous_address(settings: Settings) -> str:
    """`host:port` for the nodes of an attempt, the port free at this moment.

    torchrun opens it seconds later, and nodes try it before: the kernel must not give it to anybody meanwhile, so it is
    none of those that outgoing connections get.

    Raises:
        Unavailable: no such port is free.
    """
    if settings.rendezvous_port:
        return f"{settings.rendezvous_host}:{settings.rendezvous_port}"
    for port in random.SystemRandom().sample(RENDEZVOUS_PORTS, MAX_TRIES):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return f"{settings.rendezvous_host}:{port}"
    raise Unavailable("no free port for the nodes of the training to meet")


def _command(run_file: RunFile, node_rank: int) -> list[str]:
    spec = run_file.spec
    where = ["--nnodes=1", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    if run_file.rendezvous is not None:
        host, _, port = run_file.rendezvous.rpartition(":")
        where = [f"--nnodes={spec.num_nodes}", f"--node-rank={node_rank}", f"--master-addr={host}"]
        where += [f"--master-port={port}", f"--rdzv-id={run_file.job_id}-{run_file.attempt}"]
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        f"--nproc-per-node={spec.ranks_per_node}",
        *where,
        "--max-restarts=0",
        f"--log-dir={run_file.run_dir / 'torchrun' / f'node-{node_rank}'}",
        "--redirects=3",
        *("-m", "apt_jobs.training.run", "--run-file", str(run_file_path(run_file))),
    ]


def _environment(settings: Settings, run_file: RunFile, gpus: Sequence[int]) -> dict[str, str]:
    """What the ranks see: no setting of the service, so no password of the database or the broker."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("APT_JOBS_")}
    threads = max(1, (os.cpu_count() or 1) // run_file.spec.ranks_per_node)
    environment |= {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(
            settings.root / "compile_cache"
        ),  # a shape is compiled once, not in each attempt
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # without it cuBLAS may give other bits each time
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)) if run_file.spec.device == "cuda" else "",
    }
    interface = "lo" if run_file.rendezvous is None else settings.network_interface
    if interface is not None:
        environment["GLOO_SOCKET_IFNAME"] = interface
        if run_file.rendezvous is not None:
            environment["NCCL_SOCKET_IFNAME"] = interface
    return environment
