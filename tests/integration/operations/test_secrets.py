"""Secrets at rest: encrypted, read by who has the key, and a sentence where something is not there."""

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.fernet import Fernet
from pydantic import SecretStr
from sqlalchemy import text

from apt_jobs.db.engine import Database
from apt_jobs.db.secrets import delete_secret, list_secrets
from apt_jobs.errors import Conflict, InvalidInput, InvalidReferences, NotFound, Unavailable, WorkerLacks
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.operations import secrets
from apt_jobs.operations.secrets import put_secret, read_secrets
from apt_jobs.operations.submit import submit_job
from apt_jobs.settings import Settings

TOKEN = "hf_0123456789 ü"


@pytest.fixture
def database(sqlite_url: str) -> Iterator[Database]:
    database = Database(sqlite_url)
    yield database
    database.dispose()


def _put(database: Database, settings: Settings, name: str, value: str) -> None:
    with database.write() as session:
        put_secret(session, settings, name, value)


def _read(database: Database, settings: Settings, *names: str) -> dict[str, str]:
    with database.read() as session:
        return read_secrets(session, settings, names)


def test_a_value_is_read_back_by_the_key_alone(database: Database, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    _put(database, settings, "HF_TOKEN", TOKEN)
    assert _read(database, settings, "HF_TOKEN") == {"HF_TOKEN": TOKEN}
    assert stat.S_IMODE((tmp_path / "secrets.key").stat().st_mode) == 0o600
    with database.read() as session:
        [stored] = session.execute(text("SELECT encrypted FROM secrets")).scalars()
        assert [row.name for row in list_secrets(session)] == ["HF_TOKEN"]
    assert TOKEN not in stored
    _put(database, settings, "HF_TOKEN", "another value")
    assert _read(database, settings, "HF_TOKEN") == {"HF_TOKEN": "another value"}
    assert _read(database, settings) == {}


def test_keys_are_changed_one_after_the_other(database: Database, tmp_path: Path) -> None:
    old, new = Fernet.generate_key().decode(), Fernet.generate_key().decode()
    _put(database, Settings(data_dir=tmp_path, secrets_key=SecretStr(old)), "A", "of the old one")
    both = Settings(data_dir=tmp_path, secrets_key=SecretStr(f"{new},{old}"))
    _put(database, both, "B", "of the new one")
    assert _read(database, both, "A", "B") == {"A": "of the old one", "B": "of the new one"}
    only_new = Settings(data_dir=tmp_path, secrets_key=SecretStr(new))
    assert _read(database, only_new, "B") == {"B": "of the new one"}
    with pytest.raises(WorkerLacks, match="does not decrypt the secret A"):
        _read(database, only_new, "A")


def test_who_lacks_the_key_hands_back_and_who_has_none_of_the_name_is_refused(
    database: Database, tmp_path: Path
) -> None:
    settings = Settings(data_dir=tmp_path)
    _put(database, settings, "HF_TOKEN", TOKEN)
    with pytest.raises(Unavailable, match=r"secrets\.key of the data directory, cannot be read"):
        _read(database, Settings(data_dir=tmp_path / "other"), "HF_TOKEN")
    (tmp_path / "secrets.key").write_text("no key")
    with pytest.raises(Unavailable, match=r"secrets\.key holds no key"):
        _read(database, settings, "HF_TOKEN")
    spec = TrainSpec(kind="train", entry_point="mine", secrets=["HF_TOKEN", "OTHER"])
    with database.write() as session, pytest.raises(InvalidReferences, match=r"secrets 'OTHER': .*secrets set OTHER"):
        submit_job(session, settings, spec)
    with database.write() as session:
        delete_secret(session, "HF_TOKEN")
        with pytest.raises(NotFound, match="no secret 'HF_TOKEN'"):
            delete_secret(session, "HF_TOKEN")


@pytest.mark.parametrize("value", ["", "s3cret", "x" * 16_385, "with\0nul and more", "half a pair \ud800 of it"])
def test_a_value_that_cannot_be_one_is_refused_and_not_shown(database: Database, tmp_path: Path, value: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        _put(database, Settings(data_dir=tmp_path), "A", value)
    assert not value or value not in str(caught.value)


def test_there_are_only_so_many(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "MAX_SECRETS", 1)
    settings = Settings(data_dir=tmp_path)
    _put(database, settings, "A", "a long value")
    _put(database, settings, "A", "another value")
    with pytest.raises(Conflict, match="delete one"):
        _put(database, settings, "B", "a long value")
