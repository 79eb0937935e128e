"""JSON lines, one object each: read from any place of a file, and checked as a whole with the line that is wrong."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from apt_jobs.errors import InvalidInput

MAX_LINE_BYTES = 4 << 20  # as the service's default limit of a body


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a file."""

    number: int  # from 1
    end: int  # offset in bytes of what follows it
    value: dict[str, Any] | None  # None: it is wrong
    fault: str = ""


def json_lines(file: Path, *, offset: int = 0, number: int = 0) -> Iterator[Line]:
    """Yield the lines after `offset`, which is the end of line `number`. Empty lines are left out."""
    with file.open("rb") as opened:
        opened.seek(offset)
        while raw := opened.readline(MAX_LINE_BYTES + 1):
            number += 1
            offset += len(raw)
            if len(raw) > MAX_LINE_BYTES:
                yield Line(number, offset, None, f"it is longer than {MAX_LINE_BYTES:,} bytes")
                return  # what follows would be read from the middle of it
            if raw.strip():
                yield _line(number, offset, raw)


def check_json_lines(file: Path, max_lines: int) -> None:
    """Return if a file is JSON lines of objects.

    Raises:
        InvalidInput: it is not; the message names the line.
    """
    num_lines = 0
    for line in json_lines(file):
        if line.value is None:
            raise InvalidInput(f"file: line {line.number:,} is wrong: {line.fault}")
        num_lines += 1
        if num_lines > max_lines:
            raise InvalidInput(f"file: it has more than {max_lines:,} lines; split it")
    if num_lines == 0:
        raise InvalidInput("file: it has no line that is not empty; expected a JSON object on each")


def _line(number: int, end: int, raw: bytes) -> Line:
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as exc:
        return Line(number, end, None, f"it is not JSON ({exc.msg} at character {exc.pos + 1})")
    if not isinstance(value, dict):
        return Line(number, end, None, f"it is a JSON {type(value).__name__}; expected an object")
    return Line(number, end, value)
