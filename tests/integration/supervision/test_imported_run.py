"""A run outside of any job: recorded by two plain processes or one, imported once, shown like any other job."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apt_jobs.db.engine import Database
from apt_jobs.db.events import events_after
from apt_jobs.db.jobs import claim_next, get_job, reap_expired
from apt_jobs.db.listing import list_jobs
from apt_jobs.db.series.histories import gradient_export, training_history
from apt_jobs.db.steering import delete_job
from apt_jobs.errors import Conflict, InvalidInput
from apt_jobs.events.kinds import (
    CheckpointSaved,
    Event,
    GradientsRecorded,
    LayersNamed,
    RankGradientsRecorded,
    StoredEvent,
)
from apt_jobs.events.spool import SpoolReader, SpoolWriter
from apt_jobs.supervision import imported_run
from apt_jobs.supervision.imported_run import import_run
from apt_jobs.web.api.overviews import training_curves

ROOT = Path(__file__).resolve().parents[3]
NUM_STEPS = 22


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the plain example on two ranks, as its user would start it.

    But for its end: a rank that PyTorch takes apart aborts now and then, see `leave`.
    """
    folder = tmp_path_factory.mktemp("work")
    rank = folder / "rank.py"
    rank.write_text(
        "import runpy\nfrom apt_jobs.training.run import leave\n"
        f"runpy.run_path({str(ROOT / 'examples' / 'plain_loop.py')!r}, run_name='__main__')\nleave(0)\n"
    )
    command = [
        *(sys.executable, "-m", "apt_jobs.training.launch_ranks", "--nproc-per-node=2", "--rdzv-backend=apt-jobs"),
        *("--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"),
        *(str(rank), f"--steps={NUM_STEPS}"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]
    (run,) = (folder / "apt_jobs_runs").iterdir()
    return run


def test_a_run_becomes_a_job_with_the_events_of_all_ranks(database: Database, run: Path) -> None:
    assert sorted(path.name for path in run.iterdir()) == ["rank-0.spool", "rank-1.spool"]
    job_id, is_new = import_run(database, run, "my run")
    assert is_new
    with database.read() as session:
        job = get_job(session, job_id)
        events = events_after(session, job_id, 0, 10_000)
        history = training_curves(training_history(session, job_id, 1_000))
        gradients = gradient_export(session, job_id, 1_000)
    assert (job.state, job.name, job.labels, job.step) == ("succeeded", "my run", {"imported": run.name}, NUM_STEPS)
    assert job.reason == f"imported from {run.name}"
    assert [event.seq for event in events] == list(range(1, job.last_seq + 1))
    kinds = [event.kind for event in events]
    assert kinds.count("gradient") == kinds.count("metric") == kinds.count("ranks") == NUM_STEPS
    assert {json.loads(event.payload)["rank"] for event in events if event.kind == "rank_gradient"} == {0, 1}
    assert history.steps == list(range(1, NUM_STEPS + 1))
    assert gradients["total_steps"] == NUM_STEPS


def test_the_same_run_is_imported_once(database: Database, run: Path) -> None:
    first, again = import_run(database, run), import_run(database, run, "another name")
    assert (first[1], again) == (True, (first[0], False))
    with database.read() as session:
        assert len(list_jobs(session)[0]) == 1


def test_no_worker_gets_an_imported_job(database: Database, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = imported_run._store

    def look_first(*arguments: Any) -> None:
        with database.write() as session:
            assert claim_next(session, "train", "worker", 60.0) is None
            assert claim_next(session, "imported", "worker", 60.0) is None
        store(*arguments)

    monkeypatch.setattr(imported_run, "_store", look_first)
    assert import_run(database, run)[1]


def test_an_import_that_broke_off_is_dead_and_can_be_done_again(
    database: Database, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_off(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(imported_run, "_store", break_off)
    monkeypatch.setattr(imported_run, "LEASE_S", 0.05)
    with pytest.raises(KeyboardInterrupt):
        import_run(database, run)
    monkeypatch.undo()
    deadline = time.monotonic() + 30.0
    ended: list[StoredEvent] = []
    while not ended:
        assert time.monotonic() < deadline
        time.sleep(0.05)
        with database.write() as session:
            ended = reap_expired(session, 0.0)
    with pytest.raises(Conflict, match=r"is dead: job job_.*; delete that job"):
        import_run(database, run)
    with database.write() as session:
        delete_job(session, ended[0].job_id)
    assert import_run(database, run)[1]


def test_a_half_written_last_line_is_left_out(database: Database, tmp_path: Path) -> None:
    path = _spool(tmp_path, 0, LayersNamed(("a",)), GradientsRecorded(1, (1.0,), ()))
    with path.open("ab") as file:
        file.write(b'{"at":"2026-')
    job_id, _ = import_run(database, tmp_path)
    with database.read() as session:
        kinds = [event.kind for event in events_after(session, job_id, 0, 100)]
    assert kinds == ["state", "state", "layers", "gradient", "state"]


NAMED = LayersNamed(("a",))


def _of_rank(rank: int, num_samples: int = 1) -> RankGradientsRecorded:
    return RankGradientsRecorded(1, rank, (1.0,), None, None, None, num_samples, False, 0)


@pytest.mark.parametrize(
    ("events", "fault"),
    [
        ([NAMED, CheckpointSaved("c", "../../etc", 1, 0, None, None, 1, False)], "line 2: .*no 'checkpoint' event"),
        ([GradientsRecorded(1, (1.0,), ())], "line 1: .*1 layers, and only 0 were named"),
        ([NAMED, GradientsRecorded(1, (1.0,), (7,))], "line 2: .*a layer 7"),
        ([NAMED, GradientsRecorded(2**60, (1.0,), ())], "line 2: .*out of bounds"),
        ([NAMED, GradientsRecorded(1, (1.0,), (), 2**40)], "line 2: .*out of bounds"),
        ([NAMED, _of_rank(3)], "line 2: .*another rank than 0"),
        ([NAMED, _of_rank(0, num_samples=0)], "line 2: .*out of bounds"),
    ],
)
def test_what_the_monitor_does_not_write_is_refused_by_line(
    database: Database, tmp_path: Path, events: list[Event], fault: str
) -> None:
    _spool(tmp_path, 0, *events)
    with pytest.raises(InvalidInput, match=rf"rank-0\.spool, {fault}"):
        import_run(database, tmp_path)
    with database.read() as session:
        assert list_jobs(session)[0] == []


@pytest.mark.parametrize(
    ("write", "fault"),
    [
        (lambda folder: None, "has no spool"),
        (lambda folder: _spool(folder, 1, NAMED), r"rank-0\.spool is not among them"),
        (lambda folder: (folder / "rank-0.spool").write_bytes(b"rubbish\n"), "line 1: not a spool line"),
        (lambda folder: (folder / "rank-0.spool").write_bytes(b"x" * (3 << 20)), "line 1: .*bytes; at most"),
    ],
)
def test_a_folder_that_is_no_run_is_refused(
    database: Database, tmp_path: Path, write: Callable[[Path], object], fault: str
) -> None:
    write(tmp_path)
    with pytest.raises(InvalidInput, match=fault):
        import_run(database, tmp_path)


def test_the_command_imports_into_a_service_that_never_ran(run: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "APT_JOBS_DATA_DIR": str(tmp_path / "data"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "apt_jobs", "import", str(run), "--name", "mine"]
    for word in ("imported", "was imported before"):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
        assert (done.returncode, word in done.stdout) == (0, True), done.stderr
    command[4] = str(tmp_path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, "has no spool" in done.stderr) == (2, True)


def test_a_plain_process_records_all_its_steps(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "plain_loop.py"), "--steps=5"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, timeout=240, check=True)
    (spool,) = tmp_path.glob("apt_jobs_runs/*/*.spool")
    events = [event for _, event in SpoolReader(spool).read()]
    assert [event.step for event in events if isinstance(event, GradientsRecorded)] == [1, 2, 3, 4, 5]


def _spool(folder: Path, rank: int, *events: Event) -> Path:
    path = folder / f"rank-{rank}.spool"
    with SpoolWriter(path) as writer:
        for event in events:
            writer.append(event)
    return path
