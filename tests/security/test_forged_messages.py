"""Messages that a stranger with access to the broker would send: none runs anything, and the worker goes on."""

import base64
import json
import os
import pickle
import subprocess
import sys
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from pydantic import SecretStr

from apt_jobs.db.engine import Database
from apt_jobs.db.jobs import get_job, insert_job
from apt_jobs.db.upgrade import upgrade_database
from apt_jobs.db.workers import list_workers
from apt_jobs.job_queue import TASK_NAME, WakeUpPublisher, broker_queue, make_celery
from apt_jobs.jobs.ids import new_job_id
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.settings import Settings

DEADLINE_S = 120.0
KEY = f"apt:{broker_queue('train')}"  # the broker's list of wake-ups


class Worker:
    """A training worker of its own, and what it left in its log."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.canary = settings, folder / "canary"
        self.database = Database(settings.database)
        upgrade_database(self.database)
        self.log_file = folder / "worker.log"
        environment = {
            **os.environ,
            "APT_JOBS_DATA_DIR": str(settings.root),
            "APT_JOBS_REDIS_URL": settings.redis,
            "APT_JOBS_HEARTBEAT_S": "0.5",
        }
        with self.log_file.open("wb") as log:
            command = [sys.executable, "-m", "apt_jobs", "worker", "train", "--gpus", "", "--name", "attacked"]
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        self.redis = redis.Redis.from_url(settings.redis)

    def push(self, *messages: bytes) -> None:
        for message in messages:
            self.redis.lpush(KEY, message)

    def until_nothing_waits(self) -> None:
        self.until(lambda: self.redis.llen(KEY) == 0)

    def until(self, what: Any) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not what():
            assert self.process.poll() is None, self.log_file.read_text()
            assert time.monotonic() < deadline, self.log_file.read_text()
            time.sleep(0.05)

    def still_works(self) -> None:
        """A job that starts from a checkpoint that was deleted is claimed and ended, without torch."""
        with self.database.write() as session:
            job_id = insert_job(session, TrainSpec(kind="train", base_model=f"ckpt_{0:020d}")).id
        wake_ups = WakeUpPublisher(make_celery(self.settings))
        wake_ups.wake_up("train")
        wake_ups.close()
        self.until(lambda: self._state(job_id) == "failed")

    def _state(self, job_id: str) -> str:
        with self.database.read() as session:
            return get_job(session, job_id).state


@pytest.fixture(scope="module")
def worker(valkey_server_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    folder = tmp_path_factory.mktemp("forged")
    client = redis.Redis.from_url(valkey_server_url)
    client.flushall()
    client.close()
    settings = Settings(data_dir=folder / "data", redis_url=SecretStr(valkey_server_url))
    started = Worker(settings, folder)
    try:
        started.until(lambda: _is_recorded(started.database))
        yield started
    finally:
        started.process.terminate()
        started.process.wait(DEADLINE_S)
        started.redis.close()
        started.database.dispose()


def _is_recorded(database: Database) -> bool:
    with database.read() as session:
        return bool(list_workers(session))


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._canary,)


def message(
    body: object = ([], {}, {}),
    *,
    task: object = TASK_NAME,
    raw_body: bytes | None = None,
    headers: dict[str, Any] | None = None,
    properties: dict[str, Any] | None = None,
    content_type: object = "application/json",
) -> bytes:
    """A message as Celery's protocol 2 has it over Redis, with whatever is to be wrong about it."""
    identity = str(uuid.uuid4())
    encoded = raw_body if raw_body is not None else json.dumps(body).encode()
    return json.dumps(
        {
            "body": base64.b64encode(encoded).decode(),
            "content-encoding": "utf-8",
            "content-type": content_type,
            "headers": {"lang": "py", "task": task, "id": identity, "root_id": identity, **(headers or {})},
            "properties": {
                "correlation_id": identity,
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": broker_queue("train")},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": identity,
                **(properties or {}),
            },
        }
    ).encode()


def hint(**kwargs: object) -> tuple[object, object, object]:
    return ([], kwargs, {"callbacks": None, "errbacks": None, "chain": None, "chord": None})


