"""Environments of jobs: real ones, built by uv from wheels that lie in a folder."""

import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from apt_jobs.artifacts.environments import EnvironmentBuilder, find_environment
from apt_jobs.errors import InvalidInput, WorkerLacks
from apt_jobs.events.spool import SpoolReader
from apt_jobs.folder_lock import FolderLock, lock_path
from apt_jobs.jobs.outcome import Outcome, read_outcome
from apt_jobs.jobs.run_file import EnvironmentPlan, RunFile
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.settings import Settings
from apt_jobs.supervision.launch import start_node
from apt_jobs.supervision.prepare_run import run_file_path
from apt_jobs.supervision.rank_logs import SET_UP_LOG, RankLogs
from apt_jobs.supervision.set_up import StopRequested
from tests.acceptance.stack import until
from tests.integration.run_files import run_file_in

OURS = f"{sys.version_info.major}.{sys.version_info.minor}"
SCRIPT = """
import os, pathlib, sys
import tiny, apt_jobs
run = apt_jobs.current_run()
run.log({"eval/bleu": tiny.VALUE}, step=1)
assert "numpy" not in sys.modules
try:
    import pydantic
except ImportError:
    is_in_its_folder = run.output_dir == pathlib.Path.cwd()
    print("alone", sys.prefix, os.environ["VIRTUAL_ENV"], "UV_CONFIG_FILE" in os.environ, is_in_its_folder)
"""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    for name, version, python in (("tiny", "1.0", "py3"), ("tiny", "2.0", "py3"), ("other", "1.0", "cp399")):
        with zipfile.ZipFile(folder / f"{name}-{version}-{python}-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", f"VALUE = {version}\n")
            about = f"{name}-{version}.dist-info"
            wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            wheel.writestr(f"{about}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {python}-none-any\n")
            wheel.writestr(f"{about}/RECORD", "")
    (folder / "uv.toml").write_text(f'no-index = true\npython-downloads = "never"\nfind-links = ["{folder}"]\n')
    return folder


def _plan(root: Path, **fields: object) -> EnvironmentPlan:
    usual = {"environments_dir": root, "python": OURS, "timeout_s": 60.0, "max_bytes": 1 << 30, "max_unused_s": 1e6}
    return EnvironmentPlan.model_validate({**usual, **fields})


def _builder(root: Path, wheels: Path, **fields: object) -> EnvironmentBuilder:
    root.mkdir(exist_ok=True)
    (root / SET_UP_LOG).touch()
    offline = {**os.environ, "UV_CONFIG_FILE": str(wheels / "uv.toml")}
    return EnvironmentBuilder(_plan(root, **fields), root / SET_UP_LOG, offline, lambda: None)


