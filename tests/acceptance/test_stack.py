"""The whole stack as a user has it: `apt-jobs up`, jobs over REST, faults from outside, nothing left behind."""

import gzip
import hashlib
import json
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from apt_jobs.client.client import Client
from apt_jobs.errors import Conflict, InvalidInput, NotFound
from tests.acceptance.stack import DEADLINE_S, LONG, TINY, Stack, marked, until


@pytest.fixture(scope="module")
def trained(stack: Stack) -> dict[str, Any]:
    """A job that trained to its end."""
    with stack.client() as client:
        return client.wait(client.submit(TINY)["id"])


def test_a_training_job_runs_to_its_end_and_says_everything(trained: dict[str, Any], client: Client) -> None:
    assert trained["state"] == "succeeded", trained
    assert (trained["step"], trained["num_steps"]) == (12, 12)
    events = []
    for event in client.events(trained["id"]):
        events.append(event)
        if event["seq"] == trained["last_seq"]:
            break
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    kinds = [event["kind"] for event in events]
    assert {"state", "started", "layers", "metric", "validation", "gradient", "checkpoint", "finished"} <= set(kinds)
    assert kinds.count("metric") == kinds.count("gradient") == 12
    assert [event["state"] for event in events if event["kind"] == "state"] == ["queued", "running", "succeeded"]
    losses = client.metrics(trained["id"])["train_loss"]
    assert losses[-1] < losses[0]
    joined = [event for event in events if event["kind"] == "ranks"]
    assert [(event["step"], len(event["losses"])) for event in joined] == [(step, 2) for step in range(1, 13)]
    assert {event["rank"] for event in events if event["kind"] == "rank_gradient"} == {0, 1}


def test_the_events_can_be_taken_up_anywhere(trained: dict[str, Any], client: Client) -> None:
    event = next(client.events(trained["id"], after=7))
    assert event["seq"] == 8


def test_training_endpoints_have_the_promised_payloads(trained: dict[str, Any], client: Client) -> None:
    history = client._json("GET", "/api/training/history", params={"job_id": trained["id"]})
    assert history["training_history"]["steps"] == list(range(1, 13))
    assert (history["model_config"]["d_model"], history["model_config"]["num_heads"]) == (16, 2)
    assert history["checkpoint_info"]["global_step"] == 12
    gradients = client._json("GET", "/api/training/gradients", params={"job_id": trained["id"]})
    assert gradients["total_steps"] == len(gradients["gradient_timeline"]) == 12
    name, statistics = next(iter(gradients["layer_statistics"].items()))
    assert statistics["total_steps"] == 12
    assert statistics["min"] <= statistics["mean"] <= statistics["max"]
    assert set(gradients["gradient_timeline"][0]["layers"][name]) == {"norm", "is_anomaly"}
    status = client._json("GET", "/api/training/status", params={"job_id": trained["id"]})
    assert (status["state"], status["is_training"], status["step"]) == ("succeeded", False, 12)


def test_text_is_generated_from_the_new_checkpoint(trained: dict[str, Any], client: Client) -> None:
    answer = client.generate("你好, world", max_length=5, model=trained["result"]["checkpoint_id"])
    assert answer["input_text"] == "你好, world"
    assert isinstance(answer["generated_text"], str)
    assert answer["generation_time_ms"] > 0
    batch = client._json("POST", "/api/batch_generate", json={"texts": ["a", "b"], "max_length": 3})
    assert (batch["batch_size"], [item["input"] for item in batch["results"]]) == (2, ["a", "b"])


def test_checkpoints_are_listed_loaded_downloaded_and_deleted(
    trained: dict[str, Any], client: Client, tmp_path: Path
) -> None:
    rows = client.checkpoints(trained["id"])
    assert [row["global_step"] for row in rows] == [12, 6]
    loaded = client._json("POST", "/api/checkpoints/load", json={"checkpoint_id": rows[0]["id"]})
    assert loaded["loaded"]
    models = client._json("GET", "/api/models")["data"]
    assert [model["id"] for model in models if model["is_default"]] == [rows[0]["id"]]
    client.download(rows[1]["id"], tmp_path / "checkpoint.tar")
    names = subprocess.run(["tar", "tf", tmp_path / "checkpoint.tar"], capture_output=True, text=True, check=True)
    assert f"{rows[1]['id']}/model.safetensors" in names.stdout.splitlines()
    client._http.delete(f"/api/checkpoints/{rows[1]['id']}").raise_for_status()
    assert [row["id"] for row in client.checkpoints(trained["id"])] == [rows[0]["id"]]
    with pytest.raises(NotFound):
        client.download(rows[1]["id"], tmp_path / "gone.tar")


