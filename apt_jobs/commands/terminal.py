"""What every command uses: the console, tables, the settings of this process and the client that they lead to."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from apt_jobs.client.client import Client
from apt_jobs.errors import AptJobsError
from apt_jobs.settings import Settings

console = Console()
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def load_settings(port: int | None = None, data_dir: Path | None = None) -> Settings:
    """Settings of the environment, changed by options that were given.

    Raises:
        AptJobsError: they are wrong.
    """
    values: dict[str, Any] = {"port": port, "data_dir": data_dir}
    try:
        return Settings(**{name: value for name, value in values.items() if value is not None})
    except ValueError as exc:
        raise AptJobsError(f"the settings are wrong: {exc}") from exc


def open_client() -> Client:
    """The service that this user's commands talk to."""
    return Client(data_dir=load_settings().root)


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    """One line a row; no table at all says more than an empty one."""
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    console.print(table)
