"""A job of a user's own script shows what it told, and no model, speed or number of epochs that nobody gave."""

import math
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from apt_jobs.db.events import append_events
from apt_jobs.db.jobs import claim, finish, insert_job
from apt_jobs.db.series.custom_metrics import custom_metrics
from apt_jobs.events.kinds import MetricsLogged, ProgressReported, StepTrained
from apt_jobs.jobs.model_config import APTConfig
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.jobs.states import JobState
from tests.integration.web.served import DEADLINE_S, LEASE_S, Served


def _job(served: Served, **fields: Any) -> str:
    with served.database.write() as session:
        job_id = insert_job(session, TrainSpec(kind="train", **fields)).id
        claim(session, job_id, "test", LEASE_S)
    return job_id


def _trained(tokens_per_s: float) -> StepTrained:
    return StepTrained(
        step=1, epoch=0, train_loss=2.5, learning_rate=1e-3, grad_norm=1.0, step_time_ms=5.0, tokens_per_s=tokens_per_s
    )


@pytest.mark.parametrize("served", ["plain"], indirect=True)
def test_nothing_is_shown_that_nobody_gave(served: Served) -> None:
    job_id = _job(served, entry_point="mine")
    served.say(job_id, _trained(0.0))
    with httpx.Client(
        base_url=f"http://127.0.0.1:{served.settings.port}", headers=served.headers, timeout=DEADLINE_S, trust_env=False
    ) as client:
        job = client.get(f"/api/jobs/{job_id}").json()
        assert (job["spec"]["model"], job["progress"]["tokens_per_s"]) == (None, None)
        assert job["progress"]["train_loss"] == 2.5
        assert client.post("/api/jobs", json=job["spec"]).status_code == 202  # it can be submitted again
        status = client.get("/api/training/status", params={"job_id": job_id}).json()
        assert (status["tokens_per_s"], status["num_epochs"], status["step"]) == (None, None, 1)
        history = client.get("/api/training/history", params={"job_id": job_id}).json()
        assert history["model_config"] == {}
        assert history["training_history"]["tokens_per_s"] == [None]
        assert history["training_history"]["train_loss"] == [2.5]


@pytest.mark.parametrize("served", ["plain"], indirect=True)
def test_what_was_given_is_shown(served: Served) -> None:
    with_model = _job(served, entry_point="mine", model=APTConfig(d_model=64))
    builtin = _job(served)
    for job_id in (with_model, builtin):
        served.say(job_id, _trained(1234.5))
    with httpx.Client(
        base_url=f"http://127.0.0.1:{served.settings.port}", headers=served.headers, timeout=DEADLINE_S, trust_env=False
    ) as client:
        job = client.get(f"/api/jobs/{with_model}").json()
        assert (job["spec"]["model"]["d_model"], job["progress"]["tokens_per_s"]) == (64, 1234.5)
        job = client.get(f"/api/jobs/{builtin}").json()
        assert (job["spec"]["model"]["d_model"], job["progress"]["tokens_per_s"]) == (128, 1234.5)
        assert job["queue_position"] is None
        client.post(f"/api/jobs/{builtin}/cancel")
        cancelled = client.post("/api/jobs", json={"kind": "train"}).json()["id"]
        client.post(f"/api/jobs/{cancelled}/cancel")
        job = client.get(f"/api/jobs/{cancelled}").json()
        assert (job["state"], job["queue_position"], job["waiting_for"]) == ("cancelled", None, None)


@pytest.mark.parametrize("served", ["plain"], indirect=True)
def test_custom_metrics_are_shown_downsampled_and_exported(served: Served) -> None:
    job_id = _job(served, entry_point="mine")
    for step in range(1, 101):
        rank_0 = MetricsLogged(step, 0, {"eval/bleu": math.nan if step == 50 else float(step), "count": step})
        served.say(job_id, rank_0, MetricsLogged(step, 1, {"eval/bleu": -1.0, "rank1/only": 1.0}))
    served.say(job_id, MetricsLogged(1000, 0, {"train_loss": 3.5, "never": math.nan}))
    served.say(job_id, ProgressReported(100, 400, 12.5))
    with httpx.Client(
        base_url=f"http://127.0.0.1:{served.settings.port}", headers=served.headers, timeout=DEADLINE_S, trust_env=False
    ) as client:
        custom = client.get(f"/api/jobs/{job_id}/metrics").json()["custom"]
        assert list(custom) == ["eval/bleu", "count", "rank1/only", "train_loss", "never"]
        bleu = custom["eval/bleu"]
        assert (bleu["steps"], bleu["values"][49], bleu["values"][99]) == (list(range(1, 101)), "NaN", 100.0)
        assert (bleu["last"], bleu["min"], bleu["max"]) == (100.0, 1.0, 100.0)
        assert (custom["never"]["last"], custom["never"]["min"]) == ("NaN", None)
        few = client.get(f"/api/jobs/{job_id}/metrics", params={"points": 10}).json()["custom"]["eval/bleu"]
        assert len(few["steps"]) == 10
        assert few["steps"][-1] == 100
        assert "NaN" in few["values"]
        part = client.get(f"/api/jobs/{job_id}/metrics", params={"from_step": 10, "to_step": 12}).json()["custom"]
        assert part["count"]["values"] == [10.0, 11.0, 12.0]
        assert "train_loss" not in part
        job = client.get(f"/api/jobs/{job_id}").json()
        assert (job["step"], job["num_steps"], job["progress"]["eta_s"]) == (100, 400, 12.5)
        summary = job["progress"]["metrics"]["eval/bleu"]
        assert (summary["last"], summary["best"], summary["best_step"], summary["goal"]) == (100.0, 100.0, 100, "max")
        lines = client.get(f"/api/jobs/{job_id}/export", params={"format": "csv"}).text.splitlines()
        header, first, last = lines[0].split(","), lines[1].split(","), lines[-1].split(",")
        assert header[-5:] == ["eval/bleu", "count", "rank1/only", "custom/train_loss", "never"]
        assert (first[0], first[-5:-3], last[0], last[-2:]) == ("1", ["1.0", "1.0"], "1000", ["3.5", "NaN"])
        for form in ("json", "parquet", "tensorboard", "wandb"):
            assert client.get(f"/api/jobs/{job_id}/export", params={"format": form}).status_code == 200


@pytest.mark.parametrize("served", ["plain"], indirect=True)
def test_what_a_later_attempt_does_again_counts(served: Served) -> None:
    job_id = _job(served, entry_point="mine", max_attempts=5)
    served.say(job_id, *(MetricsLogged(step, 0, {"a": 1.0}) for step in range(1, 16)))
    with served.database.write() as session:
        finish(session, job_id, 1, JobState.QUEUED, reason="lost")
        claim(session, job_id, "test", LEASE_S)
        events = [(datetime.now(UTC), MetricsLogged(step, 0, {"a": 2.0})) for step in (11, 12)]
        append_events(session, job_id, 2, events, LEASE_S)
    with served.database.read() as session:
        series = custom_metrics(session, job_id)["a"]
    assert series.steps_N.tolist() == list(range(1, 13))
    assert series.values_N.tolist() == [1.0] * 10 + [2.0] * 2
