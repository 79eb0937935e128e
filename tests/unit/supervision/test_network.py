"""On which address and interface a training over several nodes listens."""

import socket
from typing import Any

import psutil
import pytest

from apt_jobs.errors import Unavailable
from apt_jobs.settings import Settings
from apt_jobs.supervision.network import addresses_of, interface_towards, listen_address, rendezvous_address


def settings(**fields: Any) -> Settings:
    return Settings(_env_file=None, **fields)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.2"])
def test_the_head_listens_on_its_own_address_of_the_named_host(host: str) -> None:
    assert listen_address(settings(rendezvous_host=host)) in ("127.0.0.1", "::1", "127.0.0.2")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "0"])
def test_all_addresses_are_no_address_to_listen_on(host: str) -> None:
    with pytest.raises(Unavailable, match="names all addresses"):
        listen_address(settings(rendezvous_host=host))


def test_another_machines_address_needs_an_interface() -> None:
    with pytest.raises(Unavailable, match=r"no address of this machine.*APT_JOBS_NETWORK_INTERFACE"):
        listen_address(settings(rendezvous_host="203.0.113.7"))
    named = settings(rendezvous_host="203.0.113.7", network_interface="lo")
    assert listen_address(named) == "127.0.0.1"
    assert rendezvous_address(named).startswith("203.0.113.7:")


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a" * 70 + ".invalid", "..", "x\ny"])
def test_a_host_that_cannot_be_resolved_is_named(host: str) -> None:
    with pytest.raises(Unavailable, match="cannot be resolved"):
        listen_address(settings(rendezvous_host=host))


@pytest.mark.parametrize("interface", ["no-such-0", "", "l", "=lo", "^lo", "lo,eth0"])
def test_an_interface_that_is_not_there_is_named_with_those_that_are(interface: str) -> None:
    with pytest.raises(Unavailable, match=r"is not on this machine, which has: .*lo"):
        listen_address(settings(network_interface=interface))


def test_the_interface_of_an_address_is_found() -> None:
    assert interface_towards("127.0.0.1:9", 0) == "lo"
    assert interface_towards("[::1]:9", 0) == "lo"
    assert interface_towards("localhost:9", 1) == "lo"
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family == socket.AF_INET and not entry.address.startswith("127."):
                assert interface_towards(f"{entry.address}:9", 0) == name
                assert entry.address in addresses_of(name)


def test_a_free_port_is_chosen_and_a_named_one_kept() -> None:
    host, _, port = rendezvous_address(settings()).rpartition(":")
    assert host == "127.0.0.1"
    assert 10_000 <= int(port) < 32_000
    assert rendezvous_address(settings(rendezvous_port=4567)) == "127.0.0.1:4567"
    assert rendezvous_address(settings(rendezvous_host="::1")).startswith("[::1]:")
