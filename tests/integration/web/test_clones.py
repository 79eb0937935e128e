"""`POST /api/jobs/{id}/clone`: a job again, with changes, from its checkpoint, or exactly as it ran."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from apt_jobs.artifacts.code import add_code
from apt_jobs.client.packing import pack_folder
from apt_jobs.db.attempt_facts import record_facts
from apt_jobs.db.dataset_pins import pin_dataset
from apt_jobs.db.jobs import claim
from apt_jobs.db.models import Job
from apt_jobs.events.kinds import CheckpointSaved
from apt_jobs.jobs.attempt_facts import AttemptFacts
from tests.integration.web.served import Served

pytestmark = pytest.mark.parametrize("served", ["plain"], indirect=True)
FACTS = {"host": "h", "system": "s", "gpus": [], "python": "3.12.4", "packages": ["apt-jobs==1.0", "six==1.17.0"]}


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    with served.rest_client() as client:
        yield client


def submitted(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = client.post("/api/jobs", json={"kind": "train", **fields})
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


def cloned(client: httpx.Client, job_id: str, status: int = 202, **body: Any) -> dict[str, Any]:
    answer = client.post(f"/api/jobs/{job_id}/clone", json=body)
    assert answer.status_code == status, answer.text
    return dict(answer.json())


def test_a_clone_is_the_job_with_its_changes(served: Served, client: httpx.Client) -> None:
    job = submitted(client, name="first", labels={"team": "a", "x": "y"}, training={"max_steps": 5, "seed": 7})
    patch = {"name": None, "labels": {"x": None, "z": "1"}, "training": {"max_steps": 9}}
    clone = cloned(client, job["id"], patch=patch)
    assert clone["id"] != job["id"]
    assert (clone["name"], clone["labels"]) == (None, {"team": "a", "z": "1"})
    assert clone["spec"]["training"] == {**job["spec"]["training"], "max_steps": 9}
    same = cloned(client, job["id"])
    assert same["spec"] == job["spec"]
    headers = {"idempotency-key": "once"}
    twice = [client.post(f"/api/jobs/{job['id']}/clone", json={}, headers=headers) for _ in range(2)]
    assert twice[0].json()["id"] == twice[1].json()["id"]
    assert twice[1].headers["idempotent-replayed"] == "true"


@pytest.mark.parametrize(
    ("body", "status", "shown"),
    [
        ({"patch": {"training": {"max_steps": -1}}}, 422, "#/training/max_steps"),
        ({"patch": {"nosuch": 1}}, 422, "#/nosuch"),
        ({"patch": {"training": 3}}, 422, "#/training"),
        ({"patch": {"training": {"max_steps": "9"}}}, 422, "#/training/max_steps"),
        ({"patch": {"kind": "generate", "texts": ["a"]}}, 422, "same kind"),
        ({"patch": {"kind": None}}, 422, "same kind"),
        ({"patch": {"dataset": "none"}}, 422, "#/dataset"),
        ({"patch": [1]}, 422, "#/patch"),
        ({"checkpoint": "best"}, 409, "no best checkpoint"),
        ({"checkpoint": "newest"}, 422, "#/checkpoint"),
        ({"exact": True}, 409, "nobody noted"),
        ({"more": 1}, 422, "#/more"),
    ],
)
def test_what_is_no_job_any_more_is_refused_with_its_place(
    served: Served, client: httpx.Client, body: dict[str, Any], status: int, shown: str
) -> None:
    job = submitted(client)
    answer = client.post(f"/api/jobs/{job['id']}/clone", json=body)
    assert (answer.status_code, shown in answer.text) == (status, True), answer.text


def test_a_job_that_is_not_there_has_no_clone(served: Served, client: httpx.Client) -> None:
    cloned(client, "job_none", 404)


def test_a_clone_starts_from_a_checkpoint_of_the_job(served: Served, client: httpx.Client) -> None:
    job = submitted(client, model={"d_model": 32, "max_seq_len": 64})
    job_id = served.new_job()
    saved = [CheckpointSaved(f"ckpt_{n:020d}", f"{job_id}/{n}", n, 0, 1.0, 2.0 - n, 10, n == 1) for n in (1, 2)]
    served.say(job_id, *saved)
    for which, number in (("best", 1), ("latest", 2)):
        answer = client.post(f"/api/jobs/{job_id}/clone", json={"checkpoint": which}).json()
        seen = answer.get("spec", {}).get("base_model") or answer["errors"][0]["seen"]
        assert f"ckpt_{number:020d}" in seen  # its files are not there: the reference is checked as any other
    cloned(client, job["id"], 409, checkpoint="latest")


def test_an_exact_clone_pins_packages_and_data(served: Served, client: httpx.Client, tmp_path: Any) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("1")
    served.settings.code_dir.mkdir(parents=True)
    with pack_folder(tmp_path / "code") as packed:
        upload = served.settings.code_dir / ".upload-1"
        upload.write_bytes(packed.file.read())
        sha256 = add_code(served.settings.code_dir, upload, packed.sha256).sha256
    script = {"code": {"sha256": sha256}, "argv": ["python", "a.py"]}
    job = submitted(client, **script, environment={"requirements": ["six"]})
    with served.database.write() as session:
        claim(session, job["id"], "w", 60.0)
        record_facts(session, job["id"], 1, AttemptFacts.model_validate(FACTS))
        pin_dataset(session, job["id"], "d" * 64)
    clone = cloned(client, job["id"], exact=True)
    assert clone["spec"]["environment"] | {"name": None, "lock": None} == {
        "name": None,
        "python": "3.12",
        "requirements": ["six==1.17.0"],
        "lock": None,
    }
    assert clone["spec"]["code"] == job["spec"]["code"]
    with served.database.read() as session:
        assert session.scalar(select(Job.dataset_sha256).where(Job.id == clone["id"])) == "d" * 64
    shown = client.get(f"/api/jobs/{job['id']}").json()["attempts"][0]["facts"]
    assert (shown["python"], shown["packages"]) == ("3.12.4", FACTS["packages"])
    named = cloned(client, job["id"], 409, exact=True, patch={"environment": {"name": "x", "requirements": None}})
    assert "the operator's" in named["detail"]