def test_jobs_at_once_build_one_environment_once_and_use_it_together(tmp_path: Path, wheels: Path) -> None:
    found: list[Path] = []

    def provide() -> None:
        folder, lock = _builder(tmp_path, wheels).provide("tiny==1.0\n", is_lock=True)
        found.append(folder)
        lock.close()

    threads = [threading.Thread(target=provide) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(set(found)) == 1
    record = find_environment(found[0])
    assert record is not None
    assert (record.packages, record.python) == (["tiny==1.0"], sys.version.split()[0])
    assert (tmp_path / SET_UP_LOG).read_text().count("builds the environment") == 1


def test_one_that_was_cut_off_is_built_again_and_an_unused_one_goes(tmp_path: Path, wheels: Path) -> None:
    folder, lock = _builder(tmp_path, wheels).provide("tiny\n", is_lock=False)
    assert find_environment(folder).packages == ["tiny==2.0"]  # type: ignore[union-attr]  # it is whole
    lock.close()
    next(folder.glob(".apt_jobs.json")).unlink()
    again, lock = _builder(tmp_path, wheels).provide("tiny\n", is_lock=False)
    assert again == folder
    other, other_lock = _builder(tmp_path, wheels, max_bytes=0).provide("", is_lock=False)
    assert folder.is_dir()  # somebody holds it
    lock.close()
    last, last_lock = _builder(tmp_path, wheels, max_bytes=0).provide("", is_lock=True)
    assert [path.is_dir() for path in (folder, other, last)] == [False, True, True]
    other_lock.close()
    last_lock.close()


@pytest.mark.parametrize(
    ("packages", "is_lock", "fields", "error", "message"),
    [
        ("nosuch==1\n", False, {}, InvalidInput, "cannot be built: (?s:.*)nosuch"),
        ("tiny==1.0\ntiny==2.0\n", False, {}, InvalidInput, "unsatisfiable"),
        ("other==1.0\n", True, {}, InvalidInput, "(?s:.*)other"),  # a lock for another Python
        ("tiny==1.0 --hash=sha256:" + "0" * 64 + "\n", True, {}, InvalidInput, "[Hh]ash"),
        ("tiny\n", False, {"python": "3.99"}, WorkerLacks, "this worker has no Python 3.99"),
    ],
)
def test_what_cannot_be_built_says_why_in_the_words_of_uv(
    tmp_path: Path, wheels: Path, packages: str, is_lock: bool, fields: dict[str, str], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        _builder(tmp_path, wheels, **fields).provide(packages, is_lock=is_lock)
    assert [path for path in tmp_path.iterdir() if path.is_dir() and not path.name.startswith(".")] == []


def test_a_network_that_is_away_is_no_fault_of_the_job(tmp_path: Path) -> None:
    (tmp_path / SET_UP_LOG).touch()
    away = {**os.environ, "UV_DEFAULT_INDEX": "http://127.0.0.1:9/simple", "UV_HTTP_RETRIES": "0"}
    builder = EnvironmentBuilder(_plan(tmp_path), tmp_path / SET_UP_LOG, away, lambda: None)
    with pytest.raises(WorkerLacks, match="cannot be built"):
        builder.provide("tiny\n", is_lock=False)


def test_a_worker_without_uv_hands_the_job_back(tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(WorkerLacks, match="no uv"):
        _builder(tmp_path, wheels).provide("tiny\n", is_lock=False)


def test_waiting_for_another_build_ends_at_its_time_or_when_asked_to(tmp_path: Path, wheels: Path) -> None:
    folder, lock = _builder(tmp_path, wheels).provide("", is_lock=False)
    lock.close()
    (folder / ".apt_jobs.json").unlink()
    other = FolderLock(lock_path(folder))
    assert other.try_exclusive()
    with pytest.raises(WorkerLacks, match=r"not ready within 0\.2 s"):
        _builder(tmp_path, wheels, timeout_s=0.2).provide("", is_lock=False)

    def stop() -> None:
        raise StopRequested

    builder = EnvironmentBuilder(_plan(tmp_path), tmp_path / SET_UP_LOG, os.environ, stop)
    with pytest.raises(StopRequested):
        builder.provide("", is_lock=False)
    other.close()


def _attempt(tmp_path: Path, environment: dict[str, object], **plan: object) -> RunFile:
    job = {"kind": "train", "code": {"sha256": "0" * 64}, "argv": ["python", "train.py"], "launcher": "none"}
    spec = TrainSpec.model_validate({**job, "environment": environment, "device": "cpu"})
    run_dir, output_dir = tmp_path / "run", tmp_path / "output"
    run_dir.mkdir()
    output_dir.mkdir()
    (output_dir / "train.py").write_text(SCRIPT)
    (output_dir / "a.lock").write_text("tiny==2.0\n")
    run_file = run_file_in(
        run_dir,
        spec,
        command=list(spec.argv),
        output_dir=output_dir,
        environment=_plan(tmp_path / "environments", **plan),
    )
    (tmp_path / "environments").mkdir(exist_ok=True)
    run_file_path(run_file).write_text(run_file.model_dump_json())
    return run_file


def _ended(tmp_path: Path, run_file: RunFile) -> int:
    tree = start_node(Settings(data_dir=tmp_path), run_file, 0, [], "w")
    try:
        until(lambda: tree.poll() is not None)
        return tree.poll() or 0
    finally:
        tree.kill()


def test_a_script_runs_in_its_own_environment_with_its_run_and_nothing_else_of_ours(
    tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UV_CONFIG_FILE", str(wheels / "uv.toml"))
    run_file = _attempt(tmp_path, {"lock": "a.lock"})
    assert _ended(tmp_path, run_file) == 0
    logs = RankLogs(run_file.run_dir, 1)
    logs.end()
    lines = [(event.source, event.message) for _, event in logs.read(100)]  # type: ignore[attr-defined]  # lines
    [(source, printed)] = [line for line in lines if line[1].startswith("alone")]
    [folder] = [path for path in (tmp_path / "environments").iterdir() if path.is_dir() and path.name[0] != "."]
    assert (source, printed) == ("rank 0", f"alone {folder} {folder} False True")
    assert ("set-up", "the environment is built") in lines
    events = [event for _, event in SpoolReader(run_file.spool_path(0)).read()]
    assert [event.values for event in events if event.kind == "metrics"] == [{"eval/bleu": 2.0}]  # type: ignore[attr-defined]


def test_a_registered_environment_is_used_as_it_is(tmp_path: Path, wheels: Path) -> None:
    made = tmp_path / "made"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(made)], check=True)
    (next(made.glob("lib/python*/site-packages")) / "tiny.py").write_text("VALUE = 2.0\n")
    run_file = _attempt(tmp_path, {"name": "mine"}, registered_dir=made)
    assert _ended(tmp_path, run_file) == 0
    assert (run_file.run_dir / SET_UP_LOG).read_text() == ""


def test_a_build_that_fails_is_the_failure_of_the_job(
    tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UV_CONFIG_FILE", str(wheels / "uv.toml"))
    run_file = _attempt(tmp_path, {"requirements": ["nosuch"]})
    assert _ended(tmp_path, run_file) == 1
    [(_, failure)] = SpoolReader(run_file.spool_path(0)).read()
    assert (failure.kind, failure.error, failure.exit_status) == ("failure", "InvalidInput", 1)  # type: ignore[attr-defined]
    assert "nosuch" in failure.message  # type: ignore[attr-defined]


def test_a_pause_while_it_builds_ends_the_attempt_as_asked(tmp_path: Path) -> None:
    run_file = _attempt(tmp_path, {"requirements": ["nosuch"]})
    run_file.stop_path.write_text("paused by a user")
    assert _ended(tmp_path, run_file) == 0
    assert read_outcome(run_file.outcome_path) is Outcome.STOPPED


@pytest.mark.parametrize(("lock", "made"), [("none.lock", None), ("folder", "mkdir"), ("link", "/etc/passwd")])
def test_a_lock_that_is_no_file_of_the_code_fails_the_job(tmp_path: Path, lock: str, made: str | None) -> None:
    run_file = _attempt(tmp_path, {"lock": lock})
    if made == "mkdir":
        (tmp_path / "output" / lock).mkdir()
    elif made is not None:  # of an earlier attempt's process
        (tmp_path / "output" / lock).symlink_to(made)
    assert _ended(tmp_path, run_file) == 1
    [(_, failure)] = SpoolReader(run_file.spool_path(0)).read()
    assert failure.message == f"the job's code has no file {lock!r}, which its environment names as the lock"  # type: ignore[attr-defined]


def test_a_folder_of_environments_that_cannot_be_used_hands_the_job_back(tmp_path: Path) -> None:
    run_file = _attempt(tmp_path, {"requirements": []}, environments_dir=Path("/dev/full/none"))
    assert _ended(tmp_path, run_file) == 1
    [(_, failure)] = SpoolReader(run_file.spool_path(0)).read()
    assert (failure.error, "Not a directory" in failure.message) == ("WorkerLacks", True)  # type: ignore[attr-defined]
