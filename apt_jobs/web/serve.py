"""`apt-jobs web`: uvicorn around the application, with access lines that carry no query (a login token is in one)."""

import asyncio
import functools
import gc
import logging
import resource
import socket
from typing import Any

import uvicorn
from starlette.types import Scope

from apt_jobs.errors import AlreadyRunning
from apt_jobs.private_files import keep_private
from apt_jobs.settings import Settings
from apt_jobs.web.app import create_app
from apt_jobs.web.noted import Noted
from apt_jobs.web.server.connection_table import ConnectionTable
from apt_jobs.web.server.http_protocol import SPARE_CONNECTIONS, BoundedProtocol
from apt_jobs.web.server.websocket_protocol import DirectWebSocketProtocol

logger = logging.getLogger(__name__)

GRACEFUL_STOP_S = 3
BACKLOG = 1024
OTHER_FILES = 256  # database, broker, files that are sent, connections that are about to be refused
MAX_WEBSOCKET_BYTES = 1 << 16  # clients have nothing to say


def run_web(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        AlreadyRunning: the port is in use.
        Unavailable: the data directory is not to be used.
    """
    keep_private(settings.root)
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((settings.host, settings.port))
        except OSError as exc:
            raise AlreadyRunning(
                f"cannot listen on {settings.host} port {settings.port}: {exc.strerror}; choose another APT_JOBS_PORT"
            ) from exc
        listener.listen(BACKLOG)
        _allow_open_files(settings.max_connections + SPARE_CONNECTIONS + OTHER_FILES)
        app = create_app(settings)
        gc.collect()
        gc.freeze()  # what lives as long as the process: to look through it again and again stops all streams for 70 ms
        config = uvicorn.Config(
            AccessLog(app),
            http=_protocol(settings),
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=True,
            proxy_headers=bool(settings.trusted_proxies),
            forwarded_allow_ips=list(settings.trusted_proxies),
            ws=DirectWebSocketProtocol,
            ws_max_size=MAX_WEBSOCKET_BYTES,
            ws_per_message_deflate=False,
            timeout_graceful_shutdown=GRACEFUL_STOP_S,
        )
        uvicorn.Server(config).run(sockets=[listener])


def _allow_open_files(num_files: int) -> None:
    """Raise the soft limit of this process, which is often 1,024, as far as the hard one allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num_files if hard == resource.RLIM_INFINITY else min(num_files, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _protocol(settings: Settings) -> type[asyncio.Protocol]:
    table = ConnectionTable(settings.max_connections + SPARE_CONNECTIONS, settings.max_connections_per_address)
    made: Any = functools.partial(  # Any: uvicorn calls what it says is a class
        BoundedProtocol, table=table, patience_s=settings.request_timeout_s
    )
    protocol: type[asyncio.Protocol] = made
    return protocol


class AccessLog(Noted):
    """One line a request: method, path without query, status, duration."""

    def note_end(self, scope: Scope, status: int, elapsed_s: float) -> None:
        """Write the line."""
        fields = {"method": scope["method"], "path": scope["path"], "status": status}
        logger.info("request", extra={**fields, "duration_ms": round(elapsed_s * 1000.0, 1)})
