"""Images and tables that a script logs: what is kept, and what is left out with a sentence in the log."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from apt_jobs.events.kinds import Event, LineLogged, MediaLogged, MetricsLogged, ProgressReported
from apt_jobs.events.spool import SpoolReader
from apt_jobs.jobs.handover import Handover
from apt_jobs.jobs.media import MAX_IMAGE_BYTES, MAX_TABLE_ROWS, image_type
from apt_jobs.run import media
from apt_jobs.run.current import Run

ROOT = Path(__file__).resolve().parents[3]
SVG = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    folder = tmp_path / "job" / "attempt-1"
    folder.mkdir(parents=True)
    handover = Handover("job_1", 1, 1, folder, tmp_path / "job" / "output", tmp_path / "checkpoints", "job_1", 3)
    return Run(handover, rank=0)


def events_of(run: Run) -> list[Event]:
    return [event for _, event in SpoolReader(run._handover.spool_path(0)).read()]


def logged(run: Run) -> list[MediaLogged]:
    return [event for event in events_of(run) if isinstance(event, MediaLogged)]


def complaints(run: Run) -> str:
    return "\n".join(event.message for event in events_of(run) if isinstance(event, LineLogged))


def file_of(run: Run, event: MediaLogged) -> bytes:
    return (run._handover.media_dir / event.filename).read_bytes()


@pytest.mark.parametrize(
    ("array", "shape"),
    [
        (np.arange(12, dtype=np.uint8).reshape(3, 4), (3, 4)),
        (np.linspace(0, 1, 36).reshape(3, 4, 3), (3, 4)),
        (np.zeros((3, 4, 4), np.uint8), (3, 4)),
        (np.zeros((3, 4), bool), (3, 4)),
        (torch.rand(3, 5, 7, requires_grad=True), (5, 7)),
        (torch.zeros(1, 5, 7, dtype=torch.bfloat16), (5, 7)),
        (np.full((3, 4), np.nan), (3, 4)),
    ],
    ids=["grey", "floats", "alpha", "mask", "torch", "bfloat16", "nan"],
)
def test_arrays_become_images_that_others_read(run: Run, array: Any, shape: tuple[int, int]) -> None:
    run.log_image("samples/one", array, step=3, caption="a line")
    [event] = logged(run)
    assert (event.step, event.name, event.form, event.caption) == (3, "samples/one", "image", "a line")
    path = run._handover.media_dir / event.filename
    with Image.open(path) as image:
        image.load()
        assert (image.height, image.width) == shape


def test_what_is_no_image_is_left_out_with_a_sentence(run: Run, tmp_path: Path) -> None:
    for number, bad in enumerate((SVG, b"<html></html>", b"", 3, np.zeros((2, 2, 2, 2)), tmp_path / "missing.png")):
        run.log_image(f"bad{number}", bad)
    (tmp_path / "large.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(MAX_IMAGE_BYTES))
    run.log_image("large", tmp_path / "large.png")
    run.log_image("a\x1bname", np.zeros((2, 2)))
    assert logged(run) == []
    said = complaints(run)
    assert "the image 'bad0' is left out: an image is a PNG, a JPEG, a GIF or a WebP" in said
    assert "not 2 x 2 x 2 x 2" in said
    assert "the image 'large' is left out: an image has at most 10 MB" in said
    assert "printable characters" in said


def test_tables_of_every_form_are_kept_the_same_way(run: Run) -> None:
    rows = [{"text": "a", "score": 1.5}, {"text": "b", "extra": None}]
    run.log_table("rows", rows, step=1)
    run.log_table("columns", {"text": ["a", "b"], "score": np.array([1, 2])}, step=1)
    run.log_table("lists", [["a", float("nan")], ["b", 2**60]], columns=["text", "n"], step=1)
    run.log_table("odd", {"x": [{"a": 1}, "\ud800", "y" * 20_000]}, step=1)
    tables = {event.name: json.loads(file_of(run, event)) for event in logged(run)}
    assert tables["rows"] == {"columns": ["text", "score", "extra"], "rows": [["a", 1.5, None], ["b", None, None]]}
    assert tables["columns"]["rows"] == [["a", 1], ["b", 2]]
    assert tables["lists"]["rows"] == [["a", "nan"], ["b", str(2**60)]]
    assert tables["odd"]["rows"][:2] == [["{'a': 1}"], ["?"]]
    assert [event.num_rows for event in logged(run)] == [2, 2, 2, 3]


def test_tables_are_bounded(run: Run) -> None:
    run.log_table("long", {"x": list(range(MAX_TABLE_ROWS + 1))})
    run.log_table("wide", {f"c{number}": [1] for number in range(101)})
    run.log_table("heavy", {"x": ["y" * 9_000] * 1_000})
    run.log_table("ragged", [[1], [1, 2]], columns=["a"])
    run.log_table("nothing", 3)
    assert [(event.name, event.num_rows) for event in logged(run)] == [("long", MAX_TABLE_ROWS)]
    said = complaints(run)
    for words in ("first 10,000 rows", "at most 100 columns", "at most 4 MB", "row 1 of the table", "not int"):
        assert words in said


def test_a_job_has_so_many_files(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "MAX_JOB_FILES", 3)
    for step in range(5):
        run.log_image("x", np.zeros((2, 2)), step=step)
    assert [event.step for event in logged(run)] == [0, 1, 2]
    assert "a job has at most" in complaints(run)


def log(run: Run, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run `apt-jobs log` as a program of the job would."""
    file = run._handover.run_dir / "run.json"
    document = {
        "job_id": "job_1",
        "attempt": 1,
        "spec": {"num_ranks": 1},
        "run_dir": str(file.parent),
        "output_dir": str(run.output_dir),
        "checkpoints_dir": str(file.parent),
        "checkpoint_prefix": "job_1",
    }
    file.write_text(json.dumps(document))
    command = [sys.executable, "-X", "importtime", "-m", "apt_jobs", "log", *arguments]
    environment = {"APT_JOBS_RUN_FILE": str(file)} if arguments != ("nowhere=1",) else {}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


