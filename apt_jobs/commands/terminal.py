"""What every command uses: how text reaches the terminal, the settings of this process, the client that they lead to.

Names, reasons, log lines and generated text come from others. Nothing of them is ever read as markup, and what a
terminal would execute or hide (escape sequences, carriage returns, marks that reverse the direction of writing) is
shown as an escape. A pipe gets plain lines of any width; what its encoding cannot hold becomes an escape, too.
"""

import json
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from apt_jobs.client.client import Client
from apt_jobs.errors import AptJobsError, InvalidInput
from apt_jobs.settings import Settings

console = Console(highlight=False, markup=False, emoji=False)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
JobFile = Annotated[Path, typer.Argument(help="A job as JSON; - reads standard input.")]
MAX_JOB_BYTES = 4 << 20  # as the service's default limit of a body
MIN_LAST_COLUMN = 8  # cells; a narrower terminal gets the whole line, which it wraps by itself
BLOCK = "\n\t"  # of text that has lines: tracebacks, what a model wrote
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})  # controls, format marks, half surrogate pairs, separators of lines
_JOINERS = "\u200c\u200d"  # format marks that scripts and emoji are written with
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def printable(text: str, keep: str = "") -> str:
    r"""Show what a terminal would execute or hide as escapes, as `\x1b` and `\u202e`.

    Args:
        text: Text of others.
        keep: Characters that stay, as `BLOCK`.

    Returns:
        Text of one line, if `keep` has no line feed.
    """
    if text.isprintable():
        return text
    return "".join(char if char in keep or not _is_hidden(char) else _escaped(char) for char in text)


def echo(text: str, style: str = "", keep: str = "", end: str = "\n") -> None:
    """Print text, which may hold text of others; with a style where a terminal shows it."""
    shown = printable(text, keep)
    if style and sys.stdout.isatty():
        console.print(Text(shown, style=style), soft_wrap=True)
    else:
        print(shown, end=end, flush=True)


def complain(text: str) -> None:
    """Print an error."""
    print(f"apt-jobs: {printable(text, BLOCK)}", file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """Print JSON that is safe to look at: it stays the same value for who parses it."""
    is_unicode = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")
    text = json.dumps(value, indent=2, ensure_ascii=not is_unicode)
    print("".join(char if char == "\n" or not _is_hidden(char) else _escaped_in_json(char) for char in text))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print one line a row, and never cut a cell, but for the last column of a row that a terminal has no room for."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(columns, *cells, strict=True)]
    room = console.width - sum(width + 2 for width in widths[:-1]) if sys.stdout.isatty() else None
    for number, row in enumerate([list(columns), *cells]):
        *first, last = row
        if room is not None and MIN_LAST_COLUMN <= room < cell_len(last):
            last = set_cell_size(last, room - 1) + _encodable("\u2026")[:1]
        padded = [cell + " " * (width - cell_len(cell)) for cell, width in zip(first, widths, strict=False)]
        line = "  ".join([*padded, last])
        if number == 0 and room is not None:
            console.print(Text(line, style="bold"), soft_wrap=True)
        else:
            print(line)


def prepare_streams() -> None:
    """Let standard output and error escape what their encoding cannot hold, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def load_settings(port: int | None = None, data_dir: Path | None = None) -> Settings:
    """Read the settings of the environment, changed by options that were given.

    Raises:
        AptJobsError: they are wrong.
    """
    values: dict[str, Any] = {"port": port, "data_dir": data_dir}
    try:
        return Settings(**{name: value for name, value in values.items() if value is not None})
    except ValueError as exc:
        raise AptJobsError(f"the settings are wrong: {exc}") from exc


def open_client() -> Client:
    """Connect to the service that this user's commands talk to."""
    return Client(data_dir=load_settings().root)


def read_job(file: Path) -> dict[str, Any]:
    """Read the job of a file, or of standard input for `-`. What is in it, the service judges.

    Raises:
        InvalidInput: it cannot be read, is too large, or is no JSON object.
    """
    try:
        with sys.stdin.buffer if str(file) == "-" else file.open("rb") as opened:
            text = opened.read(MAX_JOB_BYTES + 1)
    except (OSError, ValueError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else exc
        raise InvalidInput(f"{file}: {why}; name a file with a job as JSON, or - for standard input") from exc
    if len(text) > MAX_JOB_BYTES:
        raise InvalidInput(f"{file} has more than {MAX_JOB_BYTES:,} bytes: that is no job")
    try:
        job = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise InvalidInput(f"{file} is no JSON: {exc}") from exc
    if not isinstance(job, dict):
        raise InvalidInput(f'{file} holds a {type(job).__name__}; a job is an object, as {{"kind": "train"}}')
    return job


def _is_hidden(char: str) -> bool:
    return unicodedata.category(char) in _HIDDEN and char not in _JOINERS


def _escaped(char: str) -> str:
    number = ord(char)
    if number < 0x100:
        return _SHORT.get(char, f"\\x{number:02x}")
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def _escaped_in_json(char: str) -> str:
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else json.dumps(char)[1:-1]


def _cell(value: str) -> str:
    return _encodable(printable(value)) or "-"


def _encodable(text: str) -> str:
    """Return the text as standard output will show it, so that columns stay in line."""
    stream: TextIO = sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
