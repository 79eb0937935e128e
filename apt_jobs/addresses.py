"""The address to bind to, the addresses to connect to, and the values of `Host` that name this service.

These are three things: a service that binds to `0.0.0.0` is reached at `127.0.0.1` and at each address of its machine.
"""

import ipaddress
from collections.abc import Iterable

LOOPBACK_HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})
_DEFAULT_PORTS = {"http": 80, "https": 443}


def is_wildcard(host: str) -> bool:
    """Return whether binding to `host` means all addresses of the machine, in whichever spelling."""
    address = _parse(host)
    return address is not None and address.is_unspecified


def is_loopback(host: str) -> bool:
    """Return whether only processes of this machine reach what binds to `host`."""
    address = _parse(host)
    return host.lower() in LOOPBACK_HOSTS or (address is not None and address.is_loopback)


def connect_host(host: str) -> str:
    """Return where this machine's processes connect to what binds to `host`."""
    if not is_wildcard(host):
        return host
    return "::1" if ":" in host else "127.0.0.1"


def http_origin(host: str, port: int, scheme: str = "http") -> str:
    """`http://host[:port]` as browsers write it: the scheme's own port is left out."""
    return f"{scheme}://{_bracketed(host)}" + ("" if port == _DEFAULT_PORTS[scheme] else f":{port}")


def normalized_host(value: str, scheme: str) -> str:
    """Return a value of `Host` in the one form that is compared: lower case, without the scheme's own port."""
    return value.strip().lower().removesuffix(f":{_DEFAULT_PORTS[scheme]}")


def own_hosts(host: str, port: int) -> frozenset[str]:
    """Return values of `Host` that name what binds to `host` and `port`, however a client shortens them."""
    names = {connect_host(host).lower()}
    if is_loopback(host) or is_wildcard(host):
        names |= LOOPBACK_HOSTS
    return _values(names, port)


def arrival_hosts(bind_host: str, server: tuple[str, int | None] | None) -> frozenset[str]:
    """Return values of `Host` that name the very address at which a connection arrived, where all addresses are bound.

    An address cannot be rebound to another site, as a name can, so it needs no entry in APT_JOBS_ALLOWED_HOSTS.
    """
    if server is None or server[1] is None or not is_wildcard(bind_host):
        return frozenset()
    address = _parse(server[0])
    if address is None:
        return frozenset()
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None  # IPv4 on an IPv6 socket
    return _values({str(mapped or address)}, server[1])


def _values(names: Iterable[str], port: int) -> frozenset[str]:
    bracketed = {_bracketed(name) for name in names}
    whole = {f"{name}:{port}" for name in bracketed}
    return frozenset(whole | bracketed if port in _DEFAULT_PORTS.values() else whole)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _parse(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
