"""The outermost layer of the web process: how many, from where, and who. Nothing behind it sees a request it refused.

`Host` and `Origin` are compared whole, for each method and WebSocket, so that a page of another site (or a name that
was rebound to loopback) reaches nothing. Open paths are listed here and matched exactly.
"""

import asyncio
import hashlib
import logging
import re
from collections.abc import Callable
from http.cookies import SimpleCookie
from typing import Any

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError
from starlette._utils import get_route_path
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from apt_jobs.addresses import arrival_hosts, normalized_host, own_hosts
from apt_jobs.db.access import KEY_PREFIX, Principal, authenticate_key, authenticate_session
from apt_jobs.errors import AptJobsError, Denied
from apt_jobs.settings import Settings
from apt_jobs.web.admissions import Admission, Credential
from apt_jobs.web.page_paths import PATTERN
from apt_jobs.web.problems import problem_response
from apt_jobs.web.request_text import fault_in_address
from apt_jobs.web.revocation import Revocable, close_reason
from apt_jobs.web.server.websocket_protocol import EXTENSION, DirectWebSocketProtocol, has_left
from apt_jobs.web.service import Service

logger = logging.getLogger(__name__)

SESSION_COOKIE = "apt_session"  # begins the name of the cookie: see `session_cookie`
READING = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
RESERVED_SHARE = 0.1  # of `max_connections`, for those who come with a key or a session
HEALTH = "/healthz"  # answered however full the process is
OPEN = re.compile(
    r"/(healthz|readyz|login|favicon\.svg)"
    r"|/assets/[^/]+"  # scripts and styles of the page, by exact name: see pages.py
    f"|{PATTERN}"  # the page, which holds no data
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
HSTS = (b"strict-transport-security", b"max-age=31536000")


class Guard:
    """ASGI middleware.

    A refused WebSocket is closed with 4400 (its address is no text), 4401 (who?), 4403 (from where?), 4429 (too many of
    this key) or 4503 (too many).
    """

    def __init__(self, app: ASGIApp, settings: Settings, service: Callable[[], Service]) -> None:
        self._app, self._settings, self._service = app, settings, service
        self._hosts = allowed_hosts(settings)
        self._cookie = session_cookie(settings)
        self._num_open = 0
        self._turns = asyncio.Semaphore(MAX_LOOKUPS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        is_health = scope["type"] == "http" and get_route_path(scope) == HEALTH
        if not is_health and self._num_open >= self._room(headers):
            await _refuse(scope, receive, send, 503, "too many connections; try again later")
            return
        self._num_open += 1
        try:
            await self._guarded(scope, receive, self._with_security_headers(send))
        finally:
            self._num_open -= 1

    def _room(self, headers: Headers) -> int:
        """Return how many may be open for one more to come in: strangers leave a share to others."""
        most = self._settings.max_connections
        is_known = "authorization" in headers or _session_secret(headers, self._cookie) is not None
        return most if is_known else most - int(most * RESERVED_SHARE)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        if (refusal := self._wrong_place(scope, headers)) is not None:
            await _refuse(scope, receive, send, 403, refusal)
            return
        try:
            credential = self._credential(scope, headers)
            principal = None if credential is None else await self._known(scope, credential)
        except Denied as exc:
            await _refuse(scope, receive, send, 401, str(exc))
            return
        except AptJobsError as exc:
            await _refuse(scope, receive, send, 503, str(exc))
            return
        if (fault := fault_in_address(scope)) is not None:
            status, detail = fault
            await _refuse(scope, receive, send, status if scope["type"] == "http" else 400, detail)
            return
        scope.setdefault("state", {})["principal"] = principal
        if credential is None or principal is None:
            await self._app(scope, receive, send)
        elif credential.look_up is authenticate_session and _is_forged(scope, headers):
            await _refuse(
                scope,
                receive,
                send,
                403,
                "a browser's session changes something only from our own pages: send `Origin`",
            )
        else:
            await self._admitted(scope, receive, send, Admission(credential, principal))

    async def _admitted(self, scope: Scope, receive: Receive, send: Send, admission: Admission) -> None:
        """Serve who is known, until its key or session ends."""
        admissions, most = self._service().admissions, self._settings.max_connections_per_key
        owner = admission.principal.owner
        if admissions.num_open(owner) >= most:
            detail = f"this key has {most:,} requests and streams open already; close some, or use another key"
            await _refuse(scope, receive, send, 429, detail)
            return
        revocable = Revocable(self._app, scope, receive, send, _refuse)
        admission.revoke = revocable.revoke
        with admissions.admitted(admission):
            await revocable.run()

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

    def _credential(self, scope: Scope, headers: Headers) -> Credential | None:
        """Return what says who asks; None only where no one needs to be known.

        Wrong keys are not counted: nobody guesses 256 random bits, and a limit would let a stranger lock others out.

        Raises:
            Denied: a key or session is needed, and there is none.
        """
        if scope["type"] == "http" and is_open(get_route_path(scope)):
            return None
        authorization = headers.get("authorization")
        if authorization is not None:
            scheme, _, key = authorization.partition(" ")
            if scheme.lower() != "bearer" or not key.startswith(KEY_PREFIX):
                raise Denied("the Authorization header is not `Bearer apt_...`")
            return Credential(authenticate_key, key)
        secret = _session_secret(headers, self._cookie)
        if secret is not None:
            return Credential(authenticate_session, secret)
        raise Denied("no key: send `Authorization: Bearer apt_...`, or open the link that `apt-jobs login-link` prints")

    async def _known(self, scope: Scope, credential: Credential) -> Principal:
        async with self._turns:
            if has_left(scope):
                raise Denied("the client left before it was known")
            return await self._service().read(credential.look_up, credential.secret)

    def _with_security_headers(self, send: Send) -> Send:
        async def wrapped(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers: list[Any] = [*message.get("headers", ()), *SECURITY_HEADERS]
                if self._settings.https:
                    headers.append(HSTS)
                if all(name.lower() != b"cache-control" for name, _ in headers):
                    headers.append((b"cache-control", b"no-store"))
                message = {**message, "headers": headers}
            await send(message)

        return wrapped


def is_open(path: str) -> bool:
    """Return whether a path is served to anyone: liveness, the login, and the page itself, which holds no data."""
    return OPEN.fullmatch(path) is not None


def allowed_hosts(settings: Settings) -> frozenset[str]:
    """Return every value of `Host` that is answered, as `normalized_host` writes it, besides the address of arrival."""
    listed = {normalized_host(name, scheme_of(settings)) for name in settings.allowed_hosts}
    return own_hosts(settings.host, settings.port) | listed


def scheme_of(settings: Settings) -> str:
    """Return the scheme of the addresses that browsers use."""
    return "https" if settings.https else "http"


def _is_own_origin(origin: str, scheme: str, hosts: frozenset[str]) -> bool:
    found, separator, host = origin.partition("://")
    return bool(separator) and found.lower() == scheme and normalized_host(host, scheme) in hosts


def session_cookie(settings: Settings) -> str:
    """Return the cookie's name: another one for each installation, since all ports of a host share their cookies."""
    try:
        url = make_url(settings.database)
    except (ArgumentError, ValueError):  # it is refused where it is used
        return SESSION_COOKIE
    place = f"{url.host}:{url.port}/{url.database}"
    return f"{SESSION_COOKIE}_{hashlib.sha256(place.encode()).hexdigest()[:12]}"


def _session_secret(headers: Headers, name: str) -> str | None:
    cookie: SimpleCookie = SimpleCookie()
    for part in headers.get("cookie", "").split(";"):  # what other services of this host left there is not parsed
        if part.strip().startswith(f"{name}="):
            try:
                cookie.load(part.strip())
            except Exception:  # http.cookies raises CookieError for some rubbish and others for other rubbish
                logger.debug("a cookie header could not be read")
                return None
    morsel = cookie.get(name)
    return None if morsel is None else morsel.value


def _is_forged(scope: Scope, headers: Headers) -> bool:
    """Return whether a page of another site, or nobody knows which, may have made a browser send this.

    `_wrong_place` has compared `Origin` already, where there is one.
    """
    if scope["type"] == "http" and scope["method"] in READING:
        return False
    site = headers.get("sec-fetch-site")
    if site is not None and site != "same-origin":
        return True
    return site is None and "origin" not in headers


async def _refuse(scope: Scope, receive: Receive, send: Send, status: int, detail: str) -> None:
    if scope["type"] == "websocket":
        await receive()  # websocket.connect
        await send({"type": "websocket.accept"})  # only an accepted socket can tell a browser its close code
        direct = scope.get("extensions", {}).get(EXTENSION)
        if isinstance(direct, DirectWebSocketProtocol):
            direct.give_up(4000 + status, close_reason(detail))  # who does not answer is not waited for
        else:
            await send({"type": "websocket.close", "code": 4000 + status, "reason": close_reason(detail)})
        return
    headers = {"www-authenticate": "Bearer"} if status == 401 else {}
    await problem_response(status, detail, headers=headers, scope=scope)(scope, receive, send)
