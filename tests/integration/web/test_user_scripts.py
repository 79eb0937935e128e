"""A job of a user's own script shows what it told, and no model, speed or number of epochs that nobody gave."""

from typing import Any

import httpx
import pytest

from apt_jobs.db.jobs import claim, insert_job
from apt_jobs.events.kinds import StepTrained
from apt_jobs.jobs.spec import APTConfig, TrainSpec
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
