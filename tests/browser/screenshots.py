"""Takes the pictures of docs/images from a real training: `make screenshots` runs this file with pytest."""

import time
from collections.abc import Callable
from pathlib import Path

from tests.browser.conftest import ROOT, RunningStack, Watched, wait_until

IMAGES = ROOT / "docs" / "images"
TRAIN_DEADLINE_S = 300.0
SHOWN_STEP = 220
DEMO = {
    "kind": "train",
    "name": "pydoc language model",
    "labels": {"team": "docs"},
    "num_ranks": 2,
    "model": {"d_model": 96, "num_layers": 4, "num_attention_heads": 4, "vocab_size": 1024, "max_seq_len": 96},
    "training": {
        "epochs": 50,
        "max_steps": 400,
        "batch_size": 8,
        "learning_rate": 0.003,
        "warmup_steps": 20,
        "validate_every_steps": 40,
        "checkpoint_every_steps": 100,
    },
    "monitor": {"exploding_above": 1.2},  # low enough for a few real anomalies at the start
}


def test_pictures_of_a_live_training(stack: RunningStack, open_window: Callable[..., Watched]) -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    job = stack.post("/api/jobs", DEMO)

    def step() -> int:
        return stack.get(f"/api/jobs/{job['id']}")["step"] or 0

    wait_until(lambda: step() >= SHOWN_STEP, TRAIN_DEADLINE_S, f"step {SHOWN_STEP}")
    url = f"{stack.url}/jobs/{job['id']}"
    for scheme, suffix in (("light", ""), ("dark", "-dark")):
        _shoot(open_window(1440, 980, scheme), url, IMAGES / f"job-live{suffix}.png")
        _shoot(open_window(1440, 1380, scheme), f"{url}#gradients", IMAGES / f"gradients{suffix}.png")
    _shoot(open_window(390, 844, "dark"), url, IMAGES / "job-live-phone.png")
    _shoot(open_window(1440, 700), stack.url, IMAGES / "jobs.png")


def test_picture_of_the_schedules(stack: RunningStack, open_window: Callable[..., Watched]) -> None:
    short = {**DEMO, "num_ranks": 1, "training": {"max_steps": 5, "batch_size": 1}}
    nightly = {"name": "nightly training", "cron": "30 3 * * 1-5", "time_zone": "Europe/Berlin", "job": short}
    schedule_id = stack.post("/api/schedules", nightly)["id"]
    weekly = {"name": "weekly report", "cron": "@weekly", "time_zone": "America/New_York", "overlap": "cancel"}
    stack.post("/api/schedules", {**weekly, "job": {"kind": "generate", "texts": ["This week"], "name": "report"}})

    def last_state() -> str | None:
        run = stack.get(f"/api/schedules/{schedule_id}")["last_run"]
        return None if run is None else str(run["job_state"])

    for _ in range(2):
        stack.post(f"/api/schedules/{schedule_id}/run", {})
        wait_until(lambda: last_state() == "succeeded", TRAIN_DEADLINE_S, "a run is done")
    _shoot(open_window(1440, 800), f"{stack.url}/schedules#{schedule_id}", IMAGES / "schedules.png")


def test_picture_of_a_comparison(stack: RunningStack, open_window: Callable[..., Watched]) -> None:
    training = {**DEMO["training"], "max_steps": 60, "validate_every_steps": 20}  # type: ignore[dict-item]
    sweep = {
        "name": "learning rates",
        "spec": {**DEMO, "num_ranks": 1, "name": "rates", "training": training},
        "parameters": {"training.learning_rate": {"values": [0.0003, 0.003, 0.03]}},
        "metric": "val_loss",
    }
    sweep_id = stack.post("/api/sweeps", sweep)["id"]
    wait_until(
        lambda: stack.get(f"/api/sweeps/{sweep_id}")["finished_at"] is not None, TRAIN_DEADLINE_S, "the sweep ended"
    )
    ids = [row["jobs"][0]["id"] for row in stack.get(f"/api/sweeps/{sweep_id}")["table"]]
    _shoot(open_window(1440, 1200), f"{stack.url}/compare?jobs={','.join(ids)}", IMAGES / "compare.png")


def test_pictures_of_the_other_pages(stack: RunningStack, open_window: Callable[..., Watched]) -> None:
    for path, height in (("new-job", 1100), ("generate", 800), ("workers", 700)):
        address = "/jobs/new" if path == "new-job" else f"/{path}"
        _shoot(open_window(1440, height), f"{stack.url}{address}", IMAGES / f"{path}.png")


def _shoot(window: Watched, url: str, file: Path) -> None:
    page = window.context.new_page()
    page.goto(url)
    page.locator("main h1").wait_for()
    page.wait_for_load_state("networkidle")
    time.sleep(1.0)  # a picture needs no condition, only a second of live points
    page.screenshot(path=file)
