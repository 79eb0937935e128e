"""`apt-jobs datasets`: the texts that jobs train on."""

from pathlib import Path
from typing import Annotated

import typer

from apt_jobs.commands.terminal import AsJson, echo, open_client, print_json, print_table
from apt_jobs.errors import InvalidInput

app = typer.Typer(no_args_is_help=True, help="The texts that jobs train on.")
Name = Annotated[str, typer.Argument(help="What jobs call it.")]


@app.command("list")
def list_all(as_json: AsJson = False) -> None:
    """List the data sets, the built-in one first."""
    with open_client() as client:
        rows = client.datasets()
    if as_json:
        print_json(rows)
        return
    table = [[row["name"], "" if row["size_bytes"] is None else f"{row['size_bytes']}"] for row in rows]
    print_table(["name", "bytes"], table)


@app.command()
def add(name: Name, file: Annotated[Path, typer.Argument(help="UTF-8 text.")]) -> None:
    """Upload a text."""
    try:
        opened = file.open("rb")
    except (OSError, ValueError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else exc
        raise InvalidInput(f"{file} cannot be read: {why}") from exc
    with opened, open_client() as client:
        client.upload_dataset(name, opened)
    echo(f"{name} is there")


@app.command()
def delete(name: Name) -> None:
    """Delete a data set."""
    with open_client() as client:
        client.delete_dataset(name)
