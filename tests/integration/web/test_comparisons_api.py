"""`/api/compare` by ids, filter and sweep; what cannot be compared is named, wrong requests name their field."""

from typing import Any

import httpx
import pytest

from apt_jobs.db.jobs import finish, insert_job
from apt_jobs.jobs.spec import GenerateSpec
from apt_jobs.jobs.states import JobState
from tests.integration.db.steps import claim, running, started, store, submit, trained
from tests.integration.web.served import Served

pytestmark = pytest.mark.parametrize("served", ["direct"], indirect=True)


def run(served: Served, loss: float, **fields: Any) -> str:
    job = running(served.database, **fields)
    store(served.database, job, started(), *(trained(step, loss) for step in range(1, 11)))
    with served.database.write() as session:
        finish(session, job.id, job.attempt, JobState.SUCCEEDED)
    return job.id


def compare(http: httpx.Client, **params: Any) -> dict[str, Any]:
    answer: dict[str, Any] = http.get("/api/compare", params=params).raise_for_status().json()
    return answer


def test_jobs_are_compared_by_ids_and_what_is_none_is_named(served: Served, http: httpx.Client) -> None:
    fast = run(served, 2.0, name="fast", training={"learning_rate": 0.1}, labels={"team": "a"})
    slow = run(served, float("nan"), training={"learning_rate": 0.01}, labels={"team": "a"})
    waiting = submit(served.database, training={"learning_rate": 0.1, "batch_size": 4})
    with served.database.write() as session:
        generation = insert_job(session, GenerateSpec(kind="generate", texts=["a"])).id
    ids = f"{slow},{fast},{waiting},{fast},{generation},job_gone"
    answer = compare(http, jobs=ids, baseline=fast, at_step=5)
    assert [job["id"] for job in answer["jobs"]] == [slow, fast, waiting]
    assert (answer["jobs"][1]["name"], answer["jobs"][1]["state"], answer["jobs"][2]["step"]) == (
        "fast",
        "succeeded",
        None,
    )
    refused = {one["id"]: one["why"] for one in answer["not_compared"]}
    assert refused == {
        fast: "it was named twice, and is there once",
        generation: "its kind is generate; training jobs are compared",
        "job_gone": "there is no such job; it may have been deleted",
    }
    assert answer["settings"]["training.learning_rate"] == [0.01, 0.1, 0.1]
    assert answer["settings"]["labels.team"] == ["a", "a", None]
    assert {"training.batch_size", "training.learning_rate", "labels.team"} >= answer["settings"].keys() - {"labels"}
    loss = answer["metrics"]["train_loss"]
    assert loss["last"] == ["NaN", 2.0, None]
    assert loss["best"] == [None, 2.0, None]
    assert loss["at"] == ["NaN", 2.0, None]
    assert loss["last_delta"] == [None, 0.0, None]
    assert (answer["baseline"], answer["x"], answer["is_complete"]) == (fast, "step", True)
    assert answer["points"] == list(range(1, 11))
    assert answer["series"]["train_loss"] == [["NaN"] * 10, [2.0] * 10, [None] * 10]
    by_filter = compare(http, filter="label:team=a", metrics="train_loss", points=2, x="tokens")
    assert [job["id"] for job in by_filter["jobs"]] == [slow, fast]
    assert by_filter["points"] == [1408.0, 2560.0]
    assert list(by_filter["series"]) == ["train_loss"]
    gone = compare(http, jobs=fast, baseline="job_gone")
    assert gone["baseline"] is None
    assert gone["not_compared"][0]["id"] == "job_gone"


def test_a_sweep_is_compared_best_first_with_its_objective(served: Served, http: httpx.Client) -> None:
    body = {
        "spec": {"kind": "train"},
        "parameters": {"training.learning_rate": {"values": [0.1, 0.01, 0.001]}},
        "metric": "train_loss",
    }
    sweep = http.post("/api/sweeps", json=body).raise_for_status().json()
    ended = []
    for loss in (2.0, 1.0):
        job = claim(served.database)
        store(served.database, job, started(), trained(1, loss))
        ended.append(job.id)
    answer = compare(http, sweep=sweep["id"])
    assert [job["id"] for job in answer["jobs"]][:2] == ended[::-1]
    assert answer["num_matched"] == 3
    assert answer["objective"] == {"metric": "train_loss", "goal": "min"}
    assert list(answer["settings"]) == ["training.learning_rate"]


WRONG: list[tuple[dict[str, Any], int, str]] = [
    ({}, 422, "one of jobs, filter and sweep"),
    ({"jobs": "a", "sweep": "b"}, 422, "one of jobs, filter and sweep"),
    ({"jobs": "a,,b"}, 422, "an id is empty"),
    ({"jobs": ",".join(f"job_{number}" for number in range(101))}, 422, "at most 100"),
    ({"filter": "state:nonsense"}, 422, "nonsense"),
    ({"filter": " "}, 422, "empty"),
    ({"jobs": "a", "x": "days"}, 422, "step"),
    ({"jobs": "a", "points": 0}, 422, "points"),
    ({"jobs": "a", "metrics": ",".join("abcdefghijklmnopqrstu")}, 422, "at most"),
    ({"jobs": "a", "colour": "red"}, 422, "colour"),
    ({"jobs": "a,b"}, 404, "no training job to compare (a: there is no such job"),
    ({"filter": "nobody"}, 404, "no training job to compare"),
    ({"sweep": "sweep_gone"}, 404, "no sweep"),
]


def test_wrong_requests_say_what_is_wrong(served: Served, http: httpx.Client) -> None:
    for params, status, words in WRONG:
        answer = http.get("/api/compare", params=params)
        assert answer.status_code == status, answer.text
        assert words in answer.text
