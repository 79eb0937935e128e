"""WebSocket deliveries a second to 100 clients, against what most projects do: a Redis subscription for each browser.

Both servers are one process on one event loop; the clients are another process, the same for both: where they are the
limit, the ratio is too small, never too large.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import redis.asyncio
import uvicorn
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket
from websockets.asyncio.client import ClientConnection, connect

from apt_jobs.db.engine import Database
from apt_jobs.db.events import append_events
from apt_jobs.db.jobs import claim, insert_job
from apt_jobs.events.kinds import GradientsRecorded
from apt_jobs.events.live import LivePublisher, channel_of
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.settings import Settings
from apt_jobs.workers.embedded import free_port
from benchmarks.rows import Row, paired_row
from benchmarks.submit import service

NUM_CLIENTS = 100
NUM_EVENTS = 400
NUM_LAYERS = 150
BATCH = 20
NUM_ROUNDS = 3
DEADLINE_S = 120.0


def rows() -> Iterator[Row]:
    """`stream/saturation-100/ws`, in deliveries a second."""
    with tempfile.TemporaryDirectory() as folder, service(Path(folder)) as (settings, key):
        port = free_port("127.0.0.1", settings.port + 1)
        environment = {**os.environ, "BENCH_REDIS": settings.redis, "BENCH_PORT": str(port)}
        naive = subprocess.Popen([sys.executable, "-m", "benchmarks.stream", "naive"], env=environment)
        try:
            ours, peer = [], []
            for _ in range(NUM_ROUNDS):
                job_id = _new_job(settings)
                ours.append(_rate(settings, job_id, f"ws://127.0.0.1:{settings.port}/ws/jobs/{job_id}", key))
                job_id = _new_job(settings)
                peer.append(_rate(settings, job_id, f"ws://127.0.0.1:{port}/{job_id}", key))
        finally:
            naive.kill()  # its sockets never see that their browsers left: it would not stop by itself
            naive.wait()
        name = "Starlette with one Redis subscription and one re-encode per browser"
        yield paired_row("stream/saturation-100/ws", ours, peer, name, "deliveries/s")


def _new_job(settings: Settings) -> str:
    database = Database(settings.database)
    with database.write() as session:
        job_id = insert_job(session, TrainSpec(kind="train")).id
        claim(session, job_id, "benchmark", 3600.0)
    database.dispose()
    return job_id


def _rate(settings: Settings, job_id: str, url: str, key: str) -> float:
    """Connect all clients in another process, then store and publish as fast as it goes."""
    command = [sys.executable, "-m", "benchmarks.stream", "clients", url, key]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as clients:
        assert clients.stdout is not None
        assert clients.stdin is not None
        assert clients.stdout.readline().strip() == "ready"
        _publish(settings, job_id)
        seconds = float(clients.stdout.readline())
    return NUM_CLIENTS * NUM_EVENTS / seconds


def _publish(settings: Settings, job_id: str) -> None:
    database, publisher = Database(settings.database), LivePublisher(settings.redis)
    norms = tuple(0.001 * index for index in range(NUM_LAYERS))
    for first in range(0, NUM_EVENTS, BATCH):
        events = [(datetime.now(UTC), GradientsRecorded(first + number, norms, ())) for number in range(BATCH)]
        with database.write() as session:
            appended = append_events(session, job_id, 1, events, 3600.0)
        publisher.publish(job_id, appended.stored)
    publisher.close()
    database.dispose()


async def _receive_all(url: str, key: str) -> None:
    """Print `ready`, then the seconds from the first gradient event to the last one of the slowest client."""
    headers = {"authorization": f"Bearer {key}"}
    open_sockets = [
        await connect(url, additional_headers=headers, max_size=None, compression=None, proxy=None)
        for _ in range(NUM_CLIENTS)
    ]
    print("ready", flush=True)
    began: list[float] = []

    async def receive(connection: ClientConnection) -> None:
        received = 0
        while received < NUM_EVENTS:
            count = (await connection.recv(decode=False)).count(b'"kind":"gradient"')
            if count and not began:
                began.append(time.perf_counter())
            received += count

    async with asyncio.timeout(DEADLINE_S):
        await asyncio.gather(*map(receive, open_sockets))
    print(time.perf_counter() - began[0], flush=True)
    await asyncio.gather(*(connection.close() for connection in open_sockets))


async def _naive_socket(websocket: WebSocket) -> None:
    await websocket.accept()
    client = redis.asyncio.Redis.from_url(os.environ["BENCH_REDIS"], socket_timeout=None)
    async with client.pubsub() as pubsub:
        await pubsub.subscribe(channel_of(websocket.path_params["job_id"]))
        async for message in pubsub.listen():
            if message["type"] == "message":
                for event in json.loads(message["data"])["events"]:
                    await websocket.send_text(json.dumps(event, separators=(",", ":")))


def _serve_naive() -> None:
    app = Starlette(routes=[WebSocketRoute("/{job_id}", _naive_socket)])
    uvicorn.run(app, port=int(os.environ["BENCH_PORT"]), log_level="critical", ws_per_message_deflate=False)


if __name__ == "__main__":
    if sys.argv[1] == "naive":
        _serve_naive()
    else:
        asyncio.run(_receive_all(sys.argv[2], sys.argv[3]))
