"""Retention: what each rule removes, what no rule may remove, and that rows and files go together."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import func, select, update

from apt_jobs.artifacts.runs import runs_of_job
from apt_jobs.db import steering
from apt_jobs.db.access import Role, create_key, create_login_token, revoke_key
from apt_jobs.db.checkpoints import list_checkpoints
from apt_jobs.db.clock import now_plus
from apt_jobs.db.engine import Database
from apt_jobs.db.events import events_after
from apt_jobs.db.jobs import insert_job
from apt_jobs.db.model_aliases import set_alias
from apt_jobs.db.models import ApiKey, Job, LoginToken, Schedule, WorkerRow
from apt_jobs.db.service_values import DEFAULT_MODEL, set_value
from apt_jobs.db.sweeps import insert_sweep
from apt_jobs.db.workers import record_worker
from apt_jobs.errors import Conflict
from apt_jobs.folder_lock import FolderLock
from apt_jobs.jobs.spec import TrainSpec, parse_spec
from apt_jobs.jobs.states import JobState
from apt_jobs.jobs.sweeps import SweepSpec, plan_jobs
from apt_jobs.operations.data_directory import MARKER_NAME, mark_data_directory
from apt_jobs.operations.retention import _jobs_to_remove, apply_retention, preview
from apt_jobs.operations.submit import submit_job
from apt_jobs.operations.sweep_orphans import sweep_orphans
from apt_jobs.retention_policy import RetentionPolicy
from apt_jobs.settings import Settings
from tests.integration.operations.kept_jobs import SIZE_BYTES, ended, kept_job

ALL = RetentionPolicy(days=0.001)
LORA = {"lora": {"r": 4}}


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", database_url=SecretStr(database_url))


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    database = Database(settings.database)
    mark_data_directory(settings, database)
    with database.write() as session:
        set_value(session, DEFAULT_MODEL, "a local model")  # else the newest checkpoint is what generates
    yield database
    database.dispose()


def job_ids(database: Database) -> set[str]:
    with database.read() as session:
        return set(session.scalars(select(Job.id)))


def checkpoint_of(database: Database, job_id: str, step: int | None = None) -> str:
    with database.read() as session:
        rows, _ = list_checkpoints(session, job_id=job_id)
    return next(row.id for row in rows if step in (None, row.step))


def files_of(settings: Settings, job_id: str) -> list[Path]:
    return [folder for folder in (settings.checkpoints_dir / job_id, runs_of_job(settings, job_id)) if folder.exists()]


def run(database: Database, settings: Settings, **policy: Any) -> Any:
    """Preview, then apply; both say the same of jobs and bytes."""
    chosen = RetentionPolicy(**policy)
    before = job_ids(database)
    expected = preview(database, chosen)
    assert job_ids(database) == before
    done = apply_retention(database, settings, chosen)
    assert (expected.num_jobs, expected.num_bytes, expected.kept) == (done.num_jobs, done.num_bytes, done.kept)
    assert (expected.num_checkpoints, expected.num_run_folders) == (done.num_checkpoints, done.num_run_folders)
    return done


def test_jobs_go_by_age_with_rows_and_files(settings: Settings, database: Database) -> None:
    old = kept_job(database, settings, days=100, losses={1: 2.0})
    young = kept_job(database, settings, days=10, losses={1: 2.0})
    done = run(database, settings, days=90)
    assert (done.num_jobs, done.num_bytes, done.job_ids) == (1, SIZE_BYTES, [old])
    assert job_ids(database) == {young}
    assert files_of(settings, old) == []
    assert len(files_of(settings, young)) == 2


def test_a_label_has_days_of_its_own(settings: Settings, database: Database) -> None:
    smoke = kept_job(database, settings, days=8, labels={"run": "smoke"})
    both = kept_job(database, settings, days=8, labels={"run": "smoke", "keep": "yes"})
    paper = kept_job(database, settings, days=5_000, labels={"keep": "yes"})
    other = kept_job(database, settings, days=8)
    old = kept_job(database, settings, days=100)
    run(database, settings, days=90, label_days={"run=smoke": 7, "keep=yes": 0})
    assert job_ids(database) == {both, paper, other}
    run(database, settings, max_jobs=0, label_days={"keep=yes": 0})
    assert job_ids(database) == {both, paper}
    assert files_of(settings, old) + files_of(settings, smoke) == []


def test_the_oldest_go_by_number_and_by_size(settings: Settings, database: Database) -> None:
    jobs = [kept_job(database, settings, days=9 - number, losses={1: 1.0}) for number in range(5)]
    goes_on = kept_job(database, settings, days=None, losses={1: 1.0})
    run(database, settings, max_jobs=4)
    assert job_ids(database) == {*jobs[1:], goes_on}
    assert run(database, settings, max_bytes=2 * SIZE_BYTES + 1).num_jobs == 2
    assert job_ids(database) == {*jobs[3:], goes_on}
    assert run(database, settings, max_bytes=0, max_jobs=100).num_jobs == 2
    assert job_ids(database) == {goes_on}


def _aliased(database: Database, _: Settings, job_id: str) -> None:
    with database.write() as session:
        set_alias(session, "prod", checkpoint_of(database, job_id))


def _aliased_job(database: Database, _: Settings, job_id: str) -> None:
    with database.write() as session:
        set_alias(session, "canary", f"{job_id}@best")


def _default(database: Database, _: Settings, job_id: str) -> None:
    with database.write() as session:
        set_value(session, DEFAULT_MODEL, checkpoint_of(database, job_id))


def _newest(database: Database, _: Settings, _job_id: str) -> None:
    with database.write() as session:
        set_value(session, DEFAULT_MODEL, None)


def _base_of_paused(database: Database, _: Settings, job_id: str) -> None:
    with database.write() as session:
        spec = parse_spec({"kind": "train", "base_model": checkpoint_of(database, job_id)})
        steering.request_pause(session, insert_job(session, spec).id)


def _asked_for(database: Database, _: Settings, job_id: str) -> None:
    with database.write() as session:
        insert_job(session, parse_spec({"kind": "generate", "texts": ["a"], "model": f"{job_id}@best"}))


def _parent(database: Database, _: Settings, job_id: str) -> None:
    with database.write() as session:
        insert_job(session, parse_spec({"kind": "train", "after": [{"job": job_id, "on": "end"}]}))


def _scheduled(database: Database, _: Settings, job_id: str) -> None:
    spec = {"kind": "train", "base_model": checkpoint_of(database, job_id)}
    row = Schedule(id="s", name="s", cron="* * * * *", time_zone="UTC", spec=spec, overlap="skip", catch_up="skip")
    with database.write() as session:
        session.add(row)


def _adapter(database: Database, settings: Settings, job_id: str) -> None:
    base = checkpoint_of(database, job_id)
    kept_job(database, settings, days=0, losses={1: 1.0}, base_model=base, labels={"keep": "yes"}, training=LORA)


NEEDS: dict[Callable[[Database, Settings, str], None], str] = {
    _aliased: "its model has an alias",
    _aliased_job: "its model has an alias",
    _default: "its model is the default one",
    _base_of_paused: "a job that has not ended needs its model",
    _asked_for: "a job that has not ended needs its model",
    _parent: "a job that has not ended comes after it",
    _scheduled: "a schedule needs its model",
    _adapter: "an adapter that is kept needs its model",
}


@pytest.mark.parametrize("needs", [NEEDS, {_newest: "its model is the default one"}])
def test_what_is_needed_stays_however_the_policy_is(
    settings: Settings, database: Database, needs: dict[Callable[[Database, Settings, str], None], str]
) -> None:
    kept_job(database, settings, days=60, losses={1: 2.0})
    needed = []
    for need in needs:
        job_id = kept_job(database, settings, days=50, losses={1: 2.0, 2: 1.0})
        need(database, settings, job_id)
        needed.append((job_id, checkpoint_of(database, job_id, 2 if need is _newest else None)))
    before = [files_of(settings, job_id) for job_id, _ in needed]
    done = run(database, settings, days=1, max_jobs=0, max_bytes=0, checkpoint_days=1, label_days={"keep=yes": 0})
    assert done.num_jobs == 1
    assert done.kept == Counter(needs.values())
    assert [files_of(settings, job_id) for job_id, _ in needed] == before
    for job_id, checkpoint_id in needed:
        with database.read() as session:
            assert checkpoint_id in {row.id for row in list_checkpoints(session, job_id=job_id)[0]}


def test_jobs_of_a_sweep_that_goes_on_stay(settings: Settings, database: Database) -> None:
    spec = SweepSpec.model_validate(
        {
            "spec": {"kind": "train"},
            "parameters": {"training.seed": {"values": [1, 2]}},
            "method": "grid",
            "metric": "train_loss",
        }
    )
    with database.write() as session:
        insert_sweep(session, spec, plan_jobs(spec), 100)
        first = session.scalars(select(Job.id).order_by(Job.id)).first()
        assert first is not None
        steering.request_cancel(session, first)
    ended(database, first, 50)
    assert run(database, settings, days=1).kept == {"its sweep has not ended": 1}
    assert len(job_ids(database)) == 2


def test_paused_jobs_and_running_ones_keep_everything(settings: Settings, database: Database) -> None:
    running = kept_job(database, settings, days=None, losses={1: 2.0, 2: 1.0, 3: 3.0})
    paused = kept_job(database, settings, days=None, losses={1: 2.0, 2: 1.0, 3: 3.0})
    with database.write() as session:
        steering.request_pause(session, paused)
        session.execute(update(Job).values(created_at=now_plus(-1e8), claimed_at=now_plus(-1e8)))
    done = run(database, settings, days=1, max_jobs=0, max_bytes=0, checkpoint_days=1, run_days=1, log_days=1)
    assert (done.num_jobs, done.num_checkpoints, done.num_run_folders, done.num_log_lines) == (0, 0, 0, 0)
    for job_id in (running, paused):
        assert len(list((settings.checkpoints_dir / job_id).iterdir())) == 3


def test_a_job_keeps_its_best_checkpoint_or_its_last(settings: Settings, database: Database) -> None:
    best = kept_job(database, settings, days=40, losses={1: 2.0, 2: 1.0, 3: 3.0})
    last = kept_job(database, settings, days=40, losses={1: None, 2: None}, state=JobState.FAILED)
    aliased = kept_job(database, settings, days=40, losses={1: 2.0, 2: 1.0, 3: 3.0})
    with database.write() as session:
        set_alias(session, "prod", checkpoint_of(database, aliased, 1))
    done = run(database, settings, checkpoint_days=30)
    assert (done.num_checkpoints, done.num_bytes) == (4, 4 * SIZE_BYTES)
    left = {job_id: {path.name for path in (settings.checkpoints_dir / job_id).iterdir()} for job_id in (best, last)}
    assert left == {best: {"step-2"}, last: {"step-2"}}
    assert {path.name for path in (settings.checkpoints_dir / aliased).iterdir()} == {"step-1", "step-2"}
    with database.read() as session:
        kinds = [event.kind for event in events_after(session, best, 0, 100)]
    assert kinds.count("checkpoint_removed") == 2
    assert run(database, settings, checkpoint_days=30).num_checkpoints == 0


def test_run_folders_and_texts_of_logs_go_and_events_keep_their_places(settings: Settings, database: Database) -> None:
    job_id = kept_job(database, settings, days=40)
    with database.read() as session:
        seqs = [event.seq for event in events_after(session, job_id, 0, 100)]
    done = run(database, settings, run_days=30, log_days=30)
    assert (done.num_run_folders, done.num_log_lines) == (1, 1)
    assert files_of(settings, job_id) == []
    with database.read() as session:
        events = events_after(session, job_id, 0, 100)
    assert [event.seq for event in events] == seqs
    payloads = [event.payload for event in events if event.kind == "log"]
    assert b"a warning" in payloads[1]
    assert b"a line" not in payloads[0]
    done = run(database, settings, run_days=30, log_days=30)
    assert (done.num_run_folders, done.num_log_lines) == (0, 0)


def test_workers_keys_and_sessions_are_forgotten(settings: Settings, database: Database) -> None:
    with database.write() as session:
        for name in ("dead", "alive"):
            record_worker(
                session,
                name=name,
                kind="train",
                queues=["train"],
                hostname="here",
                pid=1,
                version="1",
                gpus=[],
                current_job_id=None,
            )
        session.execute(update(WorkerRow).where(WorkerRow.name == "dead").values(heartbeat_at=now_plus(-40 * 86_400)))
        for name in ("revoked", "expired", "good"):
            create_key(session, name, Role.VIEWER)
        revoked = session.scalars(select(ApiKey.id).where(ApiKey.name == "revoked")).one()
        revoke_key(session, revoked)
        session.execute(update(ApiKey).where(ApiKey.name == "revoked").values(revoked_at=now_plus(-40 * 86_400)))
        session.execute(update(ApiKey).where(ApiKey.name == "expired").values(expires_at=now_plus(-40 * 86_400)))
        create_login_token(session, Role.VIEWER, 3_600)
        session.execute(update(LoginToken).values(expires_at=now_plus(-1)))
    done = run(database, settings, worker_days=30, key_days=30)
    assert (done.num_workers, done.num_keys, done.num_sessions) == (1, 2, 1)
    with database.read() as session:
        assert list(session.scalars(select(WorkerRow.name))) == ["alive"]
        assert list(session.scalars(select(ApiKey.name))) == ["good"]


def test_one_run_is_bounded_and_says_that_there_is_more(settings: Settings, database: Database) -> None:
    for _ in range(3):
        kept_job(database, settings, days=5)
    done = apply_retention(database, settings, ALL, max_jobs=2)
    assert (done.num_jobs, done.is_complete) == (2, False)
    done = apply_retention(database, settings, ALL, max_jobs=2)
    assert (done.num_jobs, done.is_complete) == (1, True)


def test_a_job_that_is_tried_again_meanwhile_stays(
    settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = kept_job(database, settings, days=5, state=JobState.FAILED)
    monkeypatch.setattr("apt_jobs.operations.retention._jobs_to_remove", _retried_meanwhile(database, job_id))
    done = apply_retention(database, settings, ALL)
    assert (done.num_jobs, done.kept) == (0, {"it changed meanwhile": 1})
    assert len(files_of(settings, job_id)) == 1


def _retried_meanwhile(database: Database, job_id: str) -> Callable[..., Iterator[Any]]:
    def jobs(*arguments: Any) -> Iterator[Any]:
        for job in _jobs_to_remove(*arguments):
            with database.write() as session:
                steering.request_retry(session, job_id)
            yield job

    return jobs


def test_another_data_directory_and_another_run_are_refused(settings: Settings, database: Database) -> None:
    job_id = kept_job(database, settings, days=5)
    lock = FolderLock(settings.locks_dir / "retention.lock")
    assert lock.try_exclusive()
    with pytest.raises(Conflict, match="another process"):
        apply_retention(database, settings, ALL)
    lock.close()
    (settings.root / MARKER_NAME).write_text("another one\n")
    with pytest.raises(Conflict, match="belongs to another database"):
        apply_retention(database, settings, ALL)
    assert job_ids(database) == {job_id}
    assert len(files_of(settings, job_id)) == 1


def test_files_without_a_row_go_after_a_grace(settings: Settings, database: Database) -> None:
    """What a killed deletion leaves; what may still get a row stays."""
    kept = kept_job(database, settings, days=5, losses={1: 1.0})
    goes_on = kept_job(database, settings, days=None, losses={1: 1.0})
    gone = f"job_{'0' * 20}"
    folders = {
        "old job": settings.runs_dir / gone,
        "old checkpoints": settings.checkpoints_dir / gone,
        "half deleted": settings.checkpoints_dir / f".del-{gone}",
        "unregistered": settings.checkpoints_dir / kept / "step-9",
        "being saved": settings.checkpoints_dir / goes_on / "step-9",
        "no job": settings.runs_dir / "notes",
        "young": settings.runs_dir / f"job_{'1' * 20}",
    }
    for folder in folders.values():
        folder.mkdir(parents=True)
    for path in [*settings.checkpoints_dir.rglob("*"), *settings.runs_dir.rglob("*")]:
        if path != folders["young"]:
            os.utime(path, (time.time() - 1e6, time.time() - 1e6))
    assert sweep_orphans(database, settings, 3_600) == 3
    assert {name for name, folder in folders.items() if folder.exists()} == {"being saved", "no job", "young"}
    assert (settings.checkpoints_dir / kept / "step-1").is_dir()
    assert (settings.checkpoints_dir / goes_on / "step-1").is_dir()


def test_nothing_is_removed_by_an_empty_policy(settings: Settings, database: Database) -> None:
    kept_job(database, settings, days=5_000, losses={1: 1.0, 2: 2.0})
    done = run(database, settings)
    assert (done.num_jobs, done.num_checkpoints, done.num_run_folders) == (0, 0, 0)
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(Job)) == 1


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)  # SQLite has one writer at a time
def test_a_job_that_is_submitted_meanwhile_keeps_what_it_names(settings: Settings, database: Database) -> None:
    """Its transaction is open while retention looks."""
    base = kept_job(database, settings, days=50, losses={1: 1.0})
    spec = TrainSpec(kind="train", base_model=checkpoint_of(database, base))
    with ThreadPoolExecutor(1) as pool:
        with database.write() as session:
            submit_job(session, settings, spec)
            session.flush()
            running = pool.submit(apply_retention, database, settings, ALL)
            with pytest.raises(TimeoutError):
                running.result(timeout=0.5)
        done = running.result(timeout=60)
    assert done.kept == {"a job that has not ended needs its model": 1}
    assert base in job_ids(database)
