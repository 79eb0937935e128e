"""Which requests are sent again, and when: every retry rule of the client.

A request is repeated if it was not done (the connection failed before it was sent, or the service said "not now": 429,
503), or if doing it twice changes nothing. `Retry-After` is honoured up to `MAX_WAIT_S`; a longer one is an error at
once, which says how long.
"""

import time
from email.utils import parsedate_to_datetime

import httpx

from apt_jobs.backoff import Backoff
from apt_jobs.client.trust import why_not_trusted

MAX_RETRIES = 3
MAX_WAIT_S = 30.0  # for one `Retry-After`
BACKOFF = Backoff(0.2, 5.0)
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_NOT_NOW = frozenset({429, 503})
_BROKEN_WAY = frozenset({502, 504})  # the proxy does not know whether it was done


def wait_before_retry_s(
    outcome: httpx.Response | httpx.HTTPError, num_failures: int, *, is_repeatable: bool, max_retries: int = MAX_RETRIES
) -> float | None:
    """Return how long to wait before the request is sent again; None: not at all.

    Args:
        outcome: What the last try gave: an answer, or the error that kept it from coming.
        num_failures: Tries so far, this one included.
        is_repeatable: Doing it twice changes nothing.
        max_retries: Further tries after the first.

    Returns:
        Seconds, at most `MAX_WAIT_S`.
    """
    if num_failures > max_retries:
        return None
    if isinstance(outcome, httpx.Response):
        is_refused = outcome.status_code in _NOT_NOW and (is_repeatable or outcome.status_code == 429)
        if not is_refused and not (is_repeatable and outcome.status_code in _BROKEN_WAY):
            return None
        asked_s = retry_after_s(outcome)
        if asked_s is None:
            return BACKOFF.wait_s(num_failures)
        return None if asked_s > MAX_WAIT_S else asked_s
    if why_not_trusted(outcome) is not None or isinstance(outcome, httpx.UnsupportedProtocol):
        return None
    was_not_sent = isinstance(outcome, _NOT_SENT)
    is_broken = isinstance(outcome, httpx.TransportError) and not isinstance(outcome, httpx.ReadTimeout)
    return BACKOFF.wait_s(num_failures) if was_not_sent or (is_repeatable and is_broken) else None


def retry_after_s(response: httpx.Response) -> float | None:
    """Return the `Retry-After` of an answer, in either form, in seconds from now; None if there is none."""
    text = response.headers.get("retry-after", "").strip()
    if text.isascii() and text.isdecimal():
        return float(text[:9])
    try:
        return max(parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError, OverflowError):
        return None
