"""A web process in a thread of the test and a generation worker process, with a tiny model named `tiny`."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import httpx

from apt_jobs.settings import Settings
from tests.integration.web.served import Served, until
from tests.unit.generation.tiny_model import llama_config, save_model

ROOT = Path(__file__).parents[3]
START = (
    "from apt_jobs.settings import Settings; from apt_jobs.workers.generate import GenerateWorker;"
    "GenerateWorker(Settings(), name='gen-1', queues=['generate'], device='cpu').run()"
)


class Generating:
    """The service, its worker and a client."""

    def __init__(self, settings: Settings) -> None:
        save_model(settings.local_models_dir / "tiny", llama_config(max_position_embeddings=4_096))
        self.served = Served(settings, direct=True)
        self.settings = self.served.settings
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{self.settings.port}", headers=self.served.headers, timeout=120.0
        )

    def state(self, job_id: str) -> str:
        return str(self.client.get(f"/api/jobs/{job_id}").json()["state"])

    @contextmanager
    def worker(self, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run a worker until the end of the block."""
        with self._process([sys.executable, "-c", START], environment) as process:
            until(lambda: any(row["alive"] for row in self.client.get("/api/workers").json()["data"]))
            yield process

    @contextmanager
    def trainer(self) -> Iterator[subprocess.Popen[bytes]]:
        """Run a training worker until the end of the block."""
        with self._process([sys.executable, "-m", "apt_jobs", "worker", "train"]) as process:
            yield process

    @contextmanager
    def _process(
        self, command: list[str], environment: Mapping[str, str] = MappingProxyType({})
    ) -> Iterator[subprocess.Popen[bytes]]:
        variables = {
            "APT_JOBS_DATA_DIR": str(self.settings.root),
            "APT_JOBS_DATABASE_URL": self.settings.database,
            "APT_JOBS_REDIS_URL": self.settings.redis,
            "APT_JOBS_LEASE_S": str(self.settings.lease_s),
            "APT_JOBS_HEARTBEAT_S": str(self.settings.heartbeat_s),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        with subprocess.Popen(command, env={**os.environ, **variables, **environment}) as process:
            try:
                yield process
            finally:
                process.terminate() if "train" in command else process.kill()


@contextmanager
def generating(settings: Settings) -> Iterator[Generating]:
    """Provide a service that generates."""
    running = Generating(settings)
    running.served.start()
    try:
        yield running
    finally:
        running.client.close()
        running.served.stop()
        running.served.close()
