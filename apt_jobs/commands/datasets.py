"""`apt-jobs datasets`: what jobs train on."""

import time
from pathlib import Path
from typing import IO, Annotated

import typer

from apt_jobs.commands.dataset_folder import rows_of_folder
from apt_jobs.commands.terminal import AsJson, echo, open_client, print_json, print_table
from apt_jobs.errors import InvalidInput
from apt_jobs.jobs.dataset_format import DatasetFormat, format_of_name

app = typer.Typer(no_args_is_help=True, help="The data sets that jobs train on.")
PROGRESS_EVERY_S = 5.0
Name = Annotated[str, typer.Argument(help="What jobs call it.")]


@app.command("list")
def list_all(as_json: AsJson = False) -> None:
    """List the data sets, the built-in one first."""
    with open_client() as client:
        rows = client.datasets()
    if as_json:
        print_json(rows)
        return
    shown = ("name", "format", "size_bytes", "sha256", "created_at")
    table = [["" if row.get(key) is None else f"{row[key]}" for key in shown] for row in rows]
    print_table(["name", "format", "bytes", "sha256", "created"], table)


@app.command()
def add(
    name: Name,
    file: Annotated[Path, typer.Argument(help="Text, JSONL, Parquet or token ids; or a folder of texts or JSONL.")],
    dataset_format: Annotated[
        DatasetFormat | None, typer.Option("--format", help="Default: what the file's name suggests, else text.")
    ] = None,
    column: Annotated[str, typer.Option(help="Field of JSONL or column of Parquet with the documents.")] = "text",
) -> None:
    """Upload a data set. A file goes in parts: the same command goes on where an earlier one broke off."""
    chosen = dataset_format or (DatasetFormat.JSONL if file.is_dir() else format_of_name(file.name))
    if file.is_file():
        with open_client() as client:
            client.upload_dataset_file(name, file, format=chosen.value, column=column, on_progress=_Progress())
    else:
        try:
            opened: IO[bytes] = rows_of_folder(file) if file.is_dir() else file.open("rb")  # a pipe, say
        except (OSError, ValueError) as exc:
            why = exc.strerror if isinstance(exc, OSError) else exc
            raise InvalidInput(f"{file} cannot be read: {why}") from exc
        with opened, open_client() as client:
            client.upload_dataset(name, opened, format=chosen.value, column=column)
    echo(f"{name} is there")


class _Progress:
    """Prints how far an upload is: where it goes on, then every few seconds."""

    def __init__(self) -> None:
        self._printed_s: float | None = None

    def __call__(self, num_arrived: int, num_bytes: int) -> None:
        now_s = time.monotonic()
        if self._printed_s is None:
            if num_arrived:
                echo(f"goes on at {num_arrived:,} of {num_bytes:,} bytes")
        elif now_s - self._printed_s < PROGRESS_EVERY_S:
            return
        else:
            echo(f"{num_arrived:,} of {num_bytes:,} bytes")
        self._printed_s = now_s


@app.command()
def delete(name: Name) -> None:
    """Delete a data set."""
    with open_client() as client:
        client.delete_dataset(name)


@app.command()
def preview(
    name: Name,
    rows: Annotated[int, typer.Option(min=1, max=50, help="How many to show.")] = 5,
    model: Annotated[str | None, typer.Option(help="Show its tokenizer's tokens: an id of `apt-jobs models`.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the first rows of a data set, and what of them is trained on."""
    with open_client() as client:
        answer = client.preview_dataset(name, rows=rows, model=model)
    if as_json:
        print_json(answer)
        return
    if answer["kind"] is None:
        echo(" ".join(map(str, answer["token_ids"])))
        if answer["text"] is not None:
            echo(answer["text"])
    for row in answer["rows"]:
        echo(f"{row['where'] or name}{': ' + row['fault'] if row['fault'] else ''}")
        for part in row["parts"]:
            shown = part["text"] if part["tokens"] is None else "·".join(part["tokens"])
            echo(f"  {'*' if part['is_trained_on'] else ' '} {part['name']}: {shown}{'...' if part['is_cut'] else ''}")
    if answer["rows"]:
        echo(f"{answer['kind']}; * is trained on")
