"""On which address and interface the ranks of an attempt listen: loopback for one node, the named one for several.

An address is never a wildcard: what listens during a training has no password.
"""

import ipaddress
import random
import socket

import psutil

from apt_jobs.errors import Unavailable
from apt_jobs.settings import Settings

LOOPBACK_ADDRESS = "127.0.0.1"
LOOPBACK_INTERFACE = "lo"
RENDEZVOUS_PORTS = range(10_000, 32_000)  # below those of outgoing connections (ip_local_port_range of Linux)
MAX_TRIES = 100


def rendezvous_address(settings: Settings) -> str:
    """Return `host:port` for the nodes of an attempt, the port free at this moment.

    torchrun opens it seconds later, and nodes try it before: the kernel must not give it to anybody meanwhile, so it is
    none of those that outgoing connections get.

    Raises:
        Unavailable: this machine has not the address that the settings name, or no such port is free.
    """
    host = settings.rendezvous_host
    name = f"[{host}]" if ":" in host else host
    address = listen_address(settings)
    if settings.rendezvous_port:
        return f"{name}:{settings.rendezvous_port}"
    for port in random.SystemRandom().sample(RENDEZVOUS_PORTS, MAX_TRIES):
        if _can_bind(address, port):
            return f"{name}:{port}"
    raise Unavailable(f"no free port on {address} for the nodes of the training to meet")


def listen_address(settings: Settings) -> str:
    """Return the address of this machine, the head, at which its nodes meet.

    It is the one of `rendezvous_host` that is this machine's (on `network_interface`, where that is set); a machine
    that is reached through another's address (NAT) has to name the interface.

    Raises:
        Unavailable: there is none; the message says which setting to change.
    """
    host, interface = settings.rendezvous_host, settings.network_interface
    resolved = _resolve(host)
    if any(ipaddress.ip_address(address).is_unspecified for address in resolved):
        raise Unavailable(f"APT_JOBS_RENDEZVOUS_HOST={host} names all addresses; name the one that nodes reach")
    if interface is None:
        for address in resolved:
            if _can_bind(address, 0):
                return address
        raise Unavailable(
            f"APT_JOBS_RENDEZVOUS_HOST={host} is no address of this machine ({', '.join(resolved)}); name one that is, "
            "or the interface to listen on: APT_JOBS_NETWORK_INTERFACE"
        )
    own = addresses_of(interface)
    return next((address for address in resolved if address in own), own[0])


def addresses_of(interface: str) -> list[str]:
    """Return the addresses of an interface of this machine, IPv4 first.

    Raises:
        Unavailable: there is no such interface, or it has no address.
    """
    interfaces = psutil.net_if_addrs()
    if interface not in interfaces:
        known = ", ".join(sorted(interfaces))
        raise Unavailable(f"APT_JOBS_NETWORK_INTERFACE={interface} is not on this machine, which has: {known}")
    found = interfaces[interface]
    addresses = [entry.address for entry in found if entry.family == socket.AF_INET]
    addresses += [entry.address for entry in found if entry.family == socket.AF_INET6 and "%" not in entry.address]
    if not addresses:
        raise Unavailable(f"APT_JOBS_NETWORK_INTERFACE={interface} has no address")
    return addresses


def interface_towards(rendezvous: str, node_rank: int) -> str | None:
    """Return the interface on which a node's ranks listen when none is named; None: it cannot be told.

    On the head it is the one with the address of the rendezvous, elsewhere the one that leads there. Nothing is sent.
    """
    host, _, port = rendezvous.rpartition(":")
    for address in _resolve(host.strip("[]")):
        try:
            with socket.socket(_family(address), socket.SOCK_DGRAM) as probe:
                probe.connect((address, int(port)))
                own = probe.getsockname()[0] if node_rank else address
        except OSError:
            continue
        if (interface := _interface_with(own)) is not None:
            return interface
    return None


def _interface_with(address: str) -> str | None:
    if ipaddress.ip_address(address).is_loopback:
        return LOOPBACK_INTERFACE
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return name
    return None


def _resolve(host: str) -> list[str]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        raise Unavailable(f"APT_JOBS_RENDEZVOUS_HOST={host} cannot be resolved: {exc}") from exc
    return list(dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in found))


def _can_bind(address: str, port: int) -> bool:
    with socket.socket(_family(address), socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
