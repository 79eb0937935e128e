"""`apt-jobs doctor` finds what is wrong, says what to do, and makes nothing."""

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from apt_jobs.commands import doctor
from apt_jobs.db.engine import Database
from apt_jobs.db.upgrade import upgrade_database
from apt_jobs.settings import Settings
from tests.conftest import some_port

MakeSettings = Callable[..., Settings]


def found(settings: Settings) -> dict[str, tuple[str, str]]:
    return {one.part: (one.level, one.text) for one in doctor.findings_of(settings)}


def test_a_fresh_machine_has_notes_and_no_fault_and_stays_fresh(make_settings: MakeSettings) -> None:
    settings = make_settings(port=some_port())
    findings = found(settings)
    assert {part for part, (level, _) in findings.items() if level == "fault"} == set()
    assert findings["permissions"][1] == f"{settings.root} is not there yet: apt-jobs up makes it"
    assert not settings.root.exists()


def test_a_database_of_this_version_is_fine_and_an_empty_one_is_not(make_settings: MakeSettings) -> None:
    settings = make_settings(port=some_port())
    database = Database(settings.database)
    database.ping()
    level, text = found(settings)["database"]
    assert (level, "apt-jobs migrate" in text) == ("fault", True)
    upgrade_database(database)
    database.dispose()
    assert found(settings)["database"] == ("ok", "sqlite answers, with the schema of this version")


def test_each_fault_is_named_with_what_to_do(make_settings: MakeSettings, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        settings = make_settings(
            data_dir=tmp_path / "file",
            port=other.getsockname()[1],
            redis_url="redis://127.0.0.1:1",
            database_url="postgresql://someone@127.0.0.1:1/nothing",
            min_free_bytes=1 << 60,
        )
        findings = found(settings)
    faults = {part: text for part, (level, text) in findings.items() if level == "fault"}
    assert set(faults) == {"permissions", "disk", "database", "clock", "broker", "port"}
    assert "set APT_JOBS_DATA_DIR" in faults["permissions"]
    assert "APT_JOBS_REDIS_URL" in faults["broker"]
    assert "set APT_JOBS_PORT" in faults["port"]
    assert "does not answer" in faults["database"]


def test_a_folder_that_others_may_enter_is_noted(make_settings: MakeSettings) -> None:
    settings = make_settings(port=some_port())
    settings.root.mkdir(mode=0o755, parents=True)
    assert found(settings)["permissions"][0] == "note"
    settings.root.chmod(0o700)
    assert found(settings)["permissions"][0] == "ok"


def test_a_part_that_cannot_be_looked_at_keeps_no_other_one_back(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(_path: object) -> None:
        raise RuntimeError("it is gone")

    monkeypatch.setattr("shutil.disk_usage", break_down)
    findings = found(make_settings(port=some_port()))
    assert findings["disk"] == ("fault", "it cannot be checked: RuntimeError: it is gone")
    assert findings["port"][0] == "ok"
