"""`apt-jobs generate`, `chat` and `models`: text from a model, and which models there are."""

import sys
from collections.abc import Iterable
from contextlib import closing
from typing import Annotated, Any

import typer

from apt_jobs.client.client import Client
from apt_jobs.commands.terminal import BLOCK, AsJson, complain, echo, open_client, print_json, print_table
from apt_jobs.errors import AptJobsError

app = typer.Typer()
models_app = typer.Typer(invoke_without_command=True, help="List models, and give them names.")
Model = Annotated[str | None, typer.Option(help="Id or alias of `apt-jobs models`, or job_...@best.")]
BILLION = 1_000_000_000
NEW, END = "/new", "/end"


@app.command()
def generate(
    text: str,
    max_length: int = 100,
    temperature: float = 0.0,
    model: Model = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it comes; Ctrl-C stops it.")] = False,
) -> None:
    """Continue a text with the newest checkpoint, or with `--model`."""
    with open_client() as client:
        if stream:
            events = client.generate(text, stream=True, max_length=max_length, temperature=temperature, model=model)
            with closing(events):
                _print_stream(text, events)
            return
        answer = client.generate(text, max_length=max_length, temperature=temperature, model=model)
    echo(answer["input_text"] + answer["generated_text"], keep=BLOCK)


@app.command()
def chat(
    model: Model = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before everything else.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, max=2.0)] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, max=BILLION, help="Most tokens of an answer.")] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
) -> None:
    """Talk with a model. Ctrl-C stops its answer, /new begins again, Ctrl-D or /end ends; a pipe is a turn a line."""
    options = {"model": model or "default", "temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    first = [{"role": "system", "content": system}] if system else []
    messages = list(first)
    with open_client() as client:
        while (text := _read_turn()) is not None:
            if text == NEW:
                messages = list(first)
                continue
            try:
                answer = _answered(client, [*messages, {"role": "user", "content": text}], options)
            except AptJobsError as exc:
                if not sys.stdin.isatty() or len(messages) == len(first):
                    raise
                complain(f"{exc} ({NEW} begins again)")
                continue
            messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


@models_app.callback()
def models(context: typer.Context, as_json: AsJson = False) -> None:
    """List models that can generate, and those that cannot with why."""
    if context.invoked_subcommand is not None:
        return
    with open_client() as client:
        rows = client.models()
    if as_json:
        print_json(rows)
        return
    columns = ["id", "step", "size", "context", "chat", "warm", "aliases", "name"]
    print_table(columns, [_row(row) for row in rows])


@models_app.command()
def promote(
    alias: Annotated[str, typer.Argument(help="A name, as `prod`.")],
    model: Annotated[str, typer.Argument(help="Id of `apt-jobs models`, or job_...@latest, which it follows.")],
) -> None:
    """Let an alias stand for a model: requests that name it use that model from now on."""
    with open_client() as client:
        answer = client.promote_model(alias, model)
    echo(f"{answer['alias']} is {answer['id']}")


@models_app.command()
def demote(alias: Annotated[str, typer.Argument(help="As `apt-jobs models` shows it.")]) -> None:
    """Remove an alias; the model stays."""
    with open_client() as client:
        client.delete_alias(alias)


def _print_stream(text: str, events: Iterable[dict[str, Any]]) -> None:
    echo(text, keep=BLOCK, end="")
    for event in events:
        if event["kind"] == "delta":
            echo(event["text"], keep=BLOCK, end="")
        elif event["kind"] == "restarted":
            echo("")
            complain(event["detail"])
            echo(text, keep=BLOCK, end="")
    echo("")


def _read_turn() -> str | None:
    """Return what the user says next; None: nothing more."""
    is_terminal = sys.stdin.isatty()
    while True:
        try:
            text = input("> " if is_terminal else "").strip()
        except EOFError:
            if is_terminal:
                echo("")
            return None
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            echo("")
            complain(f"Ctrl-D or {END} ends")
            continue
        if text == END:
            return None
        if text:
            return text


def _answered(client: Client, messages: list[dict[str, str]], options: dict[str, Any]) -> str:
    """Print the answer as it comes; what was printed. Ctrl-C ends it here and on the worker."""
    parts: list[str] = []
    try:
        with closing(client.chat(messages, stream=True, **options)) as events:
            for event in events:
                if event["kind"] == "delta":
                    parts.append(event["text"])
                    echo(event["text"], keep=BLOCK, end="")
                elif event["finish_reason"] == "length":
                    echo(" ...", end="")
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        echo(" (stopped)", end="")
    finally:
        if parts:
            echo("")
    return "".join(parts)


def _row(row: dict[str, Any]) -> list[str]:
    if not row["can_generate"]:
        return [row["id"], "", "", "", "", "", "", f"cannot generate: {row['why_not']}"]
    size = row["num_parameters"]
    return [
        row["id"],
        "" if row["step"] is None else str(row["step"]),
        "" if size is None else _short(size),
        "" if row["context_tokens"] is None else str(row["context_tokens"]),
        "yes" if row["is_chat"] else "no",
        "yes" if row["is_warm"] else "no",
        " ".join([*row["aliases"], *(["default"] if row["is_default"] else [])]),
        row["name"],
    ]


def _short(number: int) -> str:
    """Write a number of parameters as 135M or 1.2B."""
    for unit, name in ((BILLION, "B"), (1_000_000, "M"), (1_000, "K")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)
