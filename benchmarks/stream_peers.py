"""The servers that `stream` is compared with; each gets the same messages from Redis. The argument is a peer's name."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import redis.asyncio
import uvicorn
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket
from websockets.asyncio.server import ServerConnection, broadcast, serve

from hatch_build import npm_command

NODE_FOLDER = Path("build/peers")
SCRIPTS = Path(__file__).parent / "peers"
NODE_PACKAGES = ("ws", "socket.io", "redis")
PEERS = {
    "ws": "Node ws, one Redis subscription",
    "socket.io": "socket.io over WebSocket, one Redis subscription",
    "broadcast": "websockets.broadcast, one Redis subscription",
    "naive": "Starlette with one Redis subscription and one re-encode per browser",
}


def command_of(name: str) -> list[str]:
    """How to start a peer. Node's packages are installed below build/ when they are first needed."""
    if name not in ("ws", "socket.io"):
        return [sys.executable, "-m", "benchmarks.stream_peers", name]
    npm, environment = npm_command()
    if not (NODE_FOLDER / "node_modules" / "socket.io").is_dir():
        NODE_FOLDER.mkdir(parents=True, exist_ok=True)
        (NODE_FOLDER / "package.json").write_text('{"private": true}')
        install = [*npm, "install", "--silent", "--no-audit", "--no-fund", *NODE_PACKAGES]
        subprocess.run(install, cwd=NODE_FOLDER, env=environment, check=True)
    script = NODE_FOLDER / f"stream_{name.replace('.', '_')}.js"
    script.write_text((SCRIPTS / script.name).read_text())
    return [npm[0] if len(npm) > 1 else "node", str(script)]


async def _naive_socket(websocket: WebSocket) -> None:
    await websocket.accept()
    client = redis.asyncio.Redis(unix_socket_path=os.environ["BENCH_SOCKET"], socket_timeout=None)
    async with client.pubsub() as pubsub:
        await pubsub.subscribe(os.environ["BENCH_CHANNEL"])
        async for message in pubsub.listen():
            if message["type"] == "message":
                await websocket.send_text(json.dumps(json.loads(message["data"]), separators=(",", ":")))


def _serve_naive() -> None:
    app = Starlette(routes=[WebSocketRoute("/", _naive_socket)])
    uvicorn.run(app, port=int(os.environ["BENCH_PORT"]), log_level="critical", ws_per_message_deflate=False)


async def _serve_broadcast() -> None:
    client = redis.asyncio.Redis(unix_socket_path=os.environ["BENCH_SOCKET"], socket_timeout=None)
    connections: set[ServerConnection] = set()

    async def hold(connection: ServerConnection) -> None:
        connections.add(connection)
        await connection.wait_closed()
        connections.discard(connection)

    async with serve(hold, "127.0.0.1", int(os.environ["BENCH_PORT"]), compression=None), client.pubsub() as pubsub:
        await pubsub.subscribe(os.environ["BENCH_CHANNEL"])
        async for message in pubsub.listen():
            if message["type"] == "message":
                broadcast(connections, message["data"].decode())


if __name__ == "__main__":
    if sys.argv[1] == "naive":
        _serve_naive()
    else:
        asyncio.run(_serve_broadcast())
