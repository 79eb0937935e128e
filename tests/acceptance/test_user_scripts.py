"""Training code of others, unchanged, as jobs: the examples, registered, through the whole stack."""

import json
from typing import Any

import pytest

from apt_jobs.client.client import Client
from tests.acceptance.stack import until

ENDED = ("succeeded", "failed", "cancelled", "dead")


@pytest.mark.parametrize(
    ("entry_point", "arguments", "num_steps", "layer"),
    [
        ("plain-loop", {"steps": 25}, 25, "2.weight"),
        ("hugging-face", {}, 30, "model.layers.1.self_attn.q_proj.weight"),
        ("lightning", {}, 30, "layers.2.weight"),
    ],
)
def test_an_example_is_watched_as_a_job(
    client: Client, entry_point: str, arguments: dict[str, Any], num_steps: int, layer: str
) -> None:
    job = {"kind": "train", "entry_point": entry_point, "arguments": arguments, "num_ranks": 2}
    job_id = client.submit(job)["id"]
    until(lambda: client.get(job_id)["state"] in ENDED)
    row = client.get(job_id)
    assert row["state"] == "succeeded", row["error"]
    events = events_of(client, row)
    (names,) = (event["names"] for event in events["layers"])
    assert layer in names
    assert [event["step"] for event in events["gradient"]] == list(range(1, num_steps + 1))
    assert all(len(event["norms"]) == len(names) for event in events["gradient"])
    assert {event["rank"] for event in events["rank_gradient"]} == {0, 1}
    first, second = (event for event in events["rank_gradient"] if event["step"] == 10)
    assert len(first["norms"]) == len(second["norms"]) == len(names)
    assert first["norms"] != second["norms"]
    assert [event["step"] for event in events["metric"]] == list(range(1, num_steps + 1))
    assert events["metric"][-1]["train_loss"] < events["metric"][0]["train_loss"]
    assert row["step"] == num_steps


def test_the_reason_of_user_scripts_is_the_reason_of_its_job(client: Client) -> None:
    job = {"kind": "train", "entry_point": "plain-loop", "arguments": {"steps": "many"}}
    job_id = client.submit(job)["id"]
    until(lambda: client.get(job_id)["state"] in ENDED)
    row = client.get(job_id)
    assert row["state"] == "failed"
    assert row["reason"] == "rank 0: TrainingFailed: the script exited with 2; its log says why"
    assert any("invalid int value: 'many'" in event["message"] for event in events_of(client, row)["log"])


def test_a_script_has_its_run_over_a_kill_and_a_pause(client: Client) -> None:
    job_id = client.submit(
        {
            "kind": "train",
            "entry_point": "uses-its-run",
            "num_ranks": 2,
            "argv": ["positional", "--lr", "3e-4"],
            "arguments": {"flag": True, "size": 3},
            "env": {"MINE": "yes", "HF_HUB_OFFLINE": "0"},
        }
    )["id"]
    until(lambda: client.get(job_id)["attempt"] == 2 and (client.get(job_id)["step"] or 0) >= 16)
    client.pause(job_id)
    until(lambda: client.get(job_id)["state"] == "paused")
    assert client.get(job_id)["reason"].startswith("paused by a user; saved at step")
    client.resume(job_id)
    until(lambda: client.get(job_id)["state"] in ENDED)
    row = client.get(job_id)
    assert row["state"] == "succeeded", row["error"]
    assert (row["step"], row["num_steps"], len(row["attempts"])) == (40, 40, 3)
    custom = client.metrics(job_id)["custom"]
    assert custom["eval/bleu"]["steps"] == list(range(1, 41))
    assert custom["eval/bleu"]["last"] == 20.0
    assert custom["rank1/seen"]["last"] == 40
    assert sorted(set(custom["resumed_from"]["values"]))[:2] == [1.0, 11.0]
    messages = [event["message"] for event in events_of(client, row)["log"]]
    facts = [json.loads(message) for message in messages if message.startswith("{")]
    assert facts[0]["argv"] == ["positional", "--lr", "3e-4", "--flag", "--size=3"]
    assert (facts[0]["secret"], facts[1]) == (None, {"offline": "0", "mine": "yes"})
    assert facts[0]["cwd"].endswith(f"{job_id}/output")
    steps = [one["global_step"] for one in client.checkpoints(job_id)]
    assert max(steps) == 40
    assert len(steps) == 3


def events_of(client: Client, row: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """All events of a job that has ended, by kind."""
    events: dict[str, list[dict[str, Any]]] = {}
    for event in client.events(row["id"]):
        events.setdefault(event["kind"], []).append(event)
        if event["seq"] == row["last_seq"]:
            break
    return events
