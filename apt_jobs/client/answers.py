"""What the service answers: problems as errors of ours, rows as dictionaries that know their job.

Whatever comes back, be it a page of a proxy or half a document, becomes an answer or one sentence.
"""

from collections.abc import Mapping
from typing import Any

import httpx

from apt_jobs.client.trust import why_not_trusted
from apt_jobs.errors import AptJobsError, Conflict, Denied, InvalidInput, NotFound, OutOfSpace, Unavailable
from apt_jobs.jobs.states import TERMINAL_STATES

ENDED = frozenset(state.value for state in TERMINAL_STATES)
_ERROR_OF: Mapping[int, type[AptJobsError]] = {
    401: Denied,
    403: Denied,
    404: NotFound,
    407: Denied,
    408: Unavailable,
    409: Conflict,
    410: NotFound,
    412: Conflict,
    425: Unavailable,
    429: Unavailable,
    507: OutOfSpace,
}


class JobAnswer(dict[str, Any]):
    """One job as REST shows it: a dictionary, with names for what is asked for most."""

    @property
    def id(self) -> str:
        """Its id, as `job_...`."""
        return str(self["id"])

    @property
    def state(self) -> str:
        """One of `queued`, `running`, `pausing`, `paused`, `succeeded`, `failed`, `cancelled`, `dead`."""
        return str(self["state"])

    @property
    def reason(self) -> str | None:
        """Why it is in this state, if there is a reason."""
        return None if self.get("reason") is None else str(self["reason"])

    @property
    def is_ended(self) -> bool:
        """Whether it will not go on, unless somebody retries it."""
        return self.state in ENDED

    @property
    def last_seq(self) -> int:
        """The `seq` of its newest event."""
        return int(self["last_seq"])


def json_of(response: httpx.Response) -> Any:
    """Return the JSON of an answer; an empty one is an empty object.

    Raises:
        AptJobsError: the answer is a problem, or does not come from this service.
    """
    _require_success(response)
    if not response.content:
        return {}
    try:
        return response.json()
    except (ValueError, RecursionError) as exc:
        raise InvalidInput(
            f"{_address(response)} answered with {_content_type(response)}, not JSON; is it the address of apt_jobs?"
        ) from exc


def require_file(response: httpx.Response) -> None:
    """Return if the answer is a file.

    Raises:
        AptJobsError: it is a problem, or a page of something in between.
    """
    _require_success(response)
    if (kind := _content_type(response)) == "text/html":
        raise InvalidInput(
            f"{_address(response)} answered with {kind}, not with a file; is it the address of apt_jobs?"
        )


def require_event_stream(response: httpx.Response) -> None:
    """Return if the answer is a stream of server-sent events.

    Raises:
        AptJobsError: it is a problem, or something else.
    """
    _require_success(response)
    if (kind := _content_type(response)) != "text/event-stream":
        raise InvalidInput(f"{_address(response)} answered with {kind}, not with a stream of events")


def list_of(answer: Any) -> list[dict[str, Any]]:
    """Return the rows of a list.

    Raises:
        InvalidInput: it is no list of this service.
    """
    rows = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(rows, list):
        raise InvalidInput("the answer is no list of apt_jobs; are client and service of the same version?")
    return rows


def error_of(response: httpx.Response) -> AptJobsError:
    """Return the error that a problem document stands for. The body has been read."""
    status = response.status_code
    text = f"{_address(response)} answered {status} {response.reason_phrase}"
    try:
        problem = response.json()
        if isinstance(problem.get("error"), dict):  # below /v1
            problem = {"detail": problem["error"]["message"]}
        faults = "".join(f"\n  {fault['pointer']}: {fault['detail']}" for fault in problem.get("errors") or [])
        text = f"{problem['detail']}{faults}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # a proxy's page
    kind = _ERROR_OF.get(status) or (Unavailable if status >= 500 else InvalidInput)
    return kind(text)


def unreachable(url: str, error: Exception) -> AptJobsError:
    """Return what to say of a connection that failed."""
    if (why := why_not_trusted(error)) is not None:
        return Unavailable(
            f"the certificate of {url} is not trusted: {why}; "
            "SSL_CERT_FILE names a file with the certificate of your own authority"
        )
    if isinstance(error, httpx.TimeoutException | TimeoutError):
        return Unavailable(f"{url} does not answer in time ({type(error).__name__})")
    return Unavailable(f"{url} cannot be reached: {error or type(error).__name__}")


def _require_success(response: httpx.Response) -> None:
    if response.is_error:
        raise error_of(response)
    if response.is_redirect:
        raise InvalidInput(
            f"{_address(response)} sends on to {response.headers.get('location', '')[:200]}; "
            "set APT_JOBS_URL to the address where the service itself answers"
        )


def _content_type(response: httpx.Response) -> str:
    text: str = response.headers.get("content-type", "no content type")
    return text.partition(";")[0].strip().lower()


def _address(response: httpx.Response) -> str:
    url = response.request.url
    return f"{url.scheme}://{url.netloc.decode('ascii', 'replace')}"
