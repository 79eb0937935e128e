"""What settings are made of others."""

from collections.abc import Callable

import pytest

from apt_jobs.settings import Settings


@pytest.mark.parametrize(
    ("fields", "own", "of_browsers"),
    [
        ({}, "http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ({"host": "::1", "port": 81}, "http://[::1]:81", "http://[::1]:81"),
        ({"host": "0.0.0.0", "allowed_hosts": ("localhost:8000",)}, "http://127.0.0.1:8000", "http://localhost:8000"),
        ({"allowed_hosts": ("jobs.example", "b"), "https": True}, "http://127.0.0.1:8000", "https://jobs.example"),
    ],
)
def test_addresses_follow_from_the_settings(
    make_settings: Callable[..., Settings], fields: dict[str, object], own: str, of_browsers: str
) -> None:
    settings = make_settings(**fields)
    assert (settings.own_url, settings.browser_url) == (own, of_browsers)
