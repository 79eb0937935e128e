"""`POST /api/jobs?dry_run=true`: what a job would take, which worker could run it, and what is refused for good."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from apt_jobs.client.client import Client
from apt_jobs.db.workers import record_worker
from apt_jobs.jobs.packing import RoomReport
from tests.integration.web.served import Served

pytestmark = pytest.mark.parametrize("served", ["direct"], indirect=True)
LARGE = {"d_model": 2_048, "num_layers": 16, "num_attention_heads": 16, "vocab_size": 32_000, "max_seq_len": 2_048}
H200, RTX = (80, "NVIDIA H200", 141 * 10**9), (1, "RTX 4060", 8 * 10**9)


def worker(served: Served, name: str, *gpus: tuple[int, str, int], queue: str = "train") -> None:
    room = RoomReport(cpus=8, memory_gb=64.0, max_jobs=4, max_cpu_ranks=4, num_nodes=1, jobs=())
    described = [{"index": index, "name": gpu, "memory_total_bytes": size} for index, gpu, size in gpus]
    with served.database.write() as session:
        record_worker(
            session,
            name=name,
            kind="train",
            queues=[queue],
            hostname="here",
            pid=1,
            version="1",
            gpus=described,
            current_job_id=None,
            room=room.as_document(),
        )


def asked(served: Served, job: dict[str, Any], *, dry_run: bool = True) -> httpx.Response:
    url = f"http://127.0.0.1:{served.settings.port}/api/jobs"
    params = {"dry_run": "true"} if dry_run else {}
    return httpx.post(url, json={"kind": "train", **job}, headers=served.headers, params=params, trust_env=False)


def num_jobs(served: Served) -> int:
    url = f"http://127.0.0.1:{served.settings.port}/api/jobs"
    return len(httpx.get(url, headers=served.headers, trust_env=False).json()["data"])


def test_a_job_is_estimated_and_nothing_is_queued(served: Served) -> None:
    (served.settings.datasets_dir).mkdir(parents=True, exist_ok=True)
    (served.settings.datasets_dir / "mine.txt").write_bytes(b"words " * 200_000)
    job = {"dataset": "mine", "training": {"max_steps": 50, "checkpoint_every_steps": 10, "keep_checkpoints": 2}}
    before = num_jobs(served)
    answer = asked(served, job)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert (found["object"], found["fits"], found["workers"]) == ("preflight", None, [])
    memory = found["memory_per_rank_bytes"]
    assert memory["total"] == sum(value for name, value in memory.items() if name != "total")
    assert memory["weights"] == 4 * found["num_parameters"]
    assert (found["num_steps"], found["tokens_per_step"], found["num_tokens"]) == (50, 8 * 128, 300_000)
    assert found["checkpoint_bytes"] == 12 * found["num_parameters"]
    assert found["checkpoints_bytes"] == 3 * found["checkpoint_bytes"]
    assert found["disk_free_bytes"] > 0
    assert num_jobs(served) == before


def test_what_fits_no_gpu_is_refused_with_what_would(served: Served) -> None:
    worker(served, "small", RTX)
    large = {"model": LARGE, "training": {"batch_size": 8}}
    found = asked(served, large).json()
    assert found["fits"] is False
    assert "of GPU memory: 1 such GPUs are needed, and this worker has 0" in found["workers"][0]["why_not"]
    assert found["advice"]
    refused = asked(served, large, dry_run=False)
    assert refused.status_code == 422
    assert "what would fit" in refused.json()["detail"]
    assert found["advice"][0] in refused.json()["detail"]
    assert asked(served, {}, dry_run=False).status_code == 202  # a small one
    assert asked(served, {**large, "queue": "other"}, dry_run=False).status_code == 202  # nobody knows its GPUs
    worker(served, "large", H200)
    found = asked(served, large).json()
    assert {row["worker"]: row["fits"] for row in found["workers"]} == {"small": False, "large": True}
    assert (found["fits"], found["advice"]) == (True, [])
    assert asked(served, large, dry_run=False).status_code == 202


def test_a_worker_without_gpus_takes_what_needs_none(served: Served) -> None:
    worker(served, "cpu")
    assert asked(served, {"model": LARGE}).json()["fits"] is True
    on_gpus = asked(served, {"device": "cuda", "num_ranks": 2}).json()
    assert on_gpus["fits"] is False
    assert "this worker has 0 such GPUs" in on_gpus["workers"][0]["why_not"]


@pytest.mark.parametrize(
    ("job", "pointer"),
    [({"dataset": "absent"}, "#/dataset"), ({"training": {"batch_size": 0}}, "#/training/batch_size")],
)
def test_a_wrong_job_is_refused_as_if_it_were_submitted(served: Served, job: dict[str, Any], pointer: str) -> None:
    answers = [asked(served, job, dry_run=dry_run) for dry_run in (True, False)]
    assert [answer.status_code for answer in answers] == [422, 422]
    assert answers[0].json()["errors"] == answers[1].json()["errors"]
    assert answers[0].json()["errors"][0]["pointer"] == pointer


def test_the_client_and_other_kinds_of_jobs(served: Served, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{served.settings.port}"
    with Client(url, api_key=served.key) as client:
        script = client.preflight({"kind": "train", "entry_point": "mine"})
        generation = client.preflight({"kind": "generate", "texts": ["a"]})
    assert script["memory_per_rank_bytes"] is generation["memory_per_rank_bytes"] is None
    assert script["num_steps"] is None


def test_a_base_model_is_measured_by_its_files(served: Served) -> None:
    folder = served.settings.local_models_dir / "broken"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"hidden_size": "many"}))
    assert asked(served, {"base_model": "broken"}).json()["memory_per_rank_bytes"] is None
