"""`apt_jobs.current_run()` as scripts use it: in processes of their own, on the files that a supervisor would make."""

import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apt_jobs.errors import NotFound
from apt_jobs.events.kinds import CheckpointRemoved, CheckpointSaved, LineLogged, MetricsLogged, ProgressReported
from apt_jobs.events.spool import SpoolReader
from apt_jobs.jobs.handover import Handover, read_handover
from apt_jobs.jobs.run_file import RunFile
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.run.current import Run

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A run file as a supervisor writes it, for two ranks."""
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "mine.txt").write_text("text")
    (tmp_path / "run" / "output").mkdir(parents=True)
    written = RunFile(
        job_id="job_1",
        attempt=2,
        spec=TrainSpec(kind="train", num_ranks=2, dataset="mine"),
        entry_point="script.py",
        dataset_file=tmp_path / "datasets" / "mine.txt",
        base_model_dir=None,
        resume_dir=None,
        resume_step=10,
        datasets_dir=tmp_path / "datasets",
        output_dir=tmp_path / "run" / "output",
        run_dir=tmp_path / "run",
        checkpoints_dir=tmp_path / "checkpoints",
        checkpoint_prefix="job_1",
    )
    file = tmp_path / "run" / "run.json"
    file.write_text(written.model_dump_json())
    return file


@pytest.fixture
def handover(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> Handover:
    monkeypatch.setenv("APT_JOBS_RUN_FILE", str(run_file))
    found = read_handover()
    assert found is not None
    return found


@pytest.fixture
def run(handover: Handover) -> Run:
    return Run(handover, rank=0)


def events(handover: Handover, rank: int = 0) -> list[Any]:
    return [event for _, event in SpoolReader(handover.spool_path(rank)).read()]


def metrics(handover: Handover) -> list[MetricsLogged]:
    return [event for event in events(handover) if isinstance(event, MetricsLogged)]


def warnings(handover: Handover) -> list[str]:
    return [event.message for event in events(handover) if isinstance(event, LineLogged)]


def python(script: str, cwd: Path, **environment: str) -> str:
    """Run a script in another process; what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_knows_its_job(run: Run, handover: Handover) -> None:
    assert (run.job_id, run.attempt, run.rank, run.num_ranks) == ("job_1", 2, 0, 2)
    assert run.output_dir == handover.output_dir
    assert run.dataset() == run.dataset("mine") == handover.dataset_file
    assert "MODULES" in run.dataset("pydoc-topics").read_text() or run.dataset("pydoc-topics").stat().st_size > 100_000
    for name in ("other", "../run/run.json", "a/b", ""):
        with pytest.raises(NotFound, match="no data set"):
            run.dataset(name)


def test_numbers_of_any_kind_are_logged_and_nan_is_kept(run: Run, handover: Handover) -> None:
    run.log({"eval/bleu": 31.5, "count": 3, "x": np.float32(0.5), "flag": True, "nan": math.nan}, step=7)
    run.log({"inf": -math.inf, "huge": 10**400, "whole": np.int64(4)})
    first, second = metrics(handover)
    assert (first.step, second.step) == (7, 8)
    assert {name: value for name, value in first.values.items() if name != "nan"} == {
        "eval/bleu": 31.5,
        "count": 3,
        "x": 0.5,
        "flag": 1,
    }
    assert math.isnan(first.values["nan"])
    assert second.values == {"inf": -math.inf, "huge": math.inf, "whole": 4}


def test_a_step_that_is_not_given_follows_the_resumed_one(run: Run, handover: Handover) -> None:
    run.log({"a": 1})
    assert metrics(handover)[0].step == 11


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"bad": "high"}, "metric 'bad' takes a number, not str 'high'"),
        ({"bad": None}, "metric 'bad' takes a number"),
        ({"bad": [1, 2]}, "metric 'bad' takes a number"),
        ({"bad": 1j}, "metric 'bad' takes a number"),
        ({"bad": np.zeros(3)}, "metric 'bad' takes a number"),
        ({"bad": object()}, "metric 'bad' takes a number"),
        ({"a\nb": 1.0}, r"'a\\nb' has a character that is not printable"),
        ({"\x1b[31m": 1.0}, "not printable"),
        ({"": 1.0}, "1 to 200 characters"),
        ({"n" * 201: 1.0}, "1 to 200 characters"),
        ({3: 1.0}, "1 to 200 characters"),
        (3.5, "takes a dict of numbers by name, not float 3.5"),
        (None, "takes a dict"),
    ],
)
def test_what_is_no_metric_is_said_once_and_loses_nothing_else(
    run: Run, handover: Handover, values: Any, says: str
) -> None:
    for step in range(3):
        run.log({**values, "good": step} if isinstance(values, dict) else values, step=step)
    run.log({"good": 3}, step=3)
    assert metrics(handover)[-1].values == {"good": 3}
    assert len(metrics(handover)) == (4 if isinstance(values, dict) else 1)
    (warning,) = warnings(handover)
    assert says in warning


