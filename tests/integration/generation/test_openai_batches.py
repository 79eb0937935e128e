"""Files and batches, as the official `openai` package sends them."""

import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from openai.types import Batch

from apt_jobs.db.access import Role, create_key
from apt_jobs.db.dialect_models import BatchRequest
from tests.integration.generation.served import Generating
from tests.integration.web.served import until

DEADLINE_S = 120.0
ENDED = {"failed", "completed", "expired", "cancelled"}


def line(number: int, url: str = "/v1/completions", **body: Any) -> str:
    asked = {"model": "tiny", "prompt": f"The {number}", "max_tokens": 4, "temperature": 0, **body}
    return json.dumps({"custom_id": f"request-{number}", "method": "POST", "url": url, "body": asked})


def uploaded(client: openai.OpenAI, *lines: str, purpose: Any = "batch") -> str:
    content = "\n".join(lines).encode()
    return client.files.create(file=("lines.jsonl", content), purpose=purpose).id


def ended(client: openai.OpenAI, batch: Batch) -> Batch:
    deadline = time.monotonic() + DEADLINE_S
    while batch.status not in ENDED:
        assert time.monotonic() < deadline, batch
        time.sleep(0.1)
        batch = client.batches.retrieve(batch.id)
    return batch


def rows(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(row) for row in client.files.content(file_id).text.splitlines()]


@pytest.fixture
def other(stack: Generating, client: openai.OpenAI) -> openai.OpenAI:
    """A client with another key, which is no admin's."""
    with stack.served.database.write() as session:
        return client.with_options(api_key=create_key(session, "another", Role.SUBMITTER))


def test_files_are_uploaded_listed_read_and_deleted(client: openai.OpenAI) -> None:
    content = (line(1) + "\n\n" + line(2)).encode()
    made = client.files.create(
        file=("night.jsonl", content), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3_600}
    )
    assert (made.filename, made.bytes, made.purpose, made.status) == ("night.jsonl", len(content), "batch", "processed")
    assert made.expires_at == made.created_at + 3_600
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).content == content
    others = [uploaded(client, line(number), purpose="fine-tune") for number in range(3)]
    listed = [file.id for file in client.files.list(limit=2, purpose="fine-tune", order="asc")]  # two pages
    assert [file_id for file_id in listed if file_id in others] == others
    assert client.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)


def test_a_broken_line_is_named_and_nothing_is_kept(stack: Generating, client: openai.OpenAI) -> None:
    lines = [line(number) for number in range(5_000)]
    lines[4_710] = lines[4_710][:-5]
    before = len(client.files.list().data)
    with pytest.raises(openai.BadRequestError, match="line 4,711 is wrong: it is not JSON"):
        uploaded(client, *lines)
    assert len(client.files.list().data) == before
    assert not list(stack.settings.files_dir.glob(".tmp-*"))


@pytest.mark.parametrize(
    ("content", "purpose", "words"),
    [
        (b"", "batch", "empty"),
        (b"\n\n", "batch", "no line that is not empty"),
        (b"[1]", "batch", "line 1 is wrong: it is a JSON list"),
        (b'{"a": NaN}', "fine-tune", "line 1 is wrong"),
        (b"\xff\xfe{}", "batch", "UTF-16"),
        (b'{"a":"\x00"}', "batch", "binary"),
        (b"{}\n" * 50_001, "batch", "more than 50,000 lines"),
        (b"{}", "assistants", "purpose"),
    ],
)
def test_wrong_files_are_refused(client: openai.OpenAI, content: bytes, purpose: Any, words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        client.files.create(file=("wrong.jsonl", content), purpose=purpose)


def test_a_batch_answers_each_line_as_a_request_would(client: openai.OpenAI) -> None:
    lines = [
        line(1),
        line(2, prompt=["a", "b"]),
        line(3, temperature=9),
        line(4, model="absent"),
        line(5, prompt="一" * 3_000),
        line(6, stream=True),
    ]
    batch = client.batches.create(
        input_file_id=uploaded(client, *lines),
        endpoint="/v1/completions",
        completion_window="24h",
        metadata={"night": "一"},
    )
    assert (batch.status, batch.metadata) == ("validating", {"night": "一"})
    batch = ended(client, batch)
    assert (batch.status, batch.errors) == ("completed", None)
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 6, "completed": 2, "failed": 4}
    done = {row["custom_id"]: row["response"]["body"] for row in rows(client, batch.output_file_id)}
    for number, body in ((1, json.loads(lines[0])["body"]), (2, json.loads(lines[1])["body"])):
        direct = client.completions.create(**body)
        assert [choice["text"] for choice in done[f"request-{number}"]["choices"]] == [
            choice.text for choice in direct.choices
        ]
    assert batch.usage is not None
    assert batch.usage.total_tokens == sum(body["usage"]["total_tokens"] for body in done.values())
    failed = {row["custom_id"]: row["response"] for row in rows(client, batch.error_file_id)}
    assert {name: answer["status_code"] for name, answer in failed.items()} == {
        "request-3": 400,
        "request-4": 404,
        "request-5": 400,
        "request-6": 400,
    }
    assert failed["request-4"]["body"]["error"]["code"] == "model_not_found"
    assert "temperature" in failed["request-3"]["body"]["error"]["message"]
    assert "context" in failed["request-5"]["body"]["error"]["message"]


