"""A web process bound to all addresses, to one, to a name, to port 80: who asks it by which name is answered."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from apt_jobs.db.access import Role, create_key
from apt_jobs.db.engine import Database
from apt_jobs.settings import Settings
from tests.conftest import START_DEADLINE_S, some_port


def addresses_of_this_machine() -> list[str]:
    found = psutil.net_if_addrs().values()
    return [one.address for addresses in found for one in addresses if one.family == socket.AF_INET]


@contextmanager
def web(data_dir: Path, database_url: str, redis_url: str, host: str, port: int) -> Iterator[tuple[Settings, str]]:
    """`apt-jobs web`, once it answers at the address that its settings call its own, and a key for it."""
    environment = {
        **os.environ,
        "APT_JOBS_DATA_DIR": str(data_dir),
        "APT_JOBS_DATABASE_URL": database_url,
        "APT_JOBS_REDIS_URL": redis_url,
        "APT_JOBS_HOST": host,
        "APT_JOBS_PORT": str(port),
    }
    settings = Settings(data_dir=data_dir, host=host, port=port)
    database = Database(database_url)
    with database.write() as session:
        key = create_key(session, "test", Role.ADMIN)
    database.dispose()
    log = data_dir.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, "-m", "apt_jobs", "web"], env=environment, stderr=output)
    try:
        deadline = time.monotonic() + START_DEADLINE_S
        while get(f"{settings.own_url}/readyz") != 200:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield settings, key
    finally:
        process.terminate()
        process.wait(60)


def get(url: str, **headers: str) -> int | None:
    with suppress(httpx.HTTPError):
        return httpx.get(url, headers=headers, trust_env=False, timeout=20.0).status_code
    return None


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_all_addresses_of_the_machine_are_answered(tmp_path: Path, sqlite_url: str, valkey_url: str, host: str) -> None:
    with web(tmp_path / "data", sqlite_url, valkey_url, host, some_port()) as (settings, key):
        authorization = f"Bearer {key}"
        for address in ("localhost", *addresses_of_this_machine()):
            site = f"http://{address}:{settings.port}"
            assert get(f"{site}/api/jobs", authorization=authorization) == 200
            if address in ("127.0.0.1", "localhost"):
                assert get(f"{site}/api/jobs", authorization=authorization, origin=site) == 200
            assert get(f"{site}/api/jobs", authorization=authorization, host="evil.example") == 403
            assert get(f"{site}/api/jobs", authorization=authorization, host="10.9.8.7:1") == 403
            assert get(f"{site}/api/jobs", authorization=authorization, origin="http://10.9.8.7:1") == 403
            assert get(f"{site}/readyz", host="10.9.8.7") == 200


@pytest.mark.parametrize(
    ("host", "port", "expected"),
    [
        ("localhost", None, "http://localhost"),
        ("127.0.0.3", None, "http://127.0.0.3"),
        pytest.param(
            "127.0.0.3",
            80,
            "http://127.0.0.3",
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root binds to port 80"),
        ),
    ],
)
def test_one_address_is_answered_as_browsers_write_it(
    tmp_path: Path, sqlite_url: str, valkey_url: str, host: str, port: int | None, expected: str
) -> None:
    bound = port or some_port()
    with web(tmp_path / "data", sqlite_url, valkey_url, host, bound) as (settings, key):
        assert settings.own_url == (expected if port == 80 else f"{expected}:{bound}")
        assert get(f"{settings.own_url}/api/jobs", authorization=f"Bearer {key}", origin=settings.own_url) == 200
        answer = httpx.get(f"{settings.own_url}/docs/", headers={"authorization": f"Bearer {key}"}, trust_env=False)
        assert (answer.status_code, answer.headers["location"]) == (307, "/docs")
