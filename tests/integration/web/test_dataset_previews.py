"""`/api/datasets/{name}/preview` and its client: rows, tokens of a model, and what is refused."""

import json
from collections.abc import Iterator

import httpx
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.integration.web.served import Served

pytestmark = pytest.mark.parametrize("served", ["direct"], indirect=True)


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    base = f"http://127.0.0.1:{served.settings.port}"
    with httpx.Client(base_url=base, headers=served.headers, trust_env=False, timeout=30) as client:
        yield client


def test_a_preview_shows_rows_and_the_tokens_of_a_model(served: Served, http: httpx.Client) -> None:
    folder = served.settings.local_models_dir / "words"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    messages = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three four"}]
    content = "".join(json.dumps(row) + "\n" for row in [{"messages": messages}, {"messages": []}])
    http.post("/api/datasets", params={"name": "chats", "format": "jsonl"}, content=content).raise_for_status()
    answer = http.get("/api/datasets/chats/preview", params={"model": "words"}).json()
    assert answer["kind"] == "conversation"
    first, second = answer["rows"]
    assert [part["tokens"] for part in first["parts"]] == [["one", "two"], ["three", "four"]]
    assert [part["is_trained_on"] for part in first["parts"]] == [False, True]
    assert second["fault"] == "field 'messages' has no message"
    plain = http.get("/api/datasets/chats/preview", params={"rows": 1}).json()
    assert [part["tokens"] for part in plain["rows"][0]["parts"]] == [None, None]
    assert len(plain["rows"]) == 1
    assert http.get("/api/datasets/pydoc-topics/preview").json()["kind"] == "text"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("absent/preview", 404),
        ("..%2f..%2fetc/preview", 404),
        ("pydoc-topics/preview?model=absent", 404),
        ("pydoc-topics/preview?rows=51", 422),
        ("pydoc-topics/preview?rows=1&other=2", 422),
    ],
)
def test_what_a_preview_refuses(served: Served, http: httpx.Client, path: str, status: int) -> None:
    assert http.get(f"/api/datasets/{path}").status_code == status
