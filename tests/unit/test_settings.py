"""What settings are made of others."""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import redis
from sqlalchemy import make_url

from apt_jobs.job_queue import make_celery
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


@pytest.mark.parametrize("name", ["a b", "a#b", "100%", "%41", "a?b=c", "a&b", "ü", "a@b:c", "a+b", "[a]", "it's"])
def test_the_urls_of_a_directory_lead_to_it_whatever_its_name(
    make_settings: Callable[..., Settings], name: str
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short:  # long ones have their socket elsewhere
        settings = make_settings(data_dir=Path(short) / name)
        assert make_url(settings.database).database == str(settings.root / "apt_jobs.sqlite3")
        wanted = str(settings.root / "valkey" / "valkey.sock")
        assert redis.Redis.from_url(settings.redis).connection_pool.connection_kwargs["path"] == wanted
        refused = pytest.raises(redis.ConnectionError, match=re.escape(f" {wanted}."))  # nobody listens there
        with make_celery(settings).connection_for_write() as connection, refused:
            connection.transport.establish_connection()  # `channel` would try twice, two seconds apart