def test_all_faults_of_a_job_are_named_at_once(client: Client) -> None:
    with pytest.raises(InvalidInput) as caught:
        client.submit({"kind": "train", "surprise": 1, "num_ranks": "two", "model": {"d_model": 7}})
    assert {"#/surprise", "#/num_ranks", "#/model/d_model"} <= {
        line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dataset": "nowhere"}, "#/dataset"),
        ({"base_model": "ckpt_00000000000000000000"}, "#/base_model"),
        ({"base_model": "nowhere"}, "#/base_model"),
    ],
)
def test_references_to_nothing_are_refused_at_once(client: Client, change: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        client.submit({**TINY, **change})


def _waits_for(client: Client, job_id: str, words: str) -> bool:
    return words in (client.get(job_id)["waiting_for"] or "")


def test_what_a_worker_lacks_fails_no_job(client: Client) -> None:
    lacks = [({"num_ranks": 64}, "64 ranks on CPU"), ({"num_nodes": 2}, "wants 2 nodes, and this worker has 1")]
    for change, words in lacks:
        job_id = client.submit({**TINY, **change})["id"]
        until(partial(_waits_for, client, job_id, words))
        assert client.get(job_id)["state"] == "queued"
        client.cancel(job_id)
    for worker in client.workers():  # two hand-backs in a row do not pause it, a third of another test would
        client.steer_worker(worker["name"], "resume")


def test_an_entry_point_that_no_worker_has_is_refused_at_once(client: Client) -> None:
    with pytest.raises(InvalidInput, match="one that a worker of the queue 'train' has registered"):
        client.submit({**TINY, "entry_point": "unknown"})


def test_a_training_that_asks_for_too_much_data_fails_with_the_reason(client: Client) -> None:
    options = {**TINY["training"], "batch_size": 4096, "gradient_accumulation_steps": 8}
    job = client.wait(client.submit({**TINY, "training": options})["id"])
    assert job["state"] == "failed"
    assert "one step needs" in job["reason"]


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [(b"", 422, "empty"), (b"\x00\x01", 422, "binary"), (b"\xff\xfe!", 422, "UTF-8")],
)
def test_a_data_set_that_is_no_text_is_refused(client: Client, content: bytes, status: int, words: str) -> None:
    answer = client._http.post("/api/datasets", params={"name": "bad"}, content=content)
    assert (answer.status_code, words in answer.json()["detail"]) == (status, True)


def test_an_uploaded_text_is_trained_on_and_a_short_one_refused(client: Client) -> None:
    client._http.post("/api/datasets", params={"name": "short"}, content=b"short").raise_for_status()
    with pytest.raises(InvalidInput, match="at least one sequence"):
        client.submit({**TINY, "dataset": "short"})
    text = ("In the beginning there was a short text, and it was long enough. " * 400).encode()
    client._http.post("/api/datasets", params={"name": "mine"}, content=text).raise_for_status()
    assert client._http.post("/api/datasets", params={"name": "mine"}, content=text).status_code == 409
    short = {**TINY["training"], "max_steps": 2, "validation_fraction": 0.0}
    job = client.wait(client.submit({**TINY, "dataset": "mine", "training": short})["id"])
    assert job["state"] == "succeeded", job


def test_formats_are_uploaded_listed_trained_on_and_refused_in_words(client: Client) -> None:
    rows = [json.dumps({"prompt": f"What is {number}? ", "completion": f"It is {number}."}) for number in range(400)]
    content = gzip.compress("\n".join(rows).encode())
    client.upload_dataset("pairs", content, format="jsonl")
    listed = {row["name"]: row for row in client.datasets()}["pairs"]
    assert (listed["format"], listed["size_bytes"]) == ("jsonl", len(content))
    assert listed["sha256"] == hashlib.sha256(content).hexdigest()
    assert listed["created_at"] is not None
    client.upload_dataset("broken", "\n".join([*rows, "{wrong", *rows]).encode(), format="jsonl")
    with pytest.raises(InvalidInput, match="does not begin as parquet"):
        client.upload_dataset("no-table", b"text and text", format="parquet")
    with pytest.raises(InvalidInput, match="is cut"):
        client.upload_dataset("odd", b"123", format="uint16")
    short = {**TINY["training"], "max_steps": 2, "validation_fraction": 0.0}
    jobs = [client.submit({**TINY, "dataset": name, "training": short})["id"] for name in ("pairs", "broken")]
    for name, job_id in zip(("pairs", "broken"), jobs, strict=True):
        with pytest.raises(Conflict, match=job_id):
            client.delete_dataset(name)
    trained, broken = (client.wait(job_id) for job_id in jobs)
    assert trained["state"] == "succeeded", trained
    assert broken["state"] == "failed"
    assert "line 401: not JSON" in broken["reason"]
    client.delete_dataset("pairs")
    assert "pairs" not in {row["name"] for row in client.datasets()}


