"""Requests to an engine, and how tests wait for them."""

import time
from collections.abc import Callable
from typing import Any

from apt_jobs.generation.request import Request
from apt_jobs.jobs.spec import GenerateSpec

DEADLINE_S = 90.0


def spec(*texts: str, max_length: int = 20, **options: Any) -> GenerateSpec:
    return GenerateSpec(kind="generate", texts=list(texts), max_length=max_length, **options)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def finish_after(request: Request) -> Any:
    return request.future.result(timeout=DEADLINE_S)
