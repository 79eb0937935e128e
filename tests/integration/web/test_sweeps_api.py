"""`/api/sweeps`: made once, watched, steered as one; each wrong request names its field."""

from typing import Any

import httpx
import pytest

from apt_jobs.db import jobs
from apt_jobs.jobs.states import JobState
from tests.integration.db.steps import claim, started, store, trained
from tests.integration.web.served import Served, until

pytestmark = pytest.mark.parametrize("served", ["direct"], indirect=True)
RATE = "training.learning_rate"
BODY: dict[str, Any] = {
    "spec": {"kind": "train"},
    "parameters": {RATE: {"values": [0.1, 0.01]}},
    "metric": "train_loss",
}


LEARNS = {"method": "tpe", "num_jobs": 1, "max_running": 1}


def make(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer: dict[str, Any] = http.post("/api/sweeps", json={**BODY, **fields}).raise_for_status().json()
    return answer


def run(served: Served, loss: float, outcome: JobState = JobState.SUCCEEDED) -> str:
    """Let the next job reach step 10 with a loss, and end."""
    job = claim(served.database)
    store(served.database, job, started(), *(trained(step, loss) for step in range(1, 11)))
    with served.database.write() as session:
        jobs.finish(session, job.id, job.attempt, outcome)
    return job.id


def test_a_sweep_says_how_far_it_is_and_which_job_is_best(served: Served, http: httpx.Client) -> None:
    sweep = make(http, name="rates", max_running=1)
    path = f"/api/sweeps/{sweep['id']}"
    assert (sweep["state"], sweep["progress"]["states"], sweep["best"]) == ("running", {"queued": 2}, None)
    held = http.get(f"/api/jobs/{sweep['table'][1]['jobs'][0]['id']}").json()
    assert held["sweep_id"] == sweep["id"]
    assert held["waiting_for"] == f"its sweep {sweep['id']} runs as many jobs at once as it may"
    run(served, 2.0)
    until(lambda: http.get("/api/jobs", params={"state": "queued"}).json()["data"][0]["queue_position"] == 1)
    better = run(served, 1.0)
    until(lambda: http.get(path).json()["finished_at"])
    ended = http.get(path).json()
    assert (ended["state"], ended["reason"]) == ("succeeded", None)
    assert ended["best"] == {
        "number": ended["table"][0]["number"],
        "parameters": ended["table"][0]["parameters"],
        "value": 1.0,
        "interval": None,
        "job_id": better,
    }
    assert [row["value"] for row in ended["table"]] == [1.0, 2.0]
    listed = http.get("/api/sweeps").json()
    assert [(one["id"], one["table"], one["state"]) for one in listed["data"]] == [(sweep["id"], None, "succeeded")]


def test_repeats_have_a_mean_and_an_interval_and_nan_is_never_best(served: Served, http: httpx.Client) -> None:
    sweep = make(http, repeats=2)
    by_job = {job["id"]: row["number"] for row in sweep["table"] for job in row["jobs"]}
    for _ in by_job:
        job = claim(served.database)
        loss = 1.0 + len(job.id) if by_job[job.id] == 1 else float("nan")
        store(served.database, job, started(), trained(1, loss))
        with served.database.write() as session:
            jobs.finish(session, job.id, job.attempt, JobState.SUCCEEDED)
    table = http.get(f"/api/sweeps/{sweep['id']}").json()["table"]
    assert [row["number"] for row in table] == [1, 2]
    assert table[0]["interval"] == [table[0]["value"]] * 2
    assert table[1]["value"] is None
    assert {job["value"] for job in table[1]["jobs"]} == {"NaN"}


@pytest.mark.parametrize(
    ("metric", "outcome", "why"),
    [
        ("never", JobState.SUCCEEDED, "no job reported the metric 'never'; what they reported: epoch, eta_s"),
        ("train_loss", JobState.FAILED, "no job succeeded"),
    ],
)
def test_a_sweep_without_a_value_failed_and_says_why(
    served: Served, http: httpx.Client, metric: str, outcome: JobState, why: str
) -> None:
    sweep = make(http, metric=metric)
    for _ in range(2):
        run(served, 1.0, outcome)
    ended = http.get(f"/api/sweeps/{sweep['id']}").json()
    assert (ended["state"], ended["best"]) == ("failed", None)
    assert ended["reason"].startswith(why)


def test_a_sweep_is_paused_resumed_and_cancelled_as_one(http: httpx.Client) -> None:
    path = f"/api/sweeps/{make(http)['id']}"
    for verb, state, of_jobs in (
        ("pause", "paused", {"paused": 2}),
        ("pause", "paused", {"paused": 2}),
        ("resume", "running", {"queued": 2}),
        ("resume", "running", {"queued": 2}),
        ("cancel", "cancelled", {"cancelled": 2}),
    ):
        answer = http.post(f"{path}/{verb}").raise_for_status().json()
        assert (answer["state"], answer["progress"]["states"]) == (state, of_jobs), verb
    for verb in ("pause", "resume", "cancel"):
        refused = http.post(f"{path}/{verb}")
        assert (refused.status_code, "has ended" in refused.json()["detail"]) == (409, True)
    assert http.post("/api/sweeps/sweep_nope/cancel").status_code == http.get("/api/sweeps/nope").status_code == 404


def test_a_key_makes_one_sweep(http: httpx.Client) -> None:
    headers = {"idempotency-key": "one"}
    first, again = (http.post("/api/sweeps", json=BODY, headers=headers) for _ in range(2))
    assert first.json()["id"] == again.json()["id"]
    assert (first.status_code, again.headers["idempotent-replayed"]) == (202, "true")
    other = http.post("/api/sweeps", json={**BODY, "seed": 2}, headers=headers)
    assert other.status_code == 422
    assert http.get("/api/jobs").json()["data"][0]["sweep_id"] == first.json()["id"]
    assert len(http.get("/api/jobs").json()["data"]) == 2


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"parameters": {"training.nope": {"values": [1]}}}, "#/parameters/training.nope"),
        ({"parameters": {"dataset": {"values": ["absent"]}}}, "#/parameters/dataset"),
        ({"spec": {"kind": "train", "base_model": "absent"}}, "#/spec/base_model"),
        ({"parameters": {}}, "#/parameters"),
        ({"parameters": {"training.seed": {"values": list(range(1_001))}}}, "#/parameters/training.seed"),
        ({"parameters": {"a": {"values": list(range(1_000))}, "b": {"values": list(range(1_000))}}}, "#/parameters"),
        ({"method": "magic"}, "#/method"),
        ({**LEARNS, "parameters": {"dataset": {"values": [None, "absent"]}}}, "#/parameters/dataset"),
        ({**LEARNS, "parameters": {"training.batch_size": {"values": [1, -1]}}}, "#/parameters/training.batch_size"),
    ],
)
def test_a_wrong_sweep_names_its_field_and_leaves_nothing(
    http: httpx.Client, fields: dict[str, Any], pointer: str
) -> None:
    answer = http.post("/api/sweeps", json={**BODY, **fields})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"].startswith(pointer), answer.json()
    assert http.get("/api/jobs").json()["data"] == http.get("/api/sweeps").json()["data"] == []


def test_a_sweep_that_learns_needs_optuna(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apt_jobs.jobs.sweep_sampler.is_installed", lambda: False)
    answer = http.post("/api/sweeps", json={**BODY, **LEARNS})
    assert answer.status_code == 422
    assert "apt-jobs[sweeps]" in answer.json()["errors"][0]["detail"]
    assert http.post("/api/sweeps", json=BODY).status_code == 202
