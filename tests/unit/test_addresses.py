"""The address to bind to, those to connect to, and what a `Host` header may say."""

from collections.abc import Callable

import pytest
from pydantic import ValidationError

from apt_jobs.addresses import arrival_hosts, connect_host, is_loopback, is_wildcard
from apt_jobs.settings import Settings
from apt_jobs.web.guard import allowed_hosts


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "::0", "0:0:0:0:0:0:0:0"])
def test_all_addresses_are_known_in_every_spelling(host: str) -> None:
    assert is_wildcard(host)
    assert connect_host(host) in ("127.0.0.1", "::1")


@pytest.mark.parametrize(
    ("host", "expected"), [("127.0.0.1", True), ("127.9.9.9", True), ("LOCALHOST", True), ("10.0.0.5", False)]
)
def test_loopback_is_known(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    ("fields", "own"),
    [
        ({"host": "0.0.0.0"}, "http://127.0.0.1:8000"),
        ({"host": "::"}, "http://[::1]:8000"),
        ({"host": "[::1]", "port": 80}, "http://[::1]"),
        ({"host": "localhost"}, "http://localhost:8000"),
        ({"host": "192.168.1.5"}, "http://192.168.1.5:8000"),
        ({"host": "gpu-a", "port": 443}, "http://gpu-a:443"),
        ({"root_path": "/apt/"}, "http://127.0.0.1:8000/apt"),
    ],
)
def test_the_own_address_is_one_to_connect_to(
    make_settings: Callable[..., Settings], fields: dict[str, object], own: str
) -> None:
    assert make_settings(**fields).own_url == own


@pytest.mark.parametrize(
    ("fields", "hosts"),
    [
        ({}, {"127.0.0.1:8000", "localhost:8000", "[::1]:8000"}),
        ({"host": "::"}, {"127.0.0.1:8000", "localhost:8000", "[::1]:8000"}),
        ({"host": "10.0.0.5", "port": 80}, {"10.0.0.5:80", "10.0.0.5"}),
        ({"host": "10.0.0.5", "allowed_hosts": ("Jobs.Example:80",)}, {"10.0.0.5:8000", "jobs.example"}),
        ({"host": "10.0.0.5", "allowed_hosts": ("b:443",), "https": True}, {"10.0.0.5:8000", "b"}),
    ],
)
def test_hosts_that_are_answered(
    make_settings: Callable[..., Settings], fields: dict[str, object], hosts: set[str]
) -> None:
    assert allowed_hosts(make_settings(**fields)) == hosts


def test_the_address_of_arrival_is_answered_where_all_addresses_are_bound() -> None:
    assert arrival_hosts("0.0.0.0", ("10.0.0.5", 8000)) == {"10.0.0.5:8000"}
    assert arrival_hosts("::", ("::ffff:10.0.0.5", 80)) == {"10.0.0.5:80", "10.0.0.5"}
    assert arrival_hosts("::", ("fd00::5", 8000)) == {"[fd00::5]:8000"}
    assert arrival_hosts("127.0.0.1", ("127.0.0.1", 8000)) == set()
    assert arrival_hosts("0.0.0.0", ("/run/apt.sock", None)) == set()
    assert arrival_hosts("0.0.0.0", None) == set()


@pytest.mark.parametrize(
    "fields",
    [
        {"host": ""},
        {"host": "http://0.0.0.0"},
        {"host": "127.0.0.1:8000"},
        {"host": "0"},
        {"root_path": "apt"},
        {"root_path": "/a pt"},
        {"root_path": "/a/../b"},
        {"root_path": '/"><script>'},
        {"root_path": "//evil.example"},
        {"allowed_hosts": ("https://jobs.example",)},
        {"allowed_hosts": ("*",)},
        {"trusted_proxies": ("*",)},
        {"trusted_proxies": ("10.0.0.1/8",)},
    ],
)
def test_addresses_that_cannot_be_meant_are_refused(
    make_settings: Callable[..., Settings], fields: dict[str, object]
) -> None:
    with pytest.raises(ValidationError, match="write"):
        make_settings(**fields)
