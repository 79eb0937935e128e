"""`apt-jobs chat`, `generate --stream` and `models`, and what they call in both clients, on a real worker."""

import asyncio
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from transformers import AutoTokenizer

from apt_jobs.client import AsyncClient, Client
from apt_jobs.errors import InvalidInput, NotFound
from tests.integration.generation.served import Generating
from tests.integration.web.served import until
from tests.unit.generation.tiny_model import llama_config, save_model

DEADLINE_S = 120.0
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def url(stack: Generating) -> str:
    model = save_model(stack.settings.local_models_dir / "talker", llama_config(max_position_embeddings=32_768))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    return f"http://127.0.0.1:{stack.settings.port}"


def environment(stack: Generating, url: str) -> dict[str, str]:
    return {**os.environ, "APT_JOBS_URL": url, "APT_JOBS_API_KEY": stack.served.key, "TERM": "dumb"}


def piped(stack: Generating, url: str, *arguments: str, turns: str = "") -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "apt_jobs", *arguments]
    return subprocess.run(
        command,
        env=environment(stack, url),
        input=turns,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


class Terminal:
    """A command in a terminal, and what it has shown."""

    def __init__(self, stack: Generating, url: str, *arguments: str) -> None:
        self._controller, terminal = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "apt_jobs", *arguments],
            env=environment(stack, url),
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        os.close(terminal)
        self.shown = b""

    def say(self, text: str) -> None:
        os.write(self._controller, text.encode() + b"\n")

    def wait(self, is_there: Callable[[bytes], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not is_there(self.shown):
            assert time.monotonic() < deadline, self.shown
            if select.select([self._controller], [], [], 0.2)[0]:
                try:
                    self.shown += os.read(self._controller, 1 << 16)
                except OSError:  # its other end was closed
                    break

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._controller)


def test_ctrl_c_stops_the_answer_and_its_job_but_not_the_program(stack: Generating, url: str) -> None:
    terminal = Terminal(stack, url, "chat", "--model", "talker", "--temperature", "0")
    try:
        terminal.wait(lambda shown: b"> " in shown)
        terminal.say("Hello")
        terminal.wait(lambda shown: len(shown.partition(b"Hello\r\n")[2]) > 20)
        terminal.process.send_signal(signal.SIGINT)
        terminal.wait(lambda shown: b"(stopped)" in shown and shown.rstrip().endswith(b">"))
        newest = stack.client.get("/api/jobs", params={"limit": 1}).json()["data"][0]["id"]
        until(lambda: stack.state(newest) == "cancelled")
        terminal.process.send_signal(signal.SIGINT)  # at the prompt it only says how to end
        terminal.wait(lambda shown: b"Ctrl-D or /end ends" in shown)
        terminal.say("/end")
        assert terminal.process.wait(DEADLINE_S) == 0
    finally:
        terminal.close()


def test_a_pipe_is_a_turn_a_line_and_the_model_sees_the_turns_before(stack: Generating, url: str) -> None:
    options = ("chat", "--model", "talker", "--temperature", "0", "--max-tokens", "6", "--system", "Be brief.")
    done = piped(stack, url, *options, turns="Hello\n\nAgain\n/new\nHello\n")
    assert (done.returncode, done.stderr) == (0, "")
    found: list[dict[str, Any]] = stack.client.get("/api/jobs", params={"limit": 3}).json()["data"]
    first, second, third = [job["spec"]["messages"] for job in reversed(found)]
    assert [message["role"] for message in second] == ["system", "user", "assistant", "user"]
    assert (second[1]["content"], second[3]["content"]) == ("Hello", "Again")
    assert first == third
    assert second[2]["content"]


def test_a_model_without_a_template_is_one_sentence(stack: Generating, url: str) -> None:
    done = piped(stack, url, "chat", "--model", "tiny", turns="Hello\n")
    assert done.returncode == 2
    assert "has no chat template" in done.stderr
    assert "Traceback" not in done.stderr


def test_models_are_listed_promoted_and_demoted(stack: Generating, url: str) -> None:
    assert "prime is talker" in piped(stack, url, "models", "promote", "prime", "talker").stdout
    listed = piped(stack, url, "models").stdout
    (line,) = [line for line in listed.splitlines() if line.startswith("talker ")]
    cells = line.split()
    assert (cells[1], cells[3], cells[4], cells[6]) == ("-", "32768", "yes", "prime")
    assert piped(stack, url, "generate", "Hello", "--model", "prime", "--max-length", "3", "--stream").returncode == 0
    assert piped(stack, url, "models", "demote", "prime").returncode == 0
    assert piped(stack, url, "models", "demote", "prime").returncode == 2


def test_both_clients_chat_and_stream(stack: Generating, url: str) -> None:
    options: dict[str, Any] = {"model": "talker", "max_tokens": 8, "temperature": 0}
    with Client(url, stack.served.key) as client:
        whole = client.chat(HELLO, **options)
        events = list(client.chat(HELLO, stream=True, **options))
        with pytest.raises(InvalidInput, match="no chat template"):
            client.chat(HELLO, model="tiny")
        with pytest.raises(NotFound, match="absent"):
            list(client.chat(HELLO, model="absent", stream=True))
    text = "".join(event["text"] for event in events[:-1])
    assert text == whole["choices"][0]["message"]["content"]
    assert (events[-1]["finish_reason"], events[-1]["usage"]) == ("length", whole["usage"])

    async def streamed() -> list[dict[str, Any]]:
        async with AsyncClient(url, stack.served.key) as client:
            assert await client.chat(HELLO, **options)
            return [event async for event in await client.chat(HELLO, stream=True, **options)]

    assert "".join(event.get("text", "") for event in asyncio.run(streamed())) == text
