"""The servers that `stream` is compared with; each gets the same messages from Redis. The argument is a peer's name."""

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import redis
import redis.asyncio
import uvicorn
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket
from websockets.asyncio.server import ServerConnection, broadcast, serve
from websockets.frames import Frame, Opcode
from websockets.utils import accept_key

from apt_jobs.db.engine import Database
from apt_jobs.db.events import events_after
from apt_jobs.events.codec import encode_frame, splice_stored
from hatch_build import npm_command

NODE_FOLDER = Path("build/peers")
MAX_MISSED = 10_000  # events of one answer
SCRIPTS = Path(__file__).parent / "peers"  # with the exact versions of their packages
PEERS = {
    "ws": "Node ws, one Redis subscription",
    "socket.io": "socket.io over WebSocket, one Redis subscription",
    "broadcast": "websockets.broadcast, one Redis subscription",
    "naive": "Starlette with one Redis subscription and one re-encode per browser",
}
LIMIT = "a bare loop of writes to sockets: what the kernel takes"
RANGES = "Starlette with one range query and one encoding per browser"


def command_of(name: str) -> list[str]:
    """How to start a peer. Node's packages are installed below build/ when they are first needed."""
    if name not in ("ws", "socket.io"):
        return [sys.executable, "-m", "benchmarks.stream_peers", name]
    npm, environment = npm_command()
    shutil.copytree(SCRIPTS, NODE_FOLDER, dirs_exist_ok=True)
    if not _is_installed():
        install = [*npm, "ci", "--silent", "--no-audit", "--no-fund"]
        subprocess.run(install, cwd=NODE_FOLDER, env=environment, check=True)
    return [npm[0] if len(npm) > 1 else "node", str(NODE_FOLDER / f"stream_{name.replace('.', '_')}.js")]


def _is_installed() -> bool:
    """Return whether npm has finished: it writes its own copy of the lock file last."""
    installed, wanted = NODE_FOLDER / "node_modules" / ".package-lock.json", NODE_FOLDER / "package-lock.json"
    if not installed.is_file():
        return False
    have, want = json.loads(installed.read_bytes())["packages"], json.loads(wanted.read_bytes())["packages"]
    return {path: package["version"] for path, package in have.items()} == {
        path: package["version"] for path, package in want.items() if path
    }


async def _naive_socket(websocket: WebSocket) -> None:
    await websocket.accept()
    client = redis.asyncio.Redis(unix_socket_path=os.environ["BENCH_SOCKET"], socket_timeout=None)
    async with client.pubsub() as pubsub:
        await pubsub.subscribe(websocket.path_params["channel"])
        async for message in pubsub.listen():
            if message["type"] == "message":
                await websocket.send_text(json.dumps(json.loads(message["data"]), separators=(",", ":")))


def _serve_naive() -> None:
    app = Starlette(routes=[WebSocketRoute("/{channel}", _naive_socket)])
    uvicorn.run(
        app,
        port=int(os.environ["BENCH_PORT"]),
        log_level="critical",
        ws_per_message_deflate=False,
        ws_ping_interval=None,
    )


def _serve_ranges() -> None:
    """Send what a client missed as many servers with a database do; also with the cheap encoding that ours has."""
    database = Database(os.environ["BENCH_DATABASE"])

    def read(job_id: str, after: int) -> bytes:
        with database.read() as session:
            rows = events_after(session, job_id, after, MAX_MISSED)
        return encode_frame(
            after + 1, [splice_stored(row.seq, row.kind, row.attempt, row.at, row.payload) for row in rows]
        )

    async def serve_range(websocket: WebSocket) -> None:
        await websocket.accept()
        after = int(websocket.query_params["after"])
        frame = await asyncio.to_thread(read, websocket.path_params["job_id"], after)
        await websocket.send_text(frame.decode())
        await websocket.receive()

    app = Starlette(routes=[WebSocketRoute("/{job_id}", serve_range)])
    uvicorn.run(
        app,
        port=int(os.environ["BENCH_PORT"]),
        log_level="critical",
        ws_per_message_deflate=False,
        ws_ping_interval=None,
    )


async def _serve_broadcast() -> None:
    client = redis.asyncio.Redis(unix_socket_path=os.environ["BENCH_SOCKET"], socket_timeout=None)
    connections: set[ServerConnection] = set()

    async def hold(connection: ServerConnection) -> None:
        connections.add(connection)
        await connection.wait_closed()
        connections.discard(connection)

    async with (
        serve(hold, "127.0.0.1", int(os.environ["BENCH_PORT"]), compression=None, ping_interval=None),
        client.pubsub() as pubsub,
    ):
        await pubsub.subscribe(os.environ["BENCH_CHANNEL"])
        async for message in pubsub.listen():
            if message["type"] == "message":
                broadcast(connections, message["data"].decode())


def _serve_bare() -> None:
    """Serve at the limit of one core: a message becomes a frame once, one write a socket. No HTTP, no protection."""
    sockets: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", int(os.environ["BENCH_PORT"])), backlog=1024) as listener:
        listening = threading.Thread(target=_accept_bare, args=(listener, sockets), daemon=True)
        listening.start()
        client = redis.Redis(unix_socket_path=os.environ["BENCH_SOCKET"], socket_timeout=None)
        with client.pubsub() as pubsub:  # type: ignore[no-untyped-call]  # untyped in redis-py
            pubsub.subscribe(os.environ["BENCH_CHANNEL"])
            for message in pubsub.listen():
                if message["type"] == "message":
                    frame = Frame(Opcode.TEXT, message["data"]).serialize(mask=False)
                    sockets[:] = [each for each in sockets if _is_written(each, frame)]


def _accept_bare(listener: socket.socket, sockets: list[socket.socket]) -> None:
    while True:
        accepted, _ = listener.accept()
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        key = re.search(rb"Sec-WebSocket-Key: (\S+)", accepted.recv(65536))
        if key is not None:  # else it only looks whether somebody listens
            answer = f"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {accept_key(key[1].decode())}"
            accepted.sendall(f"HTTP/1.1 101 Switching Protocols\r\n{answer}\r\n\r\n".encode())
            sockets.append(accepted)


def _is_written(each: socket.socket, frame: bytes) -> bool:
    try:
        each.sendall(frame)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    if sys.argv[1] == "naive":
        _serve_naive()
    elif sys.argv[1] == "ranges":
        _serve_ranges()
    elif sys.argv[1] == "bare":
        _serve_bare()
    else:
        asyncio.run(_serve_broadcast())
