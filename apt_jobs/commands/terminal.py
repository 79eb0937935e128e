"""What every command uses: the console, tables, the settings of this process and the client that they lead to."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from apt_jobs.client.client import Client
from apt_jobs.errors import AptJobsError, InvalidInput
from apt_jobs.settings import Settings

console = Console()
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
JobFile = Annotated[Path, typer.Argument(help="A job as JSON; - reads standard input.")]
MAX_JOB_BYTES = 4 << 20  # as the service's default limit of a body


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


def read_job(file: Path) -> dict[str, Any]:
    """The job of a file, or of standard input for `-`. What is in it, the service judges.

    Raises:
        InvalidInput: it cannot be read, is too large, or is no JSON object.
    """
    try:
        with sys.stdin.buffer if str(file) == "-" else file.open("rb") as opened:
            text = opened.read(MAX_JOB_BYTES + 1)
    except OSError as exc:
        raise InvalidInput(f"{file}: {exc.strerror}; name a file with a job as JSON, or - for standard input") from exc
    if len(text) > MAX_JOB_BYTES:
        raise InvalidInput(f"{file} has more than {MAX_JOB_BYTES:,} bytes: that is no job")
    try:
        job = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise InvalidInput(f"{file} is no JSON: {exc}") from exc
    if not isinstance(job, dict):
        raise InvalidInput(f'{file} holds a {type(job).__name__}; a job is an object, as {{"kind": "train"}}')
    return job


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    """One line a row; no table at all says more than an empty one."""
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    console.print(table)
