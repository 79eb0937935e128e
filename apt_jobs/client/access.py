"""Where the service is and by which key it lets us in: arguments, environment, or what `apt-jobs up` wrote.

The first thing that a client does. What is wrong with an address or a key is said here, in one sentence and never with
the key in it.
"""

import ipaddress
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from apt_jobs.errors import InvalidInput, Unavailable

MAX_KEY_CHARS = 1_000
_EXAMPLE = "http://127.0.0.1:8000 or https://jobs.example.com"


@dataclass(frozen=True, slots=True)
class Access:
    """An address without a slash at its end, and a key that can be a header's value."""

    url: str
    api_key: str = field(repr=False)
    browser_url: str = ""  # where a browser of this user finds the service, if that is another address

    @property
    def is_loopback(self) -> bool:
        """Whether the service is on this machine."""
        return _is_loopback(self.url)

    @property
    def websocket_url(self) -> str:
        """The same address for WebSockets."""
        return self.url.replace("http", "ws", 1)

    @property
    def headers(self) -> dict[str, str]:
        """What every request carries."""
        return {"authorization": f"Bearer {self.api_key}"}


def find_access(url: str | None, api_key: str | None, data_dir: Path) -> Access:
    """Take the arguments, else APT_JOBS_URL and APT_JOBS_API_KEY, else what `apt-jobs up` wrote into `data_dir`.

    The key that `up` wrote is sent to this machine only, whatever address is asked for.

    Args:
        url: Address of the service.
        api_key: Key of the service.
        data_dir: Data directory of a service on this machine.

    Returns:
        The address and the key.

    Raises:
        Unavailable: no service is known.
        InvalidInput: the address or the key cannot be one.
    """
    local_url, local_key, browser_url = _local_access(data_dir)
    given_url = _first_given(url, os.environ.get("APT_JOBS_URL"))
    given_key = _first_given(api_key, os.environ.get("APT_JOBS_API_KEY"))
    if not (given_url or local_url):
        raise Unavailable(
            f"no service is known: start one with `apt-jobs up` (nothing is running on {data_dir}), "
            "or set APT_JOBS_URL and APT_JOBS_API_KEY"
        )
    checked_url = _checked_url(given_url or local_url)
    may_use_local_key = checked_url == local_url.rstrip("/") or _is_loopback(checked_url)
    key = given_key or (local_key if may_use_local_key else "")
    if not key:
        raise Unavailable(f"no API key for {checked_url}: set APT_JOBS_API_KEY (`apt-jobs keys create` makes one)")
    return Access(checked_url, _checked_key(key), checked_url if given_url else browser_url or checked_url)


def require_header(value: str, name: str) -> str:
    """Return `value` if HTTP can carry it as the value of a header.

    Raises:
        InvalidInput: it cannot.
    """
    if value.isascii() and value.isprintable() and value == value.strip():
        return value
    raise InvalidInput(f"{name} is {value[:100]!r}; use visible ASCII characters, without a space at either end")


def _first_given(*values: str | None) -> str:
    """Return the first value that is more than white space, without the white space around it."""
    return next((value.strip() for value in values if value and value.strip()), "")


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as exc:
        raise InvalidInput(f"the service's address is {url[:200]!r}, no URL ({exc}); write {_EXAMPLE}") from exc
    if parts.username is not None or parts.password is not None:
        raise InvalidInput("the service's address has a user name or password; the key belongs into APT_JOBS_API_KEY")
    is_plain = url.isprintable() and " " not in url and not parts.query and not parts.fragment
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or not is_plain:
        raise InvalidInput(f"the service's address is {url[:200]!r}; write one as {_EXAMPLE}")
    return f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")


def _checked_key(key: str) -> str:
    wrong = next((place for place, char in enumerate(key, 1) if not "!" <= char <= "~"), None)
    if wrong is not None:
        raise InvalidInput(
            f"the API key has a character that no key has (the {wrong}. of {len(key)}): a space, a line break, a "
            "control character or one beyond ASCII; copy it again"
        )
    if len(key) > MAX_KEY_CHARS:
        raise InvalidInput(f"the API key has {len(key):,} characters; keys have less than {MAX_KEY_CHARS:,}")
    return key


def _is_loopback(url: str) -> bool:
    host = (urlsplit(url).hostname or "").rstrip(".")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _local_access(data_dir: Path) -> tuple[str, str, str]:
    """Return address, key and address for browsers that `up` wrote; empty if nothing runs there."""
    try:
        written = json.loads((data_dir / "local.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return "", "", ""
    if not isinstance(written, dict):
        return "", "", ""
    values = [written.get(name) for name in ("url", "api_key", "browser_url")]
    url, key, browser_url = (value.strip() if isinstance(value, str) else "" for value in values)
    return url, key, browser_url
