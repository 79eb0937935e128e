"""Ranks of a benchmark, started by torchrun on this machine."""

import os
import subprocess
import sys


def run_ranks(num_ranks: int, module: str, *arguments: str, timeout_s: float, shows: bool = False) -> None:
    """Run `python -m module` on every rank until all have ended. `shows`: their output is seen at once.

    Raises:
        RuntimeError: a rank failed; the message has the end of what all wrote.
    """
    command = [
        *(
            sys.executable,
            "-m",
            "apt_jobs.training.launch_ranks",
            f"--nproc-per-node={num_ranks}",
            "--rdzv-backend=apt-jobs",
        ),
        *("--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", "-m", module, *arguments),
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # the same bits each time, where that is asked for
    }
    pipe = None if shows else subprocess.PIPE
    done = subprocess.run(
        command,
        env=environment,
        stdout=pipe,
        stderr=pipe and subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(
            f"{module} on {num_ranks} ranks: exit status {done.returncode}\n{(done.stdout or '')[-5_000:]}"
        )
