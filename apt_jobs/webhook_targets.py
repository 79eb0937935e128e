"""Where the service may send to: no address that only its own network reaches, unless the operator allows it.

A name is looked up once for each try; every address that it has is judged, and the connection goes to one of those very
addresses, so that a name which answers differently the next time gains nothing.
"""

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from apt_jobs.errors import InvalidInput

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
MAX_URL_CHARS = 2_000
_PORTS = {"http": 80, "https": 443}
_REFUSED = {  # beyond what `is_global` refuses
    "168.63.129.16/32": "the address of a cloud's metadata",
    "192.0.0.0/24": "private",
    "192.88.99.0/24": "a relay between IPv4 and IPv6",
    "::/96": "an IPv4 address written as IPv6",
    "::ffff:0:0/96": "an IPv4 address written as IPv6",
    "::ffff:0:0:0/96": "an IPv4 address written as IPv6",
    "64:ff9b::/96": "an IPv4 address behind NAT64",
    "64:ff9b:1::/48": "an IPv4 address behind NAT64",
    "2001::/32": "an IPv4 address behind Teredo",
    "2002::/16": "an IPv4 address behind 6to4",
    "3fff::/20": "private",
    "fec0::/10": "private",
}
_UNICAST = ipaddress.ip_network("2000::/3")  # all that is given out of IPv6
_NETWORKS = [(ipaddress.ip_network(network), why) for network, why in _REFUSED.items()]


@dataclass(frozen=True, slots=True)
class Target:
    """A URL that may be sent to if its addresses may."""

    url: str
    scheme: str
    host: str  # without brackets
    port: int


@dataclass(frozen=True, slots=True)
class TargetRules:
    """What the operator allows besides public addresses (`APT_JOBS_WEBHOOK_ALLOW_TARGETS`)."""

    names: frozenset[str]
    networks: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]

    @classmethod
    def parse(cls, allowed: Iterable[str]) -> "TargetRules":
        """Read names, addresses and networks.

        Raises:
            ValueError: an entry is none of them.
        """
        names, networks = set[str](), []
        for entry in allowed:
            try:
                networks.append(ipaddress.ip_network(entry))
            except ValueError:
                if not entry or any(sign in entry for sign in "/:@* ") or entry.replace(".", "").isdigit():
                    raise ValueError(
                        f"{entry!r} is no target to allow; write receiver.internal, 10.1.2.3 or 10.0.0.0/8"
                    ) from None
                names.add(entry.lower().rstrip("."))
        return cls(frozenset(names), tuple(networks))

    def why_refused(self, host: str, address: Address) -> str | None:
        """Return why nothing is sent to an address that `host` has; None: it may be."""
        if host.lower().rstrip(".") in self.names or any(address in network for network in self.networks):
            return None
        return _why_not_public(address)


def parse_target(url: str) -> Target:
    """Read a URL to send to.

    Raises:
        InvalidInput: it is none. The message does not show it: it may hold a key.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as exc:
        raise InvalidInput("the URL cannot be read; write https://receiver.example/path") from exc
    if (why := _why_no_target(url, parts)) is not None:
        raise InvalidInput(f"the URL {why}; write https://receiver.example/path")
    host = parts.hostname or ""
    try:
        encoded = host if ":" in host else host.encode("idna").decode()
    except UnicodeError as exc:
        raise InvalidInput("the URL names no host; write https://receiver.example/path") from exc
    return Target(url, parts.scheme, encoded, port or _PORTS[parts.scheme])


def _why_no_target(url: str, parts: SplitResult) -> str | None:
    if len(url) > MAX_URL_CHARS:
        return f"has {len(url):,} characters, more than {MAX_URL_CHARS:,}"
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        return "has signs that have to be percent-encoded"
    if parts.scheme not in _PORTS:
        return "begins with neither https:// nor http://"
    if parts.username is not None or parts.password is not None:
        return "has a user name; receivers know this service by its signatures"
    if not parts.hostname or "%" in parts.hostname:  # `%`: a zone of an IPv6 address
        return "names no host"
    if parts.fragment:
        return "has a fragment, which is never sent"
    return None


def parse_address(text: str) -> Address | None:
    """Return the address that a text is, or None."""
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _why_not_public(address: Address) -> str | None:
    for network, why in _NETWORKS:
        if address in network:
            return why
    if address.is_loopback:
        return "loopback"
    if address.is_link_local:
        return "link-local, as the metadata of clouds is"
    if address.is_multicast:
        return "multicast"
    if address.version == 6 and address not in _UNICAST:
        return "private"
    if address.is_unspecified or address.is_reserved or not address.is_global:
        return "private"
    return None
