"""Whom a client trusts on the way: certificates and proxies, the same for REST, WebSockets and event streams.

The system's certificates (OpenSSL's on Linux, the key chain on macOS, the store on Windows), and those of
`SSL_CERT_FILE` and `SSL_CERT_DIR`: a company's own certificate authority works as with curl. A proxy comes from
`HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY` and `NO_PROXY`, and is never used for a service on this machine.
"""

import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx
import truststore

from apt_jobs import __version__
from apt_jobs.client.access import Access
from apt_jobs.errors import InvalidInput

USER_AGENT = f"apt-jobs-client/{__version__}"


@dataclass(frozen=True, slots=True)
class Trust:
    """How a connection to one service is made."""

    context: ssl.SSLContext | None  # None: neither the service nor the proxy speaks TLS
    proxy: str | None

    @property
    def proxy_context(self) -> ssl.SSLContext | None:
        """The context for a proxy that is itself reached through TLS."""
        return self.context if (self.proxy or "").startswith("https:") else None


def trust_for(access: Access) -> Trust:
    """Read the environment once, for each connection to this service.

    Raises:
        InvalidInput: `SSL_CERT_FILE`, `SSL_CERT_DIR` or a proxy's variable cannot be used.
    """
    proxy = _proxy_of(access)
    needs_tls = access.url.startswith("https:") or (proxy or "").startswith("https:")
    return Trust(_tls_context() if needs_tls else None, proxy)


def httpx_options(access: Access, trust: Trust) -> dict[str, Any]:
    """Keywords of `httpx.Client` and `httpx.AsyncClient`."""
    return {
        "base_url": access.url,
        "headers": {**access.headers, "user-agent": USER_AGENT},
        "trust_env": False,  # the environment is read in this room only
        "verify": trust.context or False,  # without a context nothing speaks TLS
        "proxy": httpx.Proxy(trust.proxy, ssl_context=trust.proxy_context) if trust.proxy else None,
    }


def websocket_options(access: Access, trust: Trust) -> dict[str, Any]:
    """Keywords of both `connect` functions of websockets."""
    options: dict[str, Any] = {
        "additional_headers": access.headers,
        "user_agent_header": USER_AGENT,
        "ssl": trust.context if access.url.startswith("https:") else None,
        "proxy": trust.proxy,
    }
    if trust.proxy_context is not None:
        options["proxy_ssl"] = trust.proxy_context
    return options


def why_not_trusted(error: BaseException) -> str | None:
    """Return the reason for which a certificate was refused, if that is what `error` comes from."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, ssl.SSLCertVerificationError):
            return cause.verify_message or str(cause)
        cause = cause.__cause__ or cause.__context__
    return None


def _tls_context() -> ssl.SSLContext:
    context = truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if file := os.environ.get("SSL_CERT_FILE"):
        _load(context, "SSL_CERT_FILE", file, is_folder=False)
    for folder in os.environ.get("SSL_CERT_DIR", "").split(os.pathsep):
        if folder:
            _load(context, "SSL_CERT_DIR", folder, is_folder=True)
    return context


def _proxy_of(access: Access) -> str | None:
    """Return the proxy that the environment names for this service, if any."""
    parts = urlsplit(access.url)
    if access.is_loopback or proxy_bypass(parts.netloc):
        return None
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy is None:
        return None
    return _checked_proxy(proxy if "://" in proxy else f"http://{proxy}")


def _load(context: ssl.SSLContext, variable: str, path: str, *, is_folder: bool) -> None:
    where = Path(path)
    try:
        if is_folder:
            if not where.is_dir():
                raise FileNotFoundError(0, "there is no such folder")
            context.load_verify_locations(capath=path)
        else:
            context.load_verify_locations(cafile=path)
    except ssl.SSLError as exc:
        raise InvalidInput(f"{variable} names {path}, which has no certificate in PEM form") from exc
    except (OSError, ValueError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else exc
        raise InvalidInput(f"{variable} names {path!r}, which cannot be read: {why}") from exc


def _checked_proxy(proxy: str) -> str:
    """Return the proxy's address; an error does not show it, since it may hold a password."""
    try:
        parts = urlsplit(proxy)
        is_right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_right = False
    if not is_right:
        raise InvalidInput(
            "HTTPS_PROXY, HTTP_PROXY or ALL_PROXY is no address as http://proxy.example.com:3128; "
            "set it right, or name the service in NO_PROXY"
        )
    return proxy
