"""Fine-tuning jobs, as the official `openai` package sends them, trained by a real worker and then generated from."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from apt_jobs.db.access import Role, create_key
from tests.integration.generation.served import Generating

DEADLINE_S = 240.0
HOW_TO = Path(__file__).resolve().parents[3] / "docs" / "how-to" / "openai_client.md"
ROWS = [{"prompt": f"What is {number} and one?", "completion": f" It is {number + 1}."} for number in range(60)]
QUICK: Any = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 4}}}


def uploaded(client: openai.OpenAI, rows: list[Any], purpose: Any = "fine-tune") -> str:
    content = "\n".join(json.dumps(row) for row in rows).encode()
    return client.files.create(file=("rows.jsonl", content), purpose=purpose).id


def wait_for(client: openai.OpenAI, job_id: str, *statuses: str) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while (job := client.fine_tuning.jobs.retrieve(job_id)).status not in statuses:
        assert time.monotonic() < deadline, job
        assert job.error is None or job.status == "failed", job
        time.sleep(0.2)
    return job


def test_lists_are_paged_by_their_owner_and_jobs_are_cancelled(stack: Generating, client: openai.OpenAI) -> None:
    with stack.served.database.write() as session:
        other = client.with_options(api_key=create_key(session, "tuner", Role.SUBMITTER))
    file_id = uploaded(other, [{"text": "one " * 400}])
    made = [other.fine_tuning.jobs.create(model="tiny", training_file=file_id).id for _ in range(3)]
    assert [job.id for job in other.fine_tuning.jobs.list(limit=2)] == made[::-1]
    assert [other.fine_tuning.jobs.cancel(job_id).status for job_id in made] == ["cancelled"] * 3
    mine = uploaded(client, ROWS)
    with pytest.raises(openai.BadRequestError, match="training_file"):
        other.fine_tuning.jobs.create(model="tiny", training_file=mine)
    job = client.fine_tuning.jobs.create(model="tiny", training_file=mine)
    assert str(client.fine_tuning.jobs.pause(job.id).status) == "paused"
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    with pytest.raises(openai.NotFoundError):
        other.fine_tuning.jobs.retrieve(job.id)
    client.fine_tuning.jobs.cancel(job.id)
    with pytest.raises(openai.ConflictError):
        client.fine_tuning.jobs.resume(job.id)


@pytest.mark.parametrize(
    ("fields", "rows", "error", "words"),
    [
        ({"model": "absent"}, ROWS, openai.NotFoundError, "absent"),
        ({}, [*ROWS, {"prompt": "x"}], openai.BadRequestError, "line 61: no field 'completion'"),
        ({}, [{"text": 5}], openai.BadRequestError, "line 1: text is a JSON number"),
        ({}, [{"messages": []}], openai.BadRequestError, "line 1: field 'messages' has no message"),
        ({"validation_file": "file-x"}, ROWS, openai.BadRequestError, "validation_file"),
        ({"hyperparameters": {"n_epochs": 0}}, ROWS, openai.BadRequestError, "n_epochs"),
        ({"hyperparameters": {"n_epochs": 1}, "method": QUICK}, ROWS, openai.BadRequestError, "two places"),
        ({"method": {"type": "dpo"}}, ROWS, openai.BadRequestError, "method"),
        ({"training_file": "file-absent"}, ROWS, openai.BadRequestError, "training_file"),
        ({"suffix": "a\x1b[31m"}, ROWS, openai.BadRequestError, "suffix"),
    ],
)
def test_wrong_fine_tunings_are_refused_by_the_field(
    client: openai.OpenAI, fields: dict[str, Any], rows: list[Any], error: type[openai.APIStatusError], words: str
) -> None:
    asked: dict[str, Any] = {"model": "tiny", "training_file": uploaded(client, rows), **fields}
    with pytest.raises(error, match=words):
        client.fine_tuning.jobs.create(**asked)


def test_a_batch_file_trains_nothing(client: openai.OpenAI) -> None:
    file_id = uploaded(client, [{"text": "a"}], purpose="batch")
    with pytest.raises(openai.BadRequestError, match="purpose"):
        client.fine_tuning.jobs.create(model="tiny", training_file=file_id)


@pytest.fixture(scope="module")
def trainer(stack: Generating) -> Iterator[None]:
    with stack.trainer():
        yield


def test_what_the_how_to_shows_runs(
    stack: Generating, client: openai.OpenAI, trainer: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", str(client.base_url))
    monkeypatch.setenv("OPENAI_API_KEY", stack.served.key)
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", HOW_TO.read_text(), re.DOTALL | re.MULTILINE):
        exec(block.replace("my-model", "chatty"), names)
    assert names["batch"].request_counts.completed == 3
    assert names["job"].status == "succeeded"
    assert names["answer"].choices[0].message.content


def test_a_model_is_tuned_on_a_file_and_its_checkpoint_answers(
    stack: Generating, client: openai.OpenAI, trainer: None
) -> None:
    file_id = uploaded(client, ROWS)
    options: dict[str, Any] = {
        "model": "tiny",
        "training_file": file_id,
        "method": QUICK,
        "suffix": "sums",
        "seed": 7,
        "metadata": {"team": "a"},
        "extra_headers": {"Idempotency-Key": "tune"},
    }
    made = client.fine_tuning.jobs.create(**options)
    assert (made.object, made.seed, made.metadata, made.training_file) == ("fine_tuning.job", 7, {"team": "a"}, file_id)
    assert (made.hyperparameters.n_epochs, made.hyperparameters.batch_size) == (1, 4)
    assert client.fine_tuning.jobs.create(**options).id == made.id
    with pytest.raises(openai.ConflictError, match="not ended"):
        client.files.delete(file_id)
    job = wait_for(client, made.id, "succeeded", "failed")
    assert job.status == "succeeded", job.error
    assert job.finished_at >= job.created_at
    checkpoints = client.fine_tuning.jobs.checkpoints.list(made.id).data
    assert job.fine_tuned_model in [row.fine_tuned_model_checkpoint for row in checkpoints]
    assert checkpoints[0].metrics.valid_loss is not None
    events = list(client.fine_tuning.jobs.list_events(made.id, limit=3))  # page by page
    assert events[0].message == "The job is succeeded"
    assert events[-1].message == "The job is queued"
    assert {"message", "metrics"} == {event.type for event in events}
    assert len({event.id for event in events}) == len(events)
    answer = client.completions.create(model=job.fine_tuned_model, prompt="What is 3 and one?", max_tokens=4)
    assert answer.choices[0].text
    client.files.delete(file_id)
    assert file_id not in {row["name"] for row in stack.client.get("/api/datasets").json()["data"]}