def test_a_batch_of_chats_runs_as_jobs_of_the_queue(stack: Generating, client: openai.OpenAI) -> None:
    body = {"messages": [{"role": "user", "content": "What?"}], "max_tokens": 3, "model": "chatty"}
    asked = json.dumps(
        {"custom_id": "one", "method": "POST", "url": "/v1/chat/completions", "body": {**body, "temperature": 0}}
    )
    batch = client.batches.create(
        input_file_id=uploaded(client, asked), endpoint="/v1/chat/completions", completion_window="24h"
    )
    batch = ended(client, batch)
    (row,) = rows(client, batch.output_file_id)
    assert row["response"]["body"]["choices"][0]["message"]["role"] == "assistant"
    jobs = stack.client.get("/api/jobs", params={"label": f"batch={batch.id}"}).json()["data"]
    assert [(job["id"], job["priority"]) for job in jobs] == [(row["response"]["request_id"], 0)]


def test_a_file_whose_lines_are_no_requests_fails_with_each_line_named(client: openai.OpenAI) -> None:
    lines = [line(1), line(1), line(2, url="/v1/chat/completions"), json.dumps({"custom_id": "x"})]
    batch = client.batches.create(
        input_file_id=uploaded(client, *lines), endpoint="/v1/completions", completion_window="24h"
    )
    batch = ended(client, batch)
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert [(error.line, error.code) for error in batch.errors.data] == [
        (2, "duplicate_custom_id"),
        (3, "mismatched_endpoint"),
        (4, "invalid_request"),
    ]


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"input_file_id": "file-absent"}, "input_file_id"),
        ({"endpoint": "/v1/responses"}, "endpoint"),
        ({"completion_window": "24d"}, "completion_window"),
        ({"completion_window": "337h"}, "completion_window"),
        ({"metadata": {"a": "b" * 600}}, "metadata"),
    ],
)
def test_wrong_batches_are_refused(client: openai.OpenAI, fields: dict[str, Any], word: str) -> None:
    asked = {"input_file_id": uploaded(client, line(1)), "endpoint": "/v1/completions", "completion_window": "24h"}
    with pytest.raises(openai.BadRequestError, match=word):
        client.batches.create(**{**asked, **fields})


def test_a_batch_is_made_once_for_a_key_and_its_file_stays_while_it_runs(
    client: openai.OpenAI, stack: Generating
) -> None:
    file_id = uploaded(client, *(line(number, max_tokens=400) for number in range(20)))
    made = [
        client.batches.create(
            input_file_id=file_id,
            endpoint="/v1/completions",
            completion_window="24h",
            extra_headers={"Idempotency-Key": "night"},
        )
        for _ in range(2)
    ]
    assert made[0].id == made[1].id
    with pytest.raises(openai.ConflictError, match=made[0].id):
        client.files.delete(file_id)
    until(lambda: client.batches.retrieve(made[0].id).status == "in_progress")
    assert client.batches.cancel(made[0].id).status == "cancelling"
    batch = ended(client, made[0])
    assert batch.status == "cancelled"
    done = rows(client, batch.output_file_id) if batch.output_file_id else []
    stopped = rows(client, batch.error_file_id)
    assert len(done) + len(stopped) == 20
    assert {row["error"]["code"] for row in stopped} == {"batch_cancelled"}
    with stack.served.database.read() as session:
        assert not session.query(BatchRequest).filter_by(batch_id=batch.id).count()
    client.files.delete(file_id)


def test_lists_are_paged_and_keys_see_their_own(client: openai.OpenAI, other: openai.OpenAI) -> None:
    file_id = uploaded(other, line(1))
    made = [
        other.batches.create(input_file_id=file_id, endpoint="/v1/completions", completion_window="24h").id
        for _ in range(3)
    ]
    assert [batch.id for batch in other.batches.list(limit=2)] == made[::-1]
    assert set(made) <= {batch.id for batch in client.batches.list()}  # an admin sees all
    mine = uploaded(client, line(1))
    assert [file.id for file in other.files.list(purpose="batch")] == [file_id]
    calls: list[Callable[[], object]] = [
        lambda: other.files.retrieve(mine),
        lambda: other.files.content(mine),
        lambda: other.files.delete(mine),
    ]
    for call in calls:
        with pytest.raises(openai.NotFoundError):
            call()
    with pytest.raises(openai.BadRequestError, match="input_file_id"):
        other.batches.create(input_file_id=mine, endpoint="/v1/completions", completion_window="24h")
    for batch_id in made:
        ended(other, other.batches.retrieve(batch_id))


def test_unknown_parameters_are_refused(stack: Generating) -> None:
    answer = stack.client.get("/v1/files", params={"colour": "red"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "colour")
    assert httpx.codes.is_client_error(stack.client.post("/v1/files", json={}).status_code)
