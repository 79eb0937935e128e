"""`apt-jobs mcp`: tools for agents (Model Context Protocol)."""

from typing import Annotated

import typer

from apt_jobs.client.access import find_access
from apt_jobs.commands.terminal import echo, load_settings, open_client
from apt_jobs.errors import InvalidInput

app = typer.Typer()


@app.command()
def mcp(
    http: Annotated[bool, typer.Option("--http", help="Serve by HTTP instead of standard input and output.")] = False,
    host: Annotated[str, typer.Option(help="Address to bind to, with --http.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="TCP port, with --http.")] = 8765,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="Further value of the Host header, with --http; may be repeated.")
    ] = None,
) -> None:
    """Serve tools for agents: list, look, plan, submit, sweep, cancel. Submitting is a dry run unless told.

    By standard input and output, with this user's key; with --http at /mcp, each caller with a key of the service.
    """
    try:
        from apt_jobs.agents.server import run_http, run_stdio
    except ImportError as exc:
        raise InvalidInput("tools for agents need the package mcp: pip install 'apt-jobs[mcp]'") from exc
    if not http:
        run_stdio(open_client())
        return
    access = find_access(None, None, load_settings().root)
    echo(f"tools for agents: http://{host}:{port}/mcp, of {access.url}")
    run_http(access.url, host, port, allowed_host or [])