def test_cancelling_a_running_job_ends_its_processes(client: Client) -> None:
    job_id = client.submit(LONG)["id"]
    until(lambda: (client.get(job_id)["step"] or 0) > 3)
    assert marked(job_id)
    began = time.monotonic()
    client.cancel(job_id)
    client.cancel(job_id)
    until(lambda: client.get(job_id)["state"] == "cancelled")
    assert time.monotonic() - began < 15
    until(lambda: not marked(job_id))


def test_an_ended_job_cannot_be_cancelled(trained: dict[str, Any], client: Client) -> None:
    with pytest.raises(Conflict, match="succeeded already"):
        client.cancel(trained["id"])


def test_strangers_are_kept_out(stack: Stack, client: Client) -> None:
    base = f"http://127.0.0.1:{stack.port}"
    key = client._headers["authorization"]
    with httpx.Client(base_url=base, trust_env=False) as stranger:
        assert stranger.get("/api/jobs").status_code == 401
        assert stranger.get("/api/jobs", headers={"authorization": "Bearer apt_0_0"}).status_code == 401
        assert stranger.get("/api/jobs", headers={"authorization": key, "host": "evil.example"}).status_code == 403
        assert stranger.get("/api/jobs", headers={"authorization": key, "origin": "http://evil"}).status_code == 403
        assert stranger.get("/login", params={"token": "guess"}).status_code == 401
        assert stranger.get("/healthz").status_code == 200
        assert stranger.get("/api/nothing").status_code == 401
        assert stranger.get("/api/nothing", headers={"authorization": key}).status_code == 404


def test_a_login_link_works_once(stack: Stack) -> None:
    printed, errors = stack.command("login-link").communicate(timeout=60)
    link = printed.strip()
    assert link.startswith(f"http://127.0.0.1:{stack.port}/login?token="), errors
    with httpx.Client(trust_env=False) as browser:
        answer = browser.get(link)
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        cookie = answer.headers["set-cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=strict" in cookie
        assert browser.get(f"http://127.0.0.1:{stack.port}/api/jobs").status_code == 200
        assert browser.get(link).status_code == 401


def test_a_login_link_of_a_service_elsewhere_names_the_address_of_browsers(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    container = {
        "APT_JOBS_DATABASE_URL": f"sqlite:///{stack.data_dir / 'apt_jobs.sqlite3'}",
        "APT_JOBS_DATA_DIR": str(tmp_path),  # nothing was started by `apt-jobs up`
        "APT_JOBS_ALLOWED_HOSTS": '["jobs.example"]',
    }
    for name, value in container.items():
        monkeypatch.setitem(stack.environment, name, value)
    printed, errors = stack.command("login-link").communicate(timeout=60)
    assert printed.startswith("http://jobs.example/login?token="), errors


def test_a_second_stack_on_the_same_folder_or_port_says_so(stack: Stack, tmp_path: Path) -> None:
    second = stack.command("up")
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 2
    assert f"process {stack.process.pid}" in errors
    stack.environment["APT_JOBS_DATA_DIR"] = str(tmp_path)
    third = stack.command("up")
    stack.environment["APT_JOBS_DATA_DIR"] = str(stack.data_dir)
    _, errors = third.communicate(timeout=60)
    assert third.returncode == 2
    assert f"port {stack.port} on 127.0.0.1 is in use; try APT_JOBS_PORT=" in errors


def test_the_command_line_submits_lists_and_follows(stack: Stack, tmp_path: Path) -> None:
    file = tmp_path / "job.json"
    file.write_text(json.dumps({"kind": "generate", "texts": ["hello"], "max_length": 2}))
    submitted = stack.command("submit", str(file))
    printed, errors = submitted.communicate(timeout=DEADLINE_S)
    assert submitted.returncode == 0, errors
    job_id = next(word for word in printed.split() if word.startswith("job_"))
    listed, _ = stack.command("ps", "--json").communicate(timeout=60)
    assert job_id in {row["id"] for row in json.loads(listed)}
    refused = stack.command("inspect", "job_nothing")
    _, errors = refused.communicate(timeout=60)
    assert (refused.returncode, "no job 'job_nothing'" in errors) == (2, True)
