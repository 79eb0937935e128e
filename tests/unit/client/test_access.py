"""Address and key: what may be one, what is said of what may not, and that no error shows a key."""

import json
from pathlib import Path

import pytest

from apt_jobs.client.access import find_access, require_header
from apt_jobs.errors import InvalidInput, Unavailable

KEY = "apt_k1_verysecret"
URL = "https://jobs.example.com"


def local_service(folder: Path, url: str = "http://127.0.0.1:8000") -> Path:
    (folder / "local.json").write_text(json.dumps({"url": url, "api_key": "apt_local_key"}))
    return folder


@pytest.mark.parametrize("key", [f"{KEY}\n", f"  {KEY}\t", f"\r\n{KEY}\r\n", f"\u00a0{KEY}"])
def test_white_space_around_a_key_is_stripped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    assert find_access(URL, key, tmp_path).api_key == KEY
    monkeypatch.setenv("APT_JOBS_API_KEY", key)
    monkeypatch.setenv("APT_JOBS_URL", f" {URL}/\n")
    access = find_access(None, None, tmp_path)
    assert (access.url, access.headers) == (URL, {"authorization": f"Bearer {KEY}"})


@pytest.mark.parametrize("wrong", ["\n", "\x00", "\x1b", " ", "\x7f", "\u00fc", "\u2028", "\ud800"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(InvalidInput, match="the API key has a character") as raised:
        find_access(URL, f"apt_k1_very{wrong}secret", tmp_path)
    assert "secret" not in str(raised.value)


def test_a_key_is_in_no_repr(tmp_path: Path) -> None:
    assert KEY not in repr(find_access(URL, KEY, tmp_path))


@pytest.mark.parametrize(
    "url",
    [
        "jobs.example.com",
        "localhost:8000",
        "ftp://jobs.example.com",
        "http://",
        "http://jobs.example.com:0",
        "http://jobs.example.com:99999",
        "http://[::1",
        "http://jobs.example.com/?key=1",
        "http://jobs.example.com/#jobs",
        "http://jobs example.com",
        "http://jobs.example.com/\x1b[2J",
    ],
)
def test_an_address_that_is_none_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(InvalidInput, match="service's address"):
        find_access(url, KEY, tmp_path)


def test_a_password_in_an_address_is_refused_and_not_shown(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="APT_JOBS_API_KEY") as raised:
        find_access("https://me:pa55word@jobs.example.com", KEY, tmp_path)
    assert "pa55word" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "is_loopback", "websocket_url"),
    [
        ("http://127.0.0.1:8000", True, "ws://127.0.0.1:8000"),
        ("http://127.9.9.9", True, "ws://127.9.9.9"),
        ("http://[::1]:8000/", True, "ws://[::1]:8000"),
        ("https://localhost", True, "wss://localhost"),
        ("http://10.0.0.1:80", False, "ws://10.0.0.1:80"),
        ("https://http.example.com/http/", False, "wss://http.example.com/http"),
        ("https://127.0.0.1.example.com", False, "wss://127.0.0.1.example.com"),
    ],
)
def test_an_address_says_where_it_is(tmp_path: Path, url: str, is_loopback: bool, websocket_url: str) -> None:
    access = find_access(url, KEY, tmp_path)
    assert (access.is_loopback, access.websocket_url) == (is_loopback, websocket_url)


def test_what_up_wrote_is_taken(tmp_path: Path) -> None:
    access = find_access(None, None, local_service(tmp_path))
    assert (access.url, access.api_key) == ("http://127.0.0.1:8000", "apt_local_key")


def test_the_key_that_up_wrote_is_sent_to_this_machine_only(tmp_path: Path) -> None:
    local_service(tmp_path)
    assert find_access("http://localhost:9000", None, tmp_path).api_key == "apt_local_key"
    with pytest.raises(Unavailable, match="no API key for"):
        find_access(URL, None, tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", '{"url": 1, "api_key": []}', "[" * 100_000, "\xff"])
def test_a_damaged_file_of_up_is_no_service(tmp_path: Path, content: str) -> None:
    (tmp_path / "local.json").write_text(content, "latin-1")
    with pytest.raises(Unavailable, match="apt-jobs up"):
        find_access(None, None, tmp_path)


@pytest.mark.parametrize("value", ["a\nb", "a\r\nx: y", "\x00", "\u00fc", " a", "a ", "\x7f"])
def test_a_header_that_http_cannot_carry_is_refused(value: str) -> None:
    with pytest.raises(InvalidInput, match="visible ASCII"):
        require_header(value, "the idempotency key")
