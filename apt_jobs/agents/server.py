"""The server of the tools: over standard input and output for one user, or over HTTP for those who bring a key.

Over HTTP the server has no key of its own: what a caller brings is what the service is asked with, so that roles,
limits and revocations are the service's.
"""

import asyncio
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.transport_security import TransportSecuritySettings
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from apt_jobs import __version__
from apt_jobs.addresses import own_hosts
from apt_jobs.agents.tools import OpenClient, Tools, add_tools
from apt_jobs.client.client import Client
from apt_jobs.errors import Denied

MAX_BODY_BYTES = 1 << 20
MAX_CONNECTIONS = 64
INSTRUCTIONS = """\
Jobs that train and run language models. Look before you submit: submit_job and create_sweep check and plan only, unless
dry_run is false. Ask for the end of something with wait_s instead of asking again and again. Answers with is_cut are
shortened: ask for less. Times are UTC; losses are of the natural logarithm.
"""


def run_stdio(client: Client) -> None:
    """Serve one agent until its end of standard input."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)  # standard output belongs to the protocol

    @contextmanager
    def use(_ctx: Context) -> Iterator[Client]:
        yield client

    with client:
        make_server(use).run("stdio")


def run_http(url: str, host: str, port: int, allowed_hosts: list[str]) -> None:
    """Serve agents at `http://host:port/mcp` until a signal."""

    @contextmanager
    def use(ctx: Context) -> Iterator[Client]:
        key = bearer_key(ctx.headers.get("authorization") if ctx.headers else None)
        if key is None:
            raise Denied("send the API key as `Authorization: Bearer ...`")
        with Client(url, key) as client:
            yield client

    hosts = [*own_hosts(host, port), *allowed_hosts]
    app = make_server(use).streamable_http_app(
        stateless_http=True,
        json_response=True,
        max_request_body_size=MAX_BODY_BYTES,
        transport_security=TransportSecuritySettings(allowed_hosts=hosts, allowed_origins=[]),
        host=host,
    )
    config = uvicorn.Config(
        RequireKey(app),
        host=host,
        port=port,
        log_level="warning",
        limit_concurrency=MAX_CONNECTIONS,
        server_header=False,
    )
    asyncio.run(uvicorn.Server(config).serve())


def make_server(open_client: OpenClient) -> MCPServer:
    """Build the server; each call gets its client from `open_client`."""
    server: MCPServer = MCPServer("apt_jobs", version=__version__, instructions=INSTRUCTIONS, log_level="WARNING")
    add_tools(server, Tools(open_client))
    return server


def bearer_key(value: str | None) -> str | None:
    """Return the key of an `Authorization` header, or None."""
    scheme, _, key = (value or "").partition(" ")
    return key.strip() or None if scheme.lower() == "bearer" else None


class RequireKey:
    """ASGI middleware: who brings no key gets nothing. Whether a key is good, the service says at the first call."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what has a key."""
        if scope["type"] == "http" and bearer_key(Headers(scope=scope).get("authorization")) is None:
            headers = {"www-authenticate": "Bearer"}
            await PlainTextResponse("send the API key of the service\n", 401, headers)(scope, receive, send)
            return
        await self._app(scope, receive, send)