def forged(canary: Path) -> list[bytes]:
    """Messages of the right form with the wrong content."""
    evil = pickle.dumps(([], {"job_id": Trap(canary)}, {}))
    shell = {"task": "os.system", "args": [f"touch {canary}"], "kwargs": {}, "options": {}}
    job_id = new_job_id()
    return [
        message(raw_body=evil, content_type="application/x-python-serialize"),
        message(raw_body=evil, content_type="application/json"),
        message(
            raw_body=f"!!python/object/apply:os.system ['touch {canary}']".encode(), content_type="application/x-yaml"
        ),
        message(raw_body=b"\x80", content_type="application/x-msgpack"),
        message(raw_body=b"", content_type=None),
        message(raw_body=b"{", content_type="application/json"),
        message(hint(job_id=job_id), task="os.system"),
        message(([f"touch {canary}"], {}, {}), task="os.system"),
        message(([f"touch {canary}"], {}, {}), task="subprocess.run"),
        message(hint(job_id=job_id), task=None),
        message(hint(job_id=job_id), task=17),
        message(([shell, [[f"touch {canary}"]]], {}, {}), task="celery.map"),
        message(([shell, [[f"touch {canary}"]]], {}, {}), task="celery.starmap"),
        message(([[shell]], {}, {}), task="celery.chain"),
        message(([[shell], None, None], {}, {}), task="celery.group"),
        message(([[shell], shell], {}, {}), task="celery.chord"),
        message(hint(), task="celery.backend_cleanup"),
        message(hint(job_id={"__class__": "os"})),
        message(hint(job_id=["a"])),
        message(hint(job_id="x" * 10_000_000)),
        message(hint(job_id=job_id, command=f"touch {canary}")),
        message(hint(job_id=job_id, self="x")),
        message(([job_id, "more", "arguments"], {}, {})),
        message(
            ([], {"job_id": job_id}, {"callbacks": [shell], "errbacks": [shell], "chain": [shell], "chord": shell})
        ),
        message(hint(job_id=job_id), headers={"eta": "2999-01-01T00:00:00+00:00"}),
        message(hint(job_id=job_id), headers={"expires": "not a date"}),
        message(hint(job_id=job_id), headers={"timelimit": [0.001, 0.001], "retries": -5, "argsrepr": "{" * 100}),
        message(
            hint(job_id=job_id), headers={"group": {"a": 1}, "reply_to": 5}, properties={"reply_to": "/etc/passwd"}
        ),
        message(raw_body=zlib.compress(b"0" * 50_000_000), headers={"compression": "application/x-gzip"}),
        message(hint(job_id="job_" + "../" * 6)),
        message({"job_id": job_id}),
        message(None),
    ]


def test_there_are_as_many_as_the_checklist_asks_for(tmp_path: Path) -> None:
    assert len(forged(tmp_path)) >= 30


def test_forged_messages_run_nothing_and_the_worker_goes_on(worker: Worker) -> None:
    worker.push(*forged(worker.canary))
    worker.until_nothing_waits()
    assert _children(worker.process.pid) == []
    worker.still_works()
    assert not worker.canary.exists()
    with worker.database.read() as session:
        assert len(list_workers(session)) == 1


def test_rubbish_in_the_brokers_list_does_not_stop_the_worker(worker: Worker) -> None:
    worker.push(
        b"",
        b"\xff\xfe",
        b"not JSON",
        b"[]",
        b"17",
        b"null",
        b"{}",
        b'{"body": 1}',
        b'{"body": "x", "properties": {}}',
        b'{"body": "eA==", "properties": {"delivery_tag": "1", "body_encoding": "rot13"}}',
        b'{"body": "x", "headers": [], "properties": {"delivery_info": {}, "delivery_tag": []}}',
        b"[" * 100_000,
    )
    worker.until_nothing_waits()
    worker.still_works()


def test_a_queue_named_like_a_key_of_the_broker_breaks_nothing(worker: Worker) -> None:
    wake_ups = WakeUpPublisher(make_celery(worker.settings))
    for name in ("unacked", "unacked_index", "unacked_mutex", "celery", "train.evil", "0"):
        wake_ups.wake_up(name)
        assert worker.redis.type(f"apt:{name}") != b"list"
    wake_ups.close()
    worker.still_works()


def test_a_worker_that_celery_gives_up_says_so(worker: Worker, tmp_path: Path) -> None:
    """Whatever else someone does to the broker: a service manager has to see that the worker failed."""
    environment = {
        **os.environ,
        "APT_JOBS_DATA_DIR": str(worker.settings.root),
        "APT_JOBS_REDIS_URL": worker.settings.redis,
    }
    worker.redis.set(f"apt:{broker_queue('odd')}", "no list")
    command = [sys.executable, "-m", "apt_jobs", "worker", "train", "--gpus", "", "--name", "doomed", "--queue", "odd"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S)
    assert (done.returncode, "Celery's worker ended by itself" in done.stderr) == (2, True)


def _children(pid: int) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"\nPPid:\t{pid}\n" in (entry / "status").read_text():
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found
