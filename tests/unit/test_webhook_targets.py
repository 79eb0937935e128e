"""Which addresses are sent to: a table of those that are not, and what an operator may allow."""

import pytest

from apt_jobs.errors import InvalidInput
from apt_jobs.webhook_targets import TargetRules, parse_address, parse_target

_REFUSED = """
0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 100.64.0.1 100.100.100.200 100.127.255.255 127.0.0.1 127.0.0.53
127.255.255.254 168.63.129.16 169.254.0.1 169.254.169.254 169.254.170.2 172.16.0.1 172.31.255.255 192.0.0.1
192.0.0.192 192.0.2.1 192.88.99.1 192.168.0.1 192.168.255.255 198.18.0.1 198.19.255.255 198.51.100.1
203.0.113.1 224.0.0.1 224.0.0.251 239.255.255.250 240.0.0.1 255.255.255.255 :: ::1 ::127.0.0.1 ::8.8.8.8
::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 ::ffff:8.8.8.8 ::ffff:0:7f00:1 64:ff9b::7f00:1
64:ff9b::a9fe:a9fe 64:ff9b:1::a00:1 100::1 2001::1 2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:db8::1
2002:7f00:1:: 2002:a9fe:a9fe::1 fc00::1 fd00::1 fd00:ec2::254 fd20:ce::254 fdff:ffff::1 fe80::1
fe80::a9fe:a9fe febf::1 fec0::1 ff02::1 ff05::2 ff0e::1 3fff::1 5f00::1 4000::1
"""
_PUBLIC = """
1.1.1.1 8.8.8.8 93.184.216.34 172.15.0.1 172.32.0.1 192.167.0.1 223.255.255.254 2606:4700::1111 2a00:1450::1
"""
REFUSED, PUBLIC = _REFUSED.split(), _PUBLIC.split()
NOTHING = TargetRules.parse(())


def test_the_table_has_enough_addresses() -> None:
    assert len(set(REFUSED)) >= 50


@pytest.mark.parametrize("text", REFUSED)
def test_an_address_that_is_not_public_is_refused(text: str) -> None:
    address = parse_address(text)
    assert address is not None
    assert NOTHING.why_refused("receiver.example", address)


@pytest.mark.parametrize("text", PUBLIC)
def test_a_public_address_is_not(text: str) -> None:
    address = parse_address(text)
    assert address is not None
    assert NOTHING.why_refused("receiver.example", address) is None


def test_an_operator_allows_names_addresses_and_networks() -> None:
    rules = TargetRules.parse(("10.0.0.0/8", "127.0.0.1", "fd00::/8", "Receiver.internal."))
    inner = ["10.1.2.3", "127.0.0.1", "fd00::1", "127.0.0.2", "::ffff:10.1.2.3", "169.254.169.254"]
    addresses = [parse_address(text) for text in inner]
    why = [rules.why_refused("x.example", address) is None for address in addresses if address is not None]
    assert why == [True, True, True, False, False, False]
    local = parse_address("127.0.0.2")
    assert local is not None
    assert rules.why_refused("receiver.INTERNAL", local) is None


@pytest.mark.parametrize("entry", ["", "http://x", "a:80", "*.example", "10.0.0.1/8", "300.1.1.1", "a b", "user@x"])
def test_what_is_no_target_to_allow_is_refused(entry: str) -> None:
    with pytest.raises(ValueError, match="no target to allow"):
        TargetRules.parse((entry,))


@pytest.mark.parametrize(
    "url",
    [
        "", "receiver.example", "//receiver.example/", "ftp://receiver.example/", "file:///etc/passwd", "gopher://x/",
        "https://", "https:///path", "https://user@receiver.example/", "https://:pw@receiver.example/", "https://[::1",
        "https://receiver.example:0x50/", "https://receiver.example:99999/", "https://receiver.example/#part",
        "https://receiver.example/a b", "https://receiver.example\\@other.example/",
        "https://receiver.example/\r\nx: y",
        "https://[fe80::1%25eth0]/", "https://r\u00e9ceiver.example/", "https://" + "a" * 70 + ".example/",
        "https://receiver.example/" + "x" * 2_000,
    ],
)  # fmt: skip
def test_what_is_no_url_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(InvalidInput, match="write https://"):
        parse_target(url)


def test_a_url_is_read() -> None:
    assert parse_target("https://Receiver.example/x?y=1").host == "receiver.example"
    assert parse_target("https://receiver.example/").port == 443
    assert parse_target("http://[2606:4700::1111]:8080/").host == "2606:4700::1111"
