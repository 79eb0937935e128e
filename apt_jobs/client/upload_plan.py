"""The steps of an upload in parts, without doing any I/O on the network: both clients send what it asks for."""

import hashlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from apt_jobs.backoff import Backoff
from apt_jobs.client import calls
from apt_jobs.errors import AptJobsError, Conflict, InvalidInput, NotFound, Unavailable

PART_BYTES = 8 << 20
MAX_FAILURES = 8  # in a row, without a byte more arriving
WAIT = Backoff(0.5, 30.0)
Step = calls.Call[dict[str, Any]] | float  # a request, or seconds to wait
Steps = Generator[Step, dict[str, Any] | AptJobsError | None, dict[str, Any]]


def upload_steps(
    file: Path, name: str, dataset_format: str, column: str, on_progress: Callable[[int, int], None] | None
) -> Steps:
    """Yield requests and waits; each request is answered with its answer or its error. Returns the data set.

    Raises:
        InvalidInput: the file cannot be read, is empty, or changed meanwhile.
        AptJobsError: the service refuses it, or cannot be reached for too long.
    """
    size_bytes, sha256 = _measure(file)
    if size_bytes == 0:
        raise InvalidInput(f"{file} is empty")
    upload = _require((yield calls.begin_upload(name, dataset_format, column, size_bytes, sha256)))
    offset, num_failures = int(upload["offset"]), 0
    with file.open("rb") as opened:
        while offset < size_bytes:
            if on_progress is not None:
                on_progress(offset, size_bytes)
            opened.seek(offset)
            answer = yield calls.add_part(upload["id"], offset, opened.read(PART_BYTES))
            if isinstance(answer, Unavailable | Conflict):  # what arrived of the part is there: ask how far it is
                num_failures += 1
                if num_failures > MAX_FAILURES:
                    raise answer
                yield WAIT.wait_s(num_failures)
                answer = yield calls.get_upload(upload["id"])
                if isinstance(answer, Unavailable):
                    continue
            arrived = int(_require(answer)["offset"])
            num_failures = num_failures if arrived <= offset else 0
            offset = arrived
    return _require((yield calls.complete_upload(upload["id"])))


def next_step(steps: Steps, answer: dict[str, Any] | AptJobsError | None) -> Step | dict[str, Any]:
    """Return the next step of an upload after the answer to its last one, or the data set when it is there."""
    try:
        return steps.send(answer)
    except StopIteration as done:
        return dict(done.value)


def _measure(file: Path) -> tuple[int, str]:
    digest, size_bytes = hashlib.sha256(), 0
    try:
        with file.open("rb") as opened:
            while part := opened.read(1 << 20):
                digest.update(part)
                size_bytes += len(part)
    except OSError as exc:
        raise InvalidInput(f"{file} cannot be read: {exc.strerror}") from exc
    return size_bytes, digest.hexdigest()


def _require(answer: dict[str, Any] | AptJobsError | None) -> dict[str, Any]:
    if isinstance(answer, dict):
        return answer
    raise answer or NotFound("the upload is gone")
