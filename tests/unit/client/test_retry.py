"""When a request is sent again."""

import time
from email.utils import formatdate

import httpx
import pytest

from apt_jobs.client.retry import BACKOFF, MAX_WAIT_S, retry_after_s, wait_before_retry_s

REQUEST = httpx.Request("GET", "http://127.0.0.1/")


def answer(status: int, retry_after: str | None = None) -> httpx.Response:
    return httpx.Response(status, headers={} if retry_after is None else {"retry-after": retry_after})


def test_retry_after_is_honoured_in_both_forms() -> None:
    assert wait_before_retry_s(answer(503, "7"), 1, is_repeatable=True) == 7.0
    in_ten_s = formatdate(time.time() + 10, usegmt=True)
    wait_s = wait_before_retry_s(answer(429, in_ten_s), 1, is_repeatable=False)
    assert wait_s is not None
    assert 5 < wait_s <= 10
    assert retry_after_s(answer(503, formatdate(time.time() - 60, usegmt=True))) == 0.0


@pytest.mark.parametrize("text", ["", "soon", "-1", "1e9", "\u0663", "Wed, 99 Foo 2026"])
def test_a_retry_after_that_cannot_be_read_is_a_back_off(text: str) -> None:
    response = httpx.Response(503, headers=[(b"retry-after", text.encode())])
    assert wait_before_retry_s(response, 1, is_repeatable=True) == BACKOFF.wait_s(1)


def test_a_long_retry_after_is_an_error_at_once() -> None:
    assert wait_before_retry_s(answer(503, f"{MAX_WAIT_S + 1:.0f}"), 1, is_repeatable=True) is None
    assert wait_before_retry_s(answer(503, "9" * 500), 1, is_repeatable=True) is None


@pytest.mark.parametrize(
    ("status", "is_repeatable", "is_repeated"),
    [
        (503, True, True),
        (503, False, False),
        (429, False, True),
        (502, True, True),
        (504, False, False),
        (500, True, False),
        (422, True, False),
        (401, True, False),
    ],
)
def test_only_what_is_safe_is_repeated(status: int, is_repeatable: bool, is_repeated: bool) -> None:
    assert (wait_before_retry_s(answer(status), 1, is_repeatable=is_repeatable) is not None) == is_repeated


@pytest.mark.parametrize(
    ("error", "is_repeatable", "is_repeated"),
    [
        (httpx.ConnectError("refused", request=REQUEST), False, True),
        (httpx.ConnectTimeout("slow", request=REQUEST), False, True),
        (httpx.ReadError("reset", request=REQUEST), True, True),
        (httpx.ReadError("reset", request=REQUEST), False, False),
        (httpx.RemoteProtocolError("cut", request=REQUEST), False, False),
        (httpx.ReadTimeout("slow", request=REQUEST), True, False),
    ],
)
def test_what_may_have_been_done_is_not_done_twice(
    error: httpx.HTTPError, is_repeatable: bool, is_repeated: bool
) -> None:
    assert (wait_before_retry_s(error, 1, is_repeatable=is_repeatable) is not None) == is_repeated


def test_tries_and_waits_are_bounded() -> None:
    assert wait_before_retry_s(answer(503), 4, is_repeatable=True) is None
    assert wait_before_retry_s(answer(503), 1, is_repeatable=True, max_retries=0) is None
    assert [BACKOFF.wait_s(number) for number in (1, 2, 3)] == [0.2, 0.4, 0.8]
    assert BACKOFF.wait_s(10_000) == BACKOFF.max_s
