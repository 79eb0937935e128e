"""What is known of models before they generate, aliases, and checkpoints of jobs by `@best`, `@latest` and step."""

import json
import shutil
from typing import Any

import openai
import pytest

from apt_jobs.artifacts.manifest import MANIFEST, manifest_of
from apt_jobs.db.checkpoints import delete_checkpoint_row
from apt_jobs.db.jobs import insert_job
from apt_jobs.db.models import Checkpoint
from apt_jobs.jobs.ids import new_checkpoint_id
from apt_jobs.jobs.spec import TrainSpec
from tests.integration.generation.served import Generating
from tests.integration.web.served import until


def saved(stack: Generating, job_id: str, step: int, *, is_best: bool = False, whole: bool = True) -> str:
    """Register a checkpoint of a job, which is the tiny model."""
    settings, checkpoint_id = stack.settings, new_checkpoint_id()
    folder = settings.checkpoints_dir / job_id / f"step-{step}"
    shutil.copytree(settings.local_models_dir / "tiny", folder)
    if whole:
        (folder / MANIFEST).write_text(manifest_of(folder).model_dump_json())
    row = Checkpoint(
        id=checkpoint_id,
        job_id=job_id,
        attempt=1,
        filename=f"{job_id}/step-{step}",
        step=step,
        epoch=0,
        val_loss=float(step),
        size_bytes=1,
        is_best=is_best,
    )
    with stack.served.database.write() as session:
        session.add(row)
    return checkpoint_id


@pytest.fixture(scope="module")
def job(stack: Generating) -> tuple[str, str, str]:
    """A job with a best checkpoint at step 10 and a later one at step 20: the three ids."""
    with stack.served.database.write() as session:
        job_id = insert_job(session, TrainSpec(kind="train", name="nightly", queue="nobody")).id
    return job_id, saved(stack, job_id, 10, is_best=True), saved(stack, job_id, 20)


def models(stack: Generating) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in stack.client.get("/api/models").json()["data"]}


def generated_by(stack: Generating, model: str) -> str:
    answer = stack.client.post("/api/generate", json={"text": "a", "max_tokens": 1, "model": model})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["model"])


def test_a_model_says_what_it_is_without_being_loaded(stack: Generating) -> None:
    tiny = models(stack)["tiny"]
    assert (tiny["can_generate"], tiny["why_not"], tiny["is_chat"]) == (True, None, False)
    assert (tiny["context_tokens"], tiny["dtype"]) == (4_096, "F32")
    assert tiny["size_bytes"] == 4 * tiny["num_parameters"] > 0
    assert models(stack)["chatty"]["is_chat"]


def test_a_model_that_cannot_generate_says_why(stack: Generating, client: openai.OpenAI) -> None:
    folder = stack.settings.local_models_dir
    for name, wrong in (("pickled", "model.safetensors"), ("cut", "model.safetensors"), ("odd", "config.json")):
        shutil.copytree(folder / "tiny", folder / name)
        (folder / name / wrong).write_bytes(b"{" * 20)
    (folder / "pickled" / "model.safetensors").rename(folder / "pickled" / "pytorch_model.bin")
    found = models(stack)
    assert "lacks model.safetensors" in found["pickled"]["why_not"]
    assert "cannot be read" in found["cut"]["why_not"]
    assert "cannot be read" in found["odd"]["why_not"]
    assert not {"pickled", "cut", "odd"} & {model.id for model in client.models.list()}
    for name in ("pickled", "cut", "odd"):
        shutil.rmtree(folder / name)


def test_a_checkpoint_that_is_not_whole_cannot_generate(stack: Generating) -> None:
    with stack.served.database.write() as session:
        job_id = insert_job(session, TrainSpec(kind="train", queue="nobody")).id
    checkpoint_id = saved(stack, job_id, 1, whole=False)
    assert "not complete" in models(stack)[checkpoint_id]["why_not"]


def test_a_model_in_a_workers_memory_is_warm(stack: Generating) -> None:
    generated_by(stack, "tiny")
    until(lambda: models(stack)["tiny"]["is_warm"])


def test_a_jobs_checkpoints_are_models_by_what_they_are(
    stack: Generating, client: openai.OpenAI, job: tuple[str, str, str]
) -> None:
    job_id, best, latest = job
    for name, expected in (("best", best), ("latest", latest), ("10", best), ("20", latest)):
        assert generated_by(stack, f"{job_id}@{name}") == expected
        assert client.models.retrieve(f"{job_id}@{name}").owned_by == job_id
    newer = saved(stack, job_id, 30)
    assert generated_by(stack, f"{job_id}@latest") == newer
    for absent in (f"{job_id}@31", "job_0123456789abcdefghij@best"):
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model=absent, prompt="a")
    assert stack.client.post("/api/generate", json={"text": "a", "model": f"{job_id}@worst"}).status_code == 422


def test_an_alias_is_promoted_from_one_model_to_another(
    stack: Generating, client: openai.OpenAI, job: tuple[str, str, str]
) -> None:
    job_id, best, latest = job
    path = "/api/models/aliases/prod"
    assert stack.client.put(path, json={"model": best}).json() == {"alias": "prod", "model": best, "id": best}
    assert generated_by(stack, "prod") == best
    assert models(stack)[best]["aliases"] == ["prod"]
    assert client.completions.create(model="prod", prompt="a", max_tokens=1).model == "prod"
    assert "prod" in {model.id for model in client.models.list()}
    assert stack.client.put(path, json={"model": f"{job_id}@20"}).json()["id"] == latest
    assert generated_by(stack, "prod") == latest
    assert stack.client.delete(path).status_code == 204
    assert stack.client.delete(path).status_code == 404
    assert stack.client.post("/api/generate", json={"text": "a", "model": "prod"}).status_code == 422


@pytest.mark.parametrize(
    ("alias", "model", "status"),
    [
        ("prod", "absent", 404),
        ("tiny", "chatty", 409),
        ("default", "tiny", 422),
        ("a b", "tiny", 422),
        ("x" * 65, "tiny", 422),
        ("ok", "a/../b", 422),
    ],
)
def test_wrong_aliases_are_refused(stack: Generating, alias: str, model: str, status: int) -> None:
    answer = stack.client.put(
        f"/api/models/aliases/{alias}",
        content=json.dumps({"model": model}).encode(),
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == status, answer.text


def test_an_alias_of_a_checkpoint_that_was_deleted_says_so(stack: Generating, job: tuple[str, str, str]) -> None:
    gone = saved(stack, job[0], 40)
    stack.client.put("/api/models/aliases/old", json={"model": gone})
    with stack.served.database.write() as session:
        delete_checkpoint_row(session, gone)
    assert stack.client.get("/api/models").status_code == 200
    assert stack.client.post("/api/generate", json={"text": "a", "model": "old"}).status_code == 422