@pytest.mark.parametrize("step", [-1, 1.5, "3", 2**60, math.nan, [1]])
def test_a_step_that_is_none_is_said_and_the_values_are_kept(run: Run, handover: Handover, step: Any) -> None:
    run.log({"a": 1}, step=step)
    assert (metrics(handover)[0].step, metrics(handover)[0].values) == (11, {"a": 1})
    assert "a step is an integer" in warnings(handover)[0]


def test_steps_that_go_back_are_kept_and_said_once(run: Run, handover: Handover) -> None:
    for step in (30, 20, 10):
        run.log({"a": step}, step=step)
    assert [event.step for event in metrics(handover)] == [30, 20, 10]
    assert len(warnings(handover)) == 1


def test_names_are_bounded(run: Run, handover: Handover) -> None:
    run.log({f"m{number}": number for number in range(10_000)}, step=1)
    run.log({"m3": 1.0, "new": 2.0}, step=2)
    assert len(metrics(handover)[0].values) == 500
    assert metrics(handover)[1].values == {"m3": 1.0}
    assert len(warnings(handover)) == 1
    assert "at most 500 metrics" in warnings(handover)[0]


def test_a_flood_is_bounded_and_its_last_values_are_kept(
    run: Run, handover: Handover, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_tokens", 10.0)
    for step in range(2_000):
        run.log({"a": step, f"b{step % 3}": step}, step=step)
    run.flush()
    found = metrics(handover)
    assert len(found) < 1_000
    assert found[-1].values["a"] == 1_999
    assert sum("a second" in warning for warning in warnings(handover)) == 1


def test_a_long_text_is_cut_and_strange_text_is_kept_readable(run: Run, handover: Handover) -> None:
    run.log_text("x" * 10_000_000)
    run.log_text("first\nsecond \ud800", level="error")
    lines = [event for event in events(handover) if isinstance(event, LineLogged)]
    assert sum(len(line.message) for line in lines) < 70_000
    assert any("is cut to" in line.message for line in lines)
    assert [(line.level, line.message) for line in lines[-2:]] == [("error", "first"), ("error", "second ?")]


def test_progress_is_written_seldom_and_its_end_always(run: Run, handover: Handover) -> None:
    for done in range(1_001):
        run.set_progress(done, 1_000)
    found = [event for event in events(handover) if isinstance(event, ProgressReported)]
    assert len(found) < 20
    assert (found[-1].step, found[-1].num_steps, found[-1].eta_s) == (1_000, 1_000, 0.0)


def test_a_checkpoint_is_copied_sealed_and_registered(run: Run, handover: Handover, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.bin").write_bytes(b"weights")
    (folder / "sub" / "b.json").write_text("{}")
    checkpoint_id = run.save_checkpoint(folder, step=20, metrics={"eval_loss": np.float32(2.0)})
    (folder / "a.bin").write_bytes(b"changed afterwards")
    (event,) = (event for event in events(handover) if isinstance(event, CheckpointSaved))
    assert (event.checkpoint_id, event.step, event.val_loss, event.is_best) == (checkpoint_id, 20, 2.0, True)
    assert event.filename == "job_1/step-00000020-a2"
    saved = tmp_path / "checkpoints" / "step-00000020-a2"
    assert (saved / "a.bin").read_bytes() == b"weights"
    manifest = json.loads((saved / "manifest.json").read_text())
    assert set(manifest["files"]) == {"a.bin", "sub/b.json"}
    assert manifest["files"]["a.bin"]["size_bytes"] == event.size_bytes - 2 == 7


def test_old_checkpoints_are_pruned_but_the_best_one(run: Run, handover: Handover, tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    for step, loss in enumerate([3.0, 1.0, 2.0, 2.5, 2.2, math.nan]):
        file.write_text(str(step))
        assert run.save_checkpoint(file, step=step, metrics={"val_loss": loss}) is not None
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [f"step-{step:08d}-a2" for step in (1, 3, 4, 5)]
    assert sum(isinstance(event, CheckpointRemoved) for event in events(handover)) == 2


def test_a_folder_can_be_moved_and_a_step_saved_twice(run: Run, tmp_path: Path) -> None:
    for _ in range(2):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "a").write_text("a")
        assert run.save_checkpoint(tmp_path / "mine", step=1, move=True) is not None
        assert not (tmp_path / "mine").exists()
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize("what", ["missing", "empty", "link", "fifo"])
def test_what_is_no_checkpoint_is_said_and_ends_no_training(
    run: Run, handover: Handover, tmp_path: Path, what: str
) -> None:
    folder = tmp_path / "mine"
    if what != "missing":
        folder.mkdir()
    if what == "link":
        (folder / "link").symlink_to("/etc/passwd")
    if what == "fifo":
        os.mkfifo(folder / "fifo")
    assert run.save_checkpoint(folder, step=1) is None
    assert "the checkpoint of step 1 is not saved" in warnings(handover)[0]
    assert not any(isinstance(event, CheckpointSaved) for event in events(handover))


def test_a_checkpoint_larger_than_the_disk_is_refused_at_once(run: Run, handover: Handover, tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    assert run.save_checkpoint(tmp_path / "sparse", step=1) is None
    assert "bytes" in warnings(handover)[0]
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_all_ranks_stop_at_the_same_call(handover: Handover, ahead: int) -> None:
    ranks = [Run(handover, rank=rank) for rank in range(2)]
    calls = [0, 0]

    def call(rank: int) -> bool:
        calls[rank] += 1
        return ranks[rank].should_stop()

    for _ in range(3):
        assert not call(0)
    for _ in range(3 + ahead):
        assert not call(1)
    (handover.run_dir / "stop").write_text("paused by a user")
    stopped_at = []
    for rank in range(2):
        while not call(rank):
            assert calls[rank] < 50
        stopped_at.append(calls[rank])
    assert stopped_at[0] == stopped_at[1] <= 3 + ahead + 1
    assert ranks[0].should_stop()
    assert ranks[1].stop_reason == "paused by a user"


def test_children_of_any_kind_find_the_run(run_file: Path, handover: Handover, tmp_path: Path) -> None:
    python(
        """
        import multiprocessing, os, sys
        import apt_jobs
        apt_jobs.current_run().log({"parent": 1}, step=1)
        def child(name):
            apt_jobs.current_run().log({name: 1}, step=2)
        worker = multiprocessing.get_context("fork").Process(target=child, args=("forked",))
        worker.start(); worker.join()
        os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c",
            "import apt_jobs; apt_jobs.current_run().log({'spawned': 1}, step=3)"])
        assert not {"torch", "pydantic", "sqlalchemy", "starlette"} & sys.modules.keys()
        """,
        tmp_path,
        APT_JOBS_RUN_FILE=str(run_file),
        RANK="0",
    )
    assert [set(event.values) for event in metrics(handover)] == [{"parent"}, {"forked"}, {"spawned"}]


def test_a_run_works_in_a_python_without_any_package(run_file: Path, handover: Handover, tmp_path: Path) -> None:
    script = "import apt_jobs; apt_jobs.current_run().log({'a': 1.5}, step=1)"
    environment = {"PATH": os.environ["PATH"], "APT_JOBS_RUN_FILE": str(run_file), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-S", "-c", script]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, timeout=60)
    assert metrics(handover)[0].values == {"a": 1.5}


def test_outside_of_a_job_there_is_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("APT_JOBS_RUN_FILE", raising=False)
    python(
        """
        import apt_jobs
        run = apt_jobs.current_run()
        assert run is apt_jobs.current_run() and run.job_id is None and not run.should_stop()
        (run.output_dir / "state").write_text("1")
        run.log({"eval/bleu": 1.5}, step=1)
        run.set_progress(1, 2)
        assert run.save_checkpoint(run.output_dir, step=1)
        """,
        tmp_path,
    )
    (folder,) = (tmp_path / "apt_jobs_runs").iterdir()
    kinds = [event.kind for _, event in SpoolReader(folder / "rank-0.spool").read()]
    assert kinds == ["metrics", "progress", "log"]
    assert (folder / "checkpoints" / "step-00000001-a1" / "state").read_text() == "1"


def test_a_disk_that_refuses_ends_no_training(handover: Handover, capsys: pytest.CaptureFixture[str]) -> None:
    handover.spool_path(0).mkdir()
    run = Run(handover, rank=0)
    for step in range(3):
        run.log({"a": 1}, step=step)
    assert capsys.readouterr().err.count("events cannot be written") == 1
