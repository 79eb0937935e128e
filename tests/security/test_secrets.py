"""Secrets: hashed at rest, and nowhere in logs, events, answers, tracebacks or what the broker holds."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import redis
from pydantic import ValidationError
from websockets.sync.client import connect

from apt_jobs.client.client import Client
from apt_jobs.db.access import Role, create_key
from apt_jobs.db.engine import Database
from apt_jobs.errors import AptJobsError, Unavailable
from apt_jobs.settings import Settings
from apt_jobs.web.guard import session_cookie
from tests.security.attacked import AttackedWeb, attacked_web

CANARY = "c4n4ry-0f-4-p4ssw0rd"


def test_no_secret_is_left_anywhere(valkey_server_url: str, tmp_path: Path) -> None:
    with attacked_web(tmp_path, valkey_server_url) as web:
        secrets = _use_every_secret(web)
        broker = redis.Redis.from_url(valkey_server_url)
        kept = b"".join(broker.dump(key) or b"" for key in broker.scan_iter())
        broker.close()
    assert len(secrets) >= 10
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"web.log", "apt_jobs.sqlite3"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        assert [name for name, secret in secrets.items() if secret.encode() in content] == [], path
    assert [name for name, secret in secrets.items() if secret.encode() in kept] == []
    assert "/api/jobs" in (tmp_path / "web.log").read_text()  # the log was written at all


def _use_every_secret(web: AttackedWeb) -> dict[str, str]:
    """Send every kind of secret by every way; returns them."""
    secrets = {f"key of {role}": key.split("_")[2] for role, key in web.keys.items()}
    secrets |= {f"{name} key": key for name, key in web.dead_keys.items() if len(key) > 20}
    for role, key in web.keys.items():
        with web.client(key) as client:
            client.get("/api/jobs")
            client.get("/api/nothing", params={"key": key})
            client.post("/api/jobs", json={"kind": "train", "labels": {"a": "b"}})
            client.post("/api/jobs", json={"kind": "train", "surprise": "x"})
            listed = client.get("/api/keys")
            assert role is not Role.ADMIN or listed.json()["data"]
            assert key.split("_")[2] not in listed.text
        headers = {"authorization": f"Bearer {key}"}
        with connect(f"ws://{web.host}/ws/jobs/nothing", additional_headers=headers, proxy=None):
            pass
    for key in web.dead_keys.values():
        with web.client(key) as client:
            client.get("/api/jobs")
    secrets["login token"], secrets["unused login token"] = web.login_token(), web.login_token()
    secrets["wrong login token"] = CANARY
    with web.client(None) as browser:
        browser.get("/login", params={"token": CANARY})
        browser.get("/login", params={"token": secrets["login token"]})
        secrets["browser session"] = browser.cookies[session_cookie(web.settings)]
        browser.get("/api/jobs")
        cookie = f"{session_cookie(web.settings)}={secrets['browser session']}"
        browser.get("/api/jobs/broken%00", headers={"cookie": cookie})
    return secrets


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://user:{CANARY}@127.0.0.1:1/nothing",
        f"postgresql://user:{CANARY}@[::1/nothing",
        f"mysql://user:{CANARY}@127.0.0.1/nothing",
        f"://{CANARY}",
    ],
)
def test_a_database_url_is_never_shown_with_its_password(url: str) -> None:
    with pytest.raises(AptJobsError) as caught:
        Database(url).ping()
    error: BaseException | None = caught.value
    while error is not None:
        assert CANARY not in f"{error!r}{error}"
        error = error.__cause__


@pytest.mark.parametrize("command", [["web"], ["migrate"], ["keys", "list"], ["worker", "train", "--gpus", ""]])
def test_commands_that_fail_do_not_print_passwords(tmp_path: Path, command: list[str]) -> None:
    environment = {
        **os.environ,
        "APT_JOBS_DATA_DIR": str(tmp_path),
        "APT_JOBS_DATABASE_URL": f"postgresql://user:{CANARY}@127.0.0.1:1/nothing",
        "APT_JOBS_REDIS_URL": f"redis://:{CANARY}@127.0.0.1:1/0",
        "APT_JOBS_LEASE_S": "1000" if command[0] in ("migrate", "keys") else "5",  # or: less than two heartbeats
        "APT_JOBS_LOG_LEVEL": "DEBUG",
    }
    done = subprocess.run(
        [sys.executable, "-m", "apt_jobs", *command], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2, done.stderr
    assert CANARY not in done.stdout + done.stderr
    assert re.search(r"APT_JOBS_LEASE_S=5|database does not answer", done.stderr)


def test_a_broker_that_refuses_is_logged_without_its_password(tmp_path: Path) -> None:
    with attacked_web(tmp_path, f"redis://:{CANARY}@127.0.0.1:1/0") as web, web.client(web.keys[Role.ADMIN]) as client:
        assert client.post("/api/jobs", json={"kind": "train"}).status_code == 202
        log = web.log()
    assert "live wire lost" in log
    assert CANARY not in log


def test_settings_hide_what_is_secret() -> None:
    settings = Settings(redis_url=f"redis://:{CANARY}@h/0", database_url=f"postgresql://u:{CANARY}@h/d")
    assert CANARY not in f"{settings!r}{settings}{settings.model_dump_json()}"
    assert settings.redis.count(CANARY) == settings.database.count(CANARY) == 1


@pytest.mark.parametrize(
    "url",
    [
        *("redis://10.0.0.1", "redis://10.0.0.1:6379/0", "redis://user@10.0.0.1", "redis://:@10.0.0.1"),
        *("rediss://redis.example", "REDIS://redis.example", "redis://0.0.0.0", "redis://127.0.0.1.evil.example"),
        *("redis://localhost@evil.example", "redis:///0?host=10.0.0.1", "redis://[fe80::1]", "redis://"),
        *("valkey://127.0.0.1", "amqp://guest:guest@127.0.0.1", "sentinel://10.0.0.1", "10.0.0.1:6379", ""),
    ],
)
def test_a_redis_without_a_password_off_loopback_is_refused(url: str) -> None:
    with pytest.raises(ValidationError, match="APT_JOBS_REDIS_URL"):
        Settings(redis_url=url)


@pytest.mark.parametrize(
    "url",
    ["redis://127.0.0.1", "redis://[::1]:6379/3", "redis://:x@10.0.0.1", "rediss://u:x@h/0", "unix:///tmp/x.sock?db=1"],
)
def test_a_redis_on_loopback_or_with_a_password_is_taken(url: str) -> None:
    assert Settings(redis_url=url).redis == url


def test_a_refused_setting_is_not_shown_with_the_others() -> None:
    with pytest.raises(ValidationError) as caught:
        Settings(redis_url=f"redis://:{CANARY}@h/0", lease_s=4, heartbeat_s=3)
    assert CANARY not in f"{caught.value}{caught.value!r}"
    with pytest.raises(ValidationError) as caught:
        Settings(redis_url=f"redis://{CANARY}@h/0")
    assert CANARY not in f"{caught.value}{caught.value!r}"


def test_the_client_shows_no_key(tmp_path: Path) -> None:
    (tmp_path / "local.json").write_text(json.dumps({"url": "http://127.0.0.1:1", "api_key": CANARY}))
    with Client(data_dir=tmp_path) as client:
        with pytest.raises(Unavailable) as caught:
            client.get("job_x")
        assert CANARY not in f"{client!r}{caught.value}{caught.value.__cause__!r}"


def test_a_key_is_stored_as_its_hash(sqlite_database: Database) -> None:
    with sqlite_database.write() as session:
        key = create_key(session, "test", Role.VIEWER)
    path = sqlite_database.url.database
    assert path is not None
    stored = b"".join(file.read_bytes() for file in Path(path).parent.glob("*.sqlite3*"))
    assert key.split("_")[1].encode() in stored
    assert key.split("_")[2].encode() not in stored


def test_an_unexpected_fault_tells_the_caller_nothing(web: AttackedWeb) -> None:
    with web.client(web.keys[Role.ADMIN]) as client:
        for path in ("/api/jobs/%00", "/api/jobs/" + "x" * 5000, "/api/checkpoints/%ed%a0%80"):
            answer = client.get(path)
            assert answer.status_code in (400, 404), answer.text
            assert "Traceback" not in answer.text
            assert str(web.settings.root) not in answer.text
