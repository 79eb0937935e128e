"""Backups of a service and their restoration: one cut of database and files, whatever happens meanwhile."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import select

from apt_jobs.artifacts.manifest import MANIFEST, manifest_of
from apt_jobs.backup import create
from apt_jobs.backup.create import Backup, back_up
from apt_jobs.backup.restore import UNFINISHED_SUFFIX, restore, verify
from apt_jobs.backup.store import BackupStore
from apt_jobs.db.checkpoints import delete_checkpoint_row
from apt_jobs.db.dump import tables
from apt_jobs.db.engine import Database
from apt_jobs.db.jobs import insert_job
from apt_jobs.db.models import ApiKey, Checkpoint, EventChunk
from apt_jobs.errors import Conflict, InvalidInput, NotFound, OutOfSpace, Unavailable
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.operations.data_directory import mark_data_directory, why_wrong_directory
from apt_jobs.settings import Settings


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", database_url=SecretStr(database_url))


@pytest.fixture
def store(tmp_path: Path) -> BackupStore:
    return BackupStore(tmp_path / "backups")


@pytest.fixture
def checkpoint_id(settings: Settings, database: Database) -> str:
    """Make a job, its checkpoint, an output, a data set with a link, and values that are hard to write down."""
    (settings.root / "datasets" / "mine").mkdir(parents=True)
    (settings.root / "datasets" / "mine" / "text.txt").write_text("a text\n" * 1_000)
    (settings.root / "datasets" / "mine" / "same.txt").symlink_to("text.txt")
    mark_data_directory(settings, database)
    with database.write() as session:
        job = insert_job(session, TrainSpec(kind="train", name="ein Übungslauf ☃", labels={"team": "a"}))
        folder = settings.checkpoints_dir / job.id / "step-1"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(os.urandom(3 << 20))
        (folder / MANIFEST).write_text(manifest_of(folder).model_dump_json())
        (settings.runs_dir / job.id).mkdir(parents=True)
        (settings.runs_dir / job.id / "log").write_text("a line\n")
        session.add(
            Checkpoint(
                id="ckpt_1", job_id=job.id, attempt=1, step=1, epoch=0, filename=f"{job.id}/step-1", size_bytes=3 << 20,
                train_loss=float("inf"), val_loss=None, is_best=True,
            )
        )  # fmt: skip
        chunk = EventChunk(job_id=job.id, kind="metric", last_seq=9, first_seq=2, attempt=1, body=bytes(range(256)))
        session.add(chunk)
    return "ckpt_1"


def _back_up(database: Database, settings: Settings, store: BackupStore, **options: Any) -> Backup:
    return back_up(database, settings, store, **{"runs": True, "keep": None, **options})


def _rows(database: Database) -> dict[str, list[tuple[Any, ...]]]:
    with database.read() as session:
        found = {
            table.name: [tuple(row) for row in session.execute(select(table).order_by(*table.primary_key.columns))]
            for table in tables()
        }
    return {name: [_to_milliseconds(row) for row in rows] for name, rows in found.items()}


def _to_milliseconds(row: tuple[Any, ...]) -> tuple[Any, ...]:
    """SQLite keeps instants to the millisecond."""
    return tuple(value.isoformat(" ", "milliseconds") if hasattr(value, "isoformat") else value for value in row)


def _files(root: Path) -> dict[str, bytes | str]:
    return {
        str(path.relative_to(root)): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for folder in ("checkpoints", "datasets", "runs")
        for path in sorted((root / folder).rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def _restored(store: BackupStore, folder: Path, name: str | None = None) -> Settings:
    """Restore into a data directory of its own, with SQLite in it."""
    settings = Settings(data_dir=folder)
    restore(store, name, settings)
    return settings


@pytest.fixture
def opened() -> Iterator[list[Database]]:
    databases: list[Database] = []
    yield databases
    for database in databases:
        database.dispose()


@pytest.mark.usefixtures("checkpoint_id")
def test_a_restored_service_has_the_same_rows_and_files_on_the_other_database_too(
    database: Database, settings: Settings, store: BackupStore, tmp_path: Path, opened: list[Database]
) -> None:
    done = _back_up(database, settings, store)
    restored = _restored(store, tmp_path / "restored")
    opened.append(Database(restored.database))
    assert _rows(opened[0]) == _rows(database)
    assert _files(restored.root) == _files(settings.root)
    assert why_wrong_directory(restored, done.snapshot.data_id) is None
    assert done.snapshot.data_id is not None
    assert not list(settings.root.glob(".backup-*"))
    assert oct((restored.root / "checkpoints").stat().st_mode)[-2:] in ("00", "55")  # as the umask says


@pytest.mark.usefixtures("checkpoint_id")
def test_what_a_backup_has_is_not_read_again_and_a_changed_file_is(
    database: Database, settings: Settings, store: BackupStore
) -> None:
    first = _back_up(database, settings, store)
    assert first.num_new_files == 4
    log = next(settings.runs_dir.rglob("log"))
    log.write_text("a line\nanother\n")
    second = _back_up(database, settings, store)
    assert (second.num_new_files, second.num_new_bytes) == (1, len("a line\nanother\n"))
    assert _back_up(database, settings, store, runs=False).snapshot.files.keys() < second.snapshot.files.keys()
    assert second.snapshot.name == store.snapshots()[1]


@pytest.mark.usefixtures("checkpoint_id")
def test_older_backups_and_what_only_they_need_are_deleted(
    database: Database, settings: Settings, store: BackupStore
) -> None:
    old = _back_up(database, settings, store).snapshot
    shutil.rmtree(settings.root / "datasets")
    done = _back_up(database, settings, store, keep=1)
    assert done.deleted == [old.name]
    assert store.snapshots() == [done.snapshot.name]
    assert not store.has(old.files["datasets/mine/text.txt"].sha256)
    assert verify(store, None) == done.snapshot


def test_a_checkpoint_deleted_in_the_moment_between_is_in_neither_rows_nor_files(
    database: Database,
    settings: Settings,
    store: BackupStore,
    checkpoint_id: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    link_tree, calls = create._link_tree, list[Path]()

    def delete_first(folder: Path, stage: Path) -> bool:
        calls.append(folder)
        if len(calls) == 1:
            with database.write() as session:
                delete_checkpoint_row(session, checkpoint_id)
            shutil.rmtree(settings.checkpoints_dir)
        return link_tree(folder, stage)

    monkeypatch.setattr(create, "_link_tree", delete_first)
    snapshot = _back_up(database, settings, store).snapshot
    assert snapshot.tables["checkpoints"].num_rows == 0
    assert not any(name.startswith("checkpoints/") for name in snapshot.files)


@pytest.mark.usefixtures("checkpoint_id")
def test_a_checkpoint_deleted_while_it_is_copied_is_copied_whole(
    database: Database, settings: Settings, store: BackupStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _files(settings.root)
    require = create._Copier.add_folder

    def delete_before(copier: Any, name: str, source: Path) -> None:
        shutil.rmtree(settings.checkpoints_dir, ignore_errors=True)
        require(copier, name, source)

    monkeypatch.setattr(create._Copier, "add_folder", delete_before)
    _back_up(database, settings, store)
    assert _files(_restored(store, tmp_path / "restored").root) == whole


@pytest.mark.usefixtures("checkpoint_id")
def test_a_checkpoint_of_another_machine_does_not_keep_a_backup_from_being_made(
    database: Database, settings: Settings, store: BackupStore
) -> None:
    shutil.rmtree(settings.checkpoints_dir)
    assert _back_up(database, settings, store).snapshot.tables["checkpoints"].num_rows == 1


@pytest.mark.usefixtures("checkpoint_id")
def test_a_full_disk_leaves_the_backups_before_whole(
    database: Database, settings: Settings, store: BackupStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _back_up(database, settings, store).snapshot
    (settings.root / "datasets" / "mine" / "more.txt").write_text("more")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(store.folder))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(OutOfSpace, match="free some space"):
            _back_up(database, settings, store)
    assert store.snapshots() == [before.name]
    assert verify(store, None) == before
    assert _back_up(database, settings, store).num_new_files == 1


@pytest.mark.usefixtures("checkpoint_id")
def test_a_killed_backup_harms_none_and_the_next_one_is_whole(
    database: Database, settings: Settings, store: BackupStore, tmp_path: Path
) -> None:
    before = _back_up(database, settings, store).snapshot
    (settings.root / "datasets" / "mine" / "large.bin").write_bytes(os.urandom(40 << 20))
    environment = {
        **os.environ,
        "APT_JOBS_DATA_DIR": str(settings.root),
        "APT_JOBS_DATABASE_URL": settings.database,
    }
    command = [sys.executable, "-m", "apt_jobs", "backup", str(store.folder)]
    with subprocess.Popen(command, env=environment) as process:
        deadline_s = time.monotonic() + 60.0
        while not list(store.folder.glob(".tmp-*")) and process.poll() is None and time.monotonic() < deadline_s:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert verify(store, before.name) == before
    after = _back_up(database, settings, store)
    assert verify(store, None) == after.snapshot
    assert not list(settings.root.glob(".backup-*"))
    assert _files(_restored(store, tmp_path / "restored").root) == _files(settings.root)


@pytest.mark.usefixtures("checkpoint_id")
def test_what_is_damaged_or_missing_is_found_and_nothing_is_restored(
    database: Database, settings: Settings, store: BackupStore, tmp_path: Path
) -> None:
    snapshot = _back_up(database, settings, store).snapshot
    sha256 = next(file.sha256 for name, file in snapshot.files.items() if name.startswith("checkpoints/"))
    path = store.folder / "objects" / sha256[:2] / sha256
    path.write_bytes(b"something else")
    for use in (lambda: verify(store, None), lambda: _restored(store, tmp_path / "restored")):
        with pytest.raises(InvalidInput, match=f"{sha256} of the backup is damaged"):
            use()
    path.unlink()
    with pytest.raises(InvalidInput, match=f"lacks the content {sha256}"):
        _restored(store, tmp_path / "restored")
    assert not (tmp_path / "restored").exists()
    assert (tmp_path / f"restored{UNFINISHED_SUFFIX}").is_dir()
    with (settings.checkpoints_dir / _below_checkpoints(snapshot.files, sha256)).open("rb") as source:
        store.add(source)
    _restored(store, tmp_path / "restored")
    assert not (tmp_path / f"restored{UNFINISHED_SUFFIX}").exists()


@pytest.mark.usefixtures("checkpoint_id")
def test_damaged_rows_are_found_before_any_is_restored(
    database: Database, settings: Settings, store: BackupStore, tmp_path: Path
) -> None:
    sha256 = _back_up(database, settings, store).snapshot.tables["jobs"].blocks[0]
    (store.folder / "objects" / sha256[:2] / sha256).write_bytes(zlib.compress(b"[]"))
    with pytest.raises(InvalidInput, match=f"{sha256} of the backup is damaged"):
        _restored(store, tmp_path / "restored")
    assert not (tmp_path / "restored").exists()


def _below_checkpoints(files: dict[str, Any], sha256: str) -> str:
    """Return the path of a content below the checkpoints."""
    return next(name for name, file in files.items() if file.sha256 == sha256).removeprefix("checkpoints/")


@pytest.mark.usefixtures("checkpoint_id")
def test_a_living_service_is_not_restored_over(
    database: Database, settings: Settings, store: BackupStore, tmp_path: Path
) -> None:
    _back_up(database, settings, store)
    before = _rows(database)
    with pytest.raises(Conflict, match="is not empty"):
        restore(store, None, settings)
    with pytest.raises(Conflict, match="the database has jobs"):
        restore(store, None, settings.model_copy(update={"data_dir": tmp_path / "elsewhere"}))
    assert _rows(database) == before
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.usefixtures("checkpoint_id")
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"revision": "9999"}, Unavailable, "has schema 9999"),
        ({"revision": ""}, Unavailable, "has schema"),
        ({"format": 2}, InvalidInput, "of another version"),
        ({"files": {"../outside": None}}, InvalidInput, "does not lie below"),
        ({"files": {"/etc/outside": None}}, InvalidInput, "does not lie below"),
        ({"links": {"../outside": "x"}}, InvalidInput, "does not lie below"),
        ({"tables": {"jobs": {"num_rows": 1, "blocks": ["../../outside"]}}}, InvalidInput, "of another version"),
    ],
)
def test_a_manifest_of_somebody_else_is_refused(
    sqlite_database: Database,
    store: BackupStore,
    tmp_path: Path,
    changes: dict[str, Any],
    error: type[Exception],
    words: str,
    sqlite_url: str,
) -> None:
    settings = Settings(data_dir=tmp_path / "data", database_url=SecretStr(sqlite_url))
    snapshot = _back_up(sqlite_database, settings, store).snapshot
    file = next(iter(snapshot.files.values())).model_dump(mode="json")
    if "files" in changes:
        changes = {"files": dict.fromkeys(changes["files"], file)}
    path = store.folder / "snapshots" / f"{snapshot.name}.json"
    path.write_text(json.dumps(snapshot.model_dump(mode="json") | changes))
    with pytest.raises(error, match=words):
        _restored(store, tmp_path / "restored")
    assert not (tmp_path / "restored").exists()
    assert not (tmp_path / "outside").exists()


def test_folders_that_are_no_place_for_backups(
    sqlite_database: Database, sqlite_url: str, tmp_path: Path, store: BackupStore
) -> None:
    settings = Settings(data_dir=tmp_path / "data", database_url=SecretStr(sqlite_url))
    settings.root.mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("do not touch")
    (tmp_path / "file").write_text("a file")
    for folder, words in {
        settings.root / "backups": "within the data directory",
        tmp_path / "mine": "is not empty and holds no backups",
        tmp_path / "file": "File exists|Not a directory",
    }.items():
        with pytest.raises(InvalidInput, match=words):
            _back_up(sqlite_database, settings, BackupStore(folder))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    for name in (None, "20260101T000000Z-000000"):
        with pytest.raises(NotFound, match="no backup"):
            _restored(store, tmp_path / "restored", name)


def test_two_backups_at_once_do_not_mix(sqlite_database: Database, sqlite_url: str, store: BackupStore) -> None:
    settings = Settings(data_dir=store.folder.parent / "data", database_url=SecretStr(sqlite_url))
    settings.root.mkdir()
    store.create()
    lock = store.lock()
    with pytest.raises(Conflict, match="another process"):
        _back_up(sqlite_database, settings, store)
    lock.close()
    assert _back_up(sqlite_database, settings, store).snapshot.name in store.snapshots()


def test_a_large_table_shares_its_blocks_with_the_backup_before(
    sqlite_database: Database, sqlite_url: str, store: BackupStore, tmp_path: Path, opened: list[Database]
) -> None:
    settings = Settings(data_dir=tmp_path / "data", database_url=SecretStr(sqlite_url))
    settings.root.mkdir()
    with sqlite_database.write() as session:
        session.add_all(
            ApiKey(id=f"key_{n:08d}", name=f"key {n}", role="viewer", secret_sha256="0" * 64)
            for n in range(0, 20_000, 2)
        )
    first = _back_up(sqlite_database, settings, store).snapshot.tables["api_keys"]
    with sqlite_database.write() as session:
        session.add(ApiKey(id="key_00000777", name="new", role="viewer", secret_sha256="1" * 64))
    second = _back_up(sqlite_database, settings, store).snapshot.tables["api_keys"]
    assert (first.num_rows, second.num_rows) == (10_000, 10_001)
    assert len(set(second.blocks) - set(first.blocks)) == 1
    assert len(first.blocks) > 2
    opened.append(Database(_restored(store, tmp_path / "restored").database))
    assert _rows(opened[0]) == _rows(sqlite_database)
