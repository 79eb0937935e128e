"""What is asked of Slurm for one attempt: arguments of `sbatch`, and the script. Pure."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from apt_jobs.jobs.needs import Needs
from apt_jobs.jobs.packing import Gpu, Offer

STEP_LOG = "slurm.log"  # in the folder of an attempt: what Slurm and the step's processes print
SAVE_MARGIN_S = 60.0  # of Slurm's time limit beyond the job's own, and what a save may take


@dataclass(frozen=True, slots=True)
class Attempt:
    """What is submitted."""

    job_id: str
    number: int
    worker: str
    folder: Path

    @property
    def name(self) -> str:
        """Name of the job in Slurm, by which a submission is found whose answer was lost."""
        return f"apt-{self.job_id}-{self.number}"


def attempt_of_name(name: str) -> tuple[str, int] | None:
    """Return job id and number of an attempt from its name in Slurm; None: it is none."""
    prefix, _, rest = name.partition("-")
    job_id, _, number = rest.rpartition("-")
    return (job_id, int(number)) if prefix == "apt" and job_id and number.isdigit() else None


def owner_comment(worker: str) -> str:
    """Return the comment by which a worker finds its own jobs in Slurm."""
    return f"apt_jobs worker {worker}"


def sbatch_arguments(
    attempt: Attempt,
    needs: Needs,
    offer: Offer,
    *,
    partition: str | None,
    save_s: float,
    options: Sequence[str],
) -> list[str]:
    """Return the arguments of `sbatch`.

    Args:
        attempt: what is submitted.
        needs: what its job asks for, on each machine.
        offer: the partition's nodes, whose kinds of GPUs have names.
        partition: None: the cluster's default.
        save_s: how long a save may take, before a time limit ends the allocation.
        options: further ones of the operator, which go last and so win.
    """
    arguments = [
        "--parsable",
        f"--job-name={attempt.name}",
        f"--comment={owner_comment(attempt.worker)}",
        "--no-requeue",
        "--export=ALL",  # of the few variables that `sbatch` is given
        f"--output={_in_pattern(attempt.folder / STEP_LOG)}",
        "--open-mode=append",
        f"--chdir={attempt.folder}",
        f"--nodes={needs.num_nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={num_cpus(needs)}",
        f"--signal=TERM@{ceil(save_s)}",
    ]
    if partition is not None:
        arguments.append(f"--partition={partition}")
    if (gres := _gres(needs, offer)) is not None:
        arguments.append(f"--gres={gres}")
    if needs.memory_gb is not None:
        arguments.append(f"--mem={ceil(needs.memory_gb * 1e9 / 2**20)}M")
    if needs.time_limit_s is not None:
        arguments.append(f"--time={ceil((needs.time_limit_s + save_s + SAVE_MARGIN_S) / 60)}")
    return [*arguments, *options]


def script_of(attempt: Attempt, needs: Needs) -> str:
    """Return the batch script: it starts the step, which hears SIGTERM at once, unlike the script itself."""
    srun = [
        "srun",
        f"--nodes={needs.num_nodes}",
        f"--ntasks={needs.num_nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={num_cpus(needs)}",
    ]
    srun += ["--cpu-bind=none", "--mpi=none", "--export=ALL", "--input=none", "--kill-on-bad-exit=1"]
    step = [sys.executable, "-m", "apt_jobs.workers.slurm.step", f"--job-id={attempt.job_id}"]
    step += [f"--attempt={attempt.number}", f"--worker-name={attempt.worker}", f"--folder={attempt.folder}"]
    return f"#!/bin/sh\nexec {shlex.join([*srun, *step])}\n"


def num_cpus(needs: Needs) -> int:
    """Return the cores on each machine: those that the job asks for, else one for each rank."""
    return needs.cpus or needs.num_ranks


def _gres(needs: Needs, offer: Offer) -> str | None:
    """Return the GPUs on each machine; a part of one is a whole one in Slurm. None: it needs none."""
    if needs.device == "cpu" or needs.gpus == 0 or not (offer.gpus or needs.names_gpus):
        return None
    number = ceil(needs.gpus or needs.num_ranks)
    if needs.gpu_type is None and needs.gpu_memory_gb is None:
        return f"gpu:{number}"
    kinds = {gpu.name: gpu for gpu in offer.gpus}.values()
    suitable = next((gpu for gpu in kinds if gpu.suits(needs)), Gpu(0, needs.gpu_type or "gpu"))
    return f"gpu:{number}" if suitable.name == "gpu" else f"gpu:{suitable.name}:{number}"


def _in_pattern(path: Path) -> str:
    """Return a path for an option in which Slurm replaces `%j` and the like."""
    return str(path).replace("%", "%%")