def test_any_program_logs_by_a_command_that_loads_little(run: Run, tmp_path: Path) -> None:
    run.log_image("seed", np.zeros((2, 2)), step=0)
    image = run._handover.media_dir / logged(run)[0].filename
    words = ["eval/bleu=31.5", "n=3", "bad=nan", "--step", "7", "--text", "a line", "--image", f"x/y={image}"]
    done = log(run, *words, "--progress", "7/10")
    assert done.returncode == 0, done.stderr
    loaded = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert loaded.isdisjoint({"typer", "pydantic", "numpy", "httpx", "sqlalchemy", "orjson"})
    events = events_of(run)
    [metrics] = [event for event in events if isinstance(event, MetricsLogged)]
    assert (metrics.step, list(metrics.values)) == (7, ["eval/bleu", "n", "bad"])
    assert [event.name for event in logged(run)] == ["seed", "x/y"]
    assert any(isinstance(event, LineLogged) and event.message == "a line" for event in events)
    assert ProgressReported(7, 10, None) in events


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("a=1",), "need --step"),
        (("a", "--step", "1"), "a metric is NAME=VALUE, not 'a'"),
        (("a=x", "--step", "1"), "'x' is no number"),
        (("--progress", "1/x"), "--progress is DONE or DONE/TOTAL"),
        (("nowhere=1",), "this is no process of a job"),
    ],
)
def test_a_wrong_call_is_one_sentence(run: Run, arguments: tuple[str, ...], words: str) -> None:
    done = log(run, *arguments)
    assert (done.returncode, words in done.stderr) == (2, True), done.stderr


def test_only_what_browsers_draw_is_an_image() -> None:
    assert image_type(b"RIFF\0\0\0\0WEBPVP8 ") == "image/webp"
    assert image_type(b"RIFF\0\0\0\0AVI ") is None
    assert image_type(SVG) is None
