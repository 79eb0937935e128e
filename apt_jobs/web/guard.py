"""The outermost layer of the web process: how many, from where, and who. Nothing behind it sees a request it refused.

`Host` and `Origin` are compared whole, for every method and WebSocket, so that a page of another site (or a name that
was rebound to loopback) reaches nothing. Open paths are listed here and matched exactly.
"""

import asyncio
import logging
import re
from collections.abc import Callable
from http.cookies import SimpleCookie
from typing import Any

from sqlalchemy.orm import Session
from starlette._utils import get_route_path
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from apt_jobs.addresses import arrival_hosts, normalized_host, own_hosts
from apt_jobs.db.access import KEY_PREFIX, Principal, authenticate_key, authenticate_session
from apt_jobs.errors import AptJobsError, Denied
from apt_jobs.settings import Settings
from apt_jobs.web.direct_socket import has_left
from apt_jobs.web.problems import problem_response
from apt_jobs.web.service import Service

logger = logging.getLogger(__name__)

SESSION_COOKIE = "apt_session"
OPEN = re.compile(
    r"/(healthz|readyz|login)"
    r"|/(favicon\.svg|jobs/[^/]+|checkpoints|generate|schedules|workers)?"  # the page, which holds no data
    r"|/assets/[^/]+"  # its scripts and styles, by exact name: see pages.py
)
MAX_LOOKUPS = 4  # of keys at once; the others wait here, where those that leave cost nothing more
PROBES = frozenset({"/healthz", "/readyz"})  # an orchestrator asks by address, and is told no more than "ok"
SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (
        b"content-security-policy",
        b"default-src 'self'; style-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
        b"form-action 'self'; frame-ancestors 'none'",
    ),
)


class Guard:
    """ASGI middleware. A refused WebSocket is closed with 4401 (who?), 4403 (from where?) or 4503 (too many)."""

    def __init__(self, app: ASGIApp, settings: Settings, service: Callable[[], Service]) -> None:
        self._app, self._settings, self._service = app, settings, service
        self._hosts = allowed_hosts(settings)
        self._num_open = 0
        self._turns = asyncio.Semaphore(MAX_LOOKUPS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        if self._num_open >= self._settings.max_connections:
            await _refuse(scope, receive, send, 503, "too many connections; try again later")
            return
        self._num_open += 1
        try:
            await self._guarded(scope, receive, send)
        finally:
            self._num_open -= 1

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        if (refusal := self._wrong_place(scope, headers)) is not None:
            await _refuse(scope, receive, send, 403, refusal)
            return
        try:
            scope.setdefault("state", {})["principal"] = await self._principal(scope, headers)
        except Denied as exc:
            await _refuse(scope, receive, send, 401, str(exc))
            return
        except AptJobsError as exc:
            await _refuse(scope, receive, send, 503, str(exc))
            return
        await self._app(scope, receive, _with_security_headers(send))

    def _wrong_place(self, scope: Scope, headers: Headers) -> str | None:
        scheme = scheme_of(self._settings)
        known = self._hosts | arrival_hosts(self._settings.host, scope.get("server"))
        hosts = headers.getlist("host")
        is_probe = scope["type"] == "http" and get_route_path(scope) in PROBES
        if not is_probe and (len(hosts) != 1 or normalized_host(hosts[0], scheme) not in known):
            return f"this service does not answer to Host {', '.join(hosts)[:200]!r}; see APT_JOBS_ALLOWED_HOSTS"
        origins = headers.getlist("origin")
        if origins and (len(origins) != 1 or not _is_own_origin(origins[0], scheme, known)):
            return f"requests from Origin {', '.join(origins)[:200]!r} are refused"
        return None

    async def _principal(self, scope: Scope, headers: Headers) -> Principal | None:
        """Who asks; None only where no one needs to be known.

        Wrong keys are not counted: nobody guesses 256 random bits, and a limit would let a stranger lock others out.

        Raises:
            Denied: a key or session is needed, and there is none that is valid.
        """
        if scope["type"] == "http" and is_open(get_route_path(scope)):
            return None
        service = self._service()
        authorization = headers.get("authorization")
        if authorization is not None:
            scheme, _, key = authorization.partition(" ")
            if scheme.lower() != "bearer" or not key.startswith(KEY_PREFIX):
                raise Denied("the Authorization header is not `Bearer apt_...`")
            return await self._known(scope, service, authenticate_key, key)
        secret = _session_secret(headers)
        if secret is not None:
            return await self._known(scope, service, authenticate_session, secret)
        raise Denied("no key: send `Authorization: Bearer apt_...`, or open the link that `apt-jobs login-link` prints")

    async def _known(
        self, scope: Scope, service: Service, look_up: Callable[[Session, str], Principal], secret: str
    ) -> Principal:
        async with self._turns:
            if has_left(scope):
                raise Denied("the client left before it was known")
            return await service.read(look_up, secret)


def is_open(path: str) -> bool:
    """Whether a path is served to anyone: liveness, the login, and the page itself, which holds no data."""
    return OPEN.fullmatch(path) is not None


def allowed_hosts(settings: Settings) -> frozenset[str]:
    """Every value of `Host` that is answered, as `normalized_host` writes it, besides the address of arrival."""
    listed = {normalized_host(name, scheme_of(settings)) for name in settings.allowed_hosts}
    return own_hosts(settings.host, settings.port) | listed


def scheme_of(settings: Settings) -> str:
    """The scheme of the addresses that browsers use."""
    return "https" if settings.https else "http"


def _is_own_origin(origin: str, scheme: str, hosts: frozenset[str]) -> bool:
    found, separator, host = origin.partition("://")
    return bool(separator) and found.lower() == scheme and normalized_host(host, scheme) in hosts


def _session_secret(headers: Headers) -> str | None:
    cookie: SimpleCookie = SimpleCookie()
    try:
        cookie.load(headers.get("cookie", ""))
    except Exception:  # http.cookies raises CookieError for some rubbish and others for other rubbish
        logger.debug("a cookie header could not be read")
        return None
    morsel = cookie.get(SESSION_COOKIE)
    return None if morsel is None else morsel.value


async def _refuse(scope: Scope, receive: Receive, send: Send, status: int, detail: str) -> None:
    if scope["type"] == "websocket":
        await receive()  # websocket.connect
        await send({"type": "websocket.accept"})  # only an accepted socket can tell a browser its close code
        await send({"type": "websocket.close", "code": 4000 + status, "reason": detail[:120]})
        return
    headers = {"www-authenticate": "Bearer"} if status == 401 else {}
    await problem_response(status, detail, headers=headers)(scope, receive, _with_security_headers(send))


def _with_security_headers(send: Send) -> Send:
    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers: list[Any] = list(message.get("headers", []))
            message = {**message, "headers": [*headers, *SECURITY_HEADERS]}
        await send(message)

    return wrapped
