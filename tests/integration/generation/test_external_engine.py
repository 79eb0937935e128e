"""An external engine: `transformers serve` as a user starts it, and servers that answer wrong or not at all."""

import os
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from transformers import AutoTokenizer

from apt_jobs.errors import AptJobsError, InvalidInput, NotFound, Unavailable, WorkerLacks
from apt_jobs.generation import external as external_module
from apt_jobs.generation.engine import Engine
from apt_jobs.generation.external import ExternalEngine
from apt_jobs.generation.request import Stopped
from apt_jobs.jobs.spec import ChatMessage, GenerateSpec
from apt_jobs.settings import Settings
from tests.conftest import some_port
from tests.integration.generation.conftest import TEMPLATE
from tests.integration.generation.served import generating
from tests.integration.web.served import until
from tests.unit.generation.tiny_model import llama_config, save_model

MODEL = "external.test--tiny"
DEADLINE_S = 120.0
TEXTS = ["The queue is", "Rows join and leave"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as Hugging Face's cache holds it: where `transformers serve` looks."""
    snapshot = tmp_path_factory.mktemp("hub") / "hub" / "models--test--tiny" / "snapshots" / "0123abcd"
    save_model(snapshot, llama_config(max_position_embeddings=1_024))
    tokenizer = AutoTokenizer.from_pretrained(snapshot)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(snapshot.name)
    return snapshot


@pytest.fixture(scope="module")
def server_url(model_dir: Path) -> Iterator[str]:
    port = some_port()
    command = [
        sys.executable,
        "-m",
        "transformers.cli.transformers",
        "serve",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    environment = {**os.environ, "HF_HOME": str(model_dir.parents[3]), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        url = f"http://127.0.0.1:{port}"
        try:
            until(lambda: _answers(f"{url}/health"))
            yield f"{url}/v1"
        finally:
            process.kill()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def engine(server_url: str) -> Iterator[ExternalEngine]:
    engine = ExternalEngine(server_url)
    until(lambda: engine.model_ids == [MODEL])
    yield engine
    engine.close()


def spec(*texts: str, max_length: int = 12, **options: Any) -> GenerateSpec:
    return GenerateSpec(kind="generate", texts=list(texts), max_length=max_length, **options)


def test_greedy_texts_are_those_of_our_own_engine_and_streams_add_up(engine: ExternalEngine, model_dir: Path) -> None:
    own = Engine(device="cpu")
    added: dict[int, str] = {0: "", 1: ""}

    def receive(index: int, text: str, _: object) -> None:
        added[index] += text

    found = engine.submit(MODEL, spec(*TEXTS, temperature=0.0), receive).future.result(DEADLINE_S)
    expected = own.generate(model_dir, spec(*TEXTS, temperature=0.0))
    own.close()
    half = "\N{REPLACEMENT CHARACTER}"  # of a character; we do not show it
    assert [text.rstrip(half) for text in found.outputs] == expected.outputs
    assert [added[0], added[1]] == found.outputs
    assert found.num_tokens == expected.num_tokens == [12, 12]
    assert found.num_prompt_tokens == expected.num_prompt_tokens
    assert found.finish_reasons == ["length", "length"]


def test_chats_and_draws(engine: ExternalEngine) -> None:
    chat = [ChatMessage(role="user", content="What is a queue?")]
    answer = engine.submit(MODEL, spec("", messages=chat, temperature=0.0)).future.result(DEADLINE_S)
    assert answer.outputs[0]
    drawn = engine.submit(MODEL, spec("The", n=3, temperature=1.0, seed=3)).future.result(DEADLINE_S)
    assert (len(drawn.outputs), len(drawn.num_prompt_tokens)) == (3, 1)


def test_a_stopped_request_ends_at_once_and_others_go_on(engine: ExternalEngine) -> None:
    started = threading.Event()
    endless = engine.submit(MODEL, spec("The", max_length=900), lambda *_: started.set())
    assert started.wait(DEADLINE_S)
    endless.stop()
    with pytest.raises(Stopped):
        endless.future.result(1.0)
    assert engine.submit(MODEL, spec("x")).future.result(DEADLINE_S).num_tokens == [12]


def test_what_such_servers_do_not_have_is_refused_by_name(engine: ExternalEngine) -> None:
    unknown: dict[str, Any] = {"top_k": 3, "min_p": 0.1, "regex": "a", "logprobs": 1, "truncate": True}
    for name, value in unknown.items():
        with pytest.raises(InvalidInput, match=f"has no {name}"):
            engine.submit(MODEL, spec("x", **{name: value}))
    with pytest.raises(InvalidInput, match="has no embed"):
        engine.submit(MODEL, GenerateSpec(kind="generate", texts=[""], embed=["x"]))
    with pytest.raises(WorkerLacks, match="does not list it"):
        engine.submit("external.absent", spec("x"))


class Wrong(BaseHTTPRequestHandler):
    """Lists a model and answers texts as the test says: a status, a body, and whether it then falls silent."""

    answer: tuple[int, bytes, bool] = (200, b"", False)

    def do_GET(self) -> None:
        self._send(200, b'{"data": [{"id": "test/tiny"}]}')

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self._send(*self.answer)

    def _send(self, status: int, body: bytes, is_silent: bool = False) -> None:
        self.send_response(status)
        self.end_headers()
        try:
            self.wfile.write(body)
            if is_silent:
                time.sleep(3.0)
        except OSError:
            pass

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def wrong_engine(answer: tuple[int, bytes, bool], **options: Any) -> Iterator[ExternalEngine]:
    handler = type("Handler", (Wrong,), {"answer": answer})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        assert isinstance(server, socketserver.BaseServer)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        engine = ExternalEngine(f"http://127.0.0.1:{server.server_address[1]}/v1", **options)
        try:
            yield engine
        finally:
            engine.close()
            server.shutdown()


@pytest.mark.parametrize(
    ("status", "body", "error", "words"),
    [
        (500, b"<html>broken</html>", Unavailable, "answers 500: <html>broken"),
        (401, b'{"error": {"message": "wrong key"}}', Unavailable, "answers 401: wrong key"),
        (429, b"{}", Unavailable, "answers 429"),
        (400, b'{"error": {"message": "too long"}}', InvalidInput, "answers 400: too long"),
        (404, b'{"detail": "no such model"}', NotFound, "answers 404: no such model"),
        (200, b"<html>a login page</html>", Unavailable, "ended a stream before"),
        (200, b'data: {"choices": [{"text": "a"}]}\n\n', Unavailable, "ended a stream before"),
        (200, b"data: {]\n\n", Unavailable, "no JSON"),
        (200, b'data: {"choices": 3}\n\n', Unavailable, "no completion"),
        (200, b'data: {"choices": [{"text": 3}]}\n\n', Unavailable, "no completion"),
        (200, b'data: {"error": {"message": "out of memory"}}\n\n', Unavailable, "failed: out of memory"),
        (200, b"data: " + b"x" * (2 << 20), Unavailable, "an event of more than"),
        (500, b"x" * (2 << 20), Unavailable, "sends more than"),
    ],
)
def test_wrong_answers_are_clear_errors(status: int, body: bytes, error: type[AptJobsError], words: str) -> None:
    with wrong_engine((status, body, False)) as engine, pytest.raises(error, match=words):
        engine.submit(MODEL, spec("x")).future.result(DEADLINE_S)


def test_a_silent_server_and_one_that_is_down_are_clear_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with wrong_engine((200, b"", True), timeout_s=0.3) as engine, pytest.raises(Unavailable, match="silent for 0 s"):
        engine.submit(MODEL, spec("x")).future.result(DEADLINE_S)
    monkeypatch.setattr(external_module, "CONNECT_TIMEOUT_S", 1.0)
    down = ExternalEngine(f"http://127.0.0.1:{some_port()}/v1")
    with pytest.raises(WorkerLacks, match="does not answer"):
        down.submit(MODEL, spec("x"))
    down.close()


def test_its_models_are_listed_and_generate_over_rest(
    tmp_path: Path, sqlite_template: Path, valkey_server_url: str, server_url: str
) -> None:
    file = tmp_path / "apt_jobs.sqlite3"
    file.write_bytes(sqlite_template.read_bytes())
    settings = Settings(
        data_dir=tmp_path / "data",
        database_url=SecretStr(f"sqlite:///{file}"),
        redis_url=SecretStr(valkey_server_url.replace("db=0", "db=3")),
    )
    with generating(settings) as running, running.worker(APT_JOBS_ENGINE_URL=server_url):
        client = running.client
        until(lambda: any(one["id"] == MODEL for one in client.get("/api/models").json()["data"]))
        listed = next(one for one in client.get("/api/models").json()["data"] if one["id"] == MODEL)
        assert (listed["source"], listed["can_generate"], listed["is_warm"]) == ("external", True, True)
        assert client.get(f"/v1/models/{MODEL}").json()["id"] == MODEL
        asked = {"text": TEXTS[0], "model": MODEL, "max_length": 12, "temperature": 0}
        whole = client.post("/api/generate", json=asked).json()
        assert (whole["finish_reason"], whole["usage"]["completion_tokens"]) == ("length", 12)
        with client.stream("POST", "/api/generate", json={**asked, "stream": True}) as stream:
            kinds = [line for line in stream.iter_lines() if line.startswith("event: ")]
        assert set(kinds[:-1]) == {"event: delta"}
        assert kinds[-1] == "event: end"
        refused = client.post("/api/generate", json={**asked, "model": "external.absent"})
        assert refused.status_code == 422
        assert "external engine" in refused.text
        unsupported = client.post("/api/generate", json={**asked, "top_k": 3})
        assert unsupported.status_code == 422
        assert "has no top_k" in unsupported.text
        assert client.post("/api/jobs", json={"kind": "train", "base_model": MODEL}).status_code == 422
