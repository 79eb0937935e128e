"""`make demo`: everything started, a small model trained and shown live, text generated from it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from apt_jobs.client.client import Client
from apt_jobs.errors import AptJobsError, TrainingFailed, Unavailable
from apt_jobs.settings import Settings
from apt_jobs.workers.embedded import START_DEADLINE_S, free_port

PROMPT = "The class statement"
STOP_DEADLINE_S = 180.0
LOSS_FALLS_TO = 0.6  # of its start


class Echo(Protocol):
    """Prints text, escaped: what a model wrote may hold anything."""

    def __call__(self, text: str, style: str = "", keep: str = "") -> None: ...


def run_demo(settings: Settings, echo: Echo, follow: Callable[[Client, str], dict[str, Any]]) -> None:
    """Run the demo; with APT_JOBS_DEMO_EXIT=1 end after the text, else at Ctrl-C. Nothing is left running.

    Raises:
        AptJobsError: something did not work.
    """
    port = free_port(settings.host, settings.port)
    if port != settings.port:
        echo(f"port {settings.port} is in use; taking {port}")
    echo("starting Valkey, web and workers ...")
    environment = {**os.environ, "APT_JOBS_PORT": str(port), "APT_JOBS_DATA_DIR": str(settings.root)}
    command = [sys.executable, "-m", "apt_jobs", "up"]
    stack = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        _show(settings, stack, echo, follow)
        if os.environ.get("APT_JOBS_DEMO_EXIT") != "1":
            echo("Everything stays up until Ctrl-C.")
            stack.wait()
    except KeyboardInterrupt:
        echo("stopping ...")
    finally:
        stack.terminate()
        try:
            stack.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            stack.kill()


def _show(
    settings: Settings,
    stack: "subprocess.Popen[bytes]",
    echo: Echo,
    follow: Callable[[Client, str], dict[str, Any]],
) -> None:
    with _client(settings, stack) as client:
        job = client.submit(json.loads(_job_file().read_text()))
        echo(
            f"submitted {job['id']}; watch it live (after the login link above): {client.browser_url}/jobs/{job['id']}"
        )
        ended = follow(client, job["id"])
        if ended["state"] != "succeeded":
            raise TrainingFailed(f"the demo's training {ended['state']}: {ended['reason']}")
        losses = client.metrics(job["id"])["train_loss"]
        echo(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
        if losses[-1] >= LOSS_FALLS_TO * losses[0]:
            raise TrainingFailed(f"the loss fell only from {losses[0]:.2f} to {losses[-1]:.2f}")
        answer = client.generate(PROMPT, max_length=60, model=ended["result"]["checkpoint_id"])
        echo("generated from the new checkpoint:", style="bold")
        echo(answer["input_text"] + answer["generated_text"], keep="\n\t")


def _client(settings: Settings, stack: "subprocess.Popen[bytes]") -> Client:
    """Return a client, as soon as the stack is ready."""
    deadline = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < deadline:
        if stack.poll() is not None:
            raise Unavailable(f"the stack ended at once; is another one running on {settings.root}?")
        if (settings.root / "local.json").exists():
            client = Client(data_dir=settings.root)
            try:
                if len({worker["kind"] for worker in client.workers() if worker["alive"]}) == 2:
                    return client
            except AptJobsError:
                pass
            client.close()
        time.sleep(0.2)
    raise Unavailable(f"the stack is not ready after {START_DEADLINE_S:.0f} s; see {settings.root / 'logs'}")


def _job_file() -> Path:
    return Path(__file__).resolve().parents[1] / "examples" / "demo_job.json"


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt
