"""An OpenAI-compatible server as the engine of some models: vLLM, SGLang, llama.cpp, `transformers serve`.

Its models are those of its `/v1/models`, known here as `external.` and their name. A text is a streamed request; a
stopped one has its connection closed, which is how such servers learn of it. All of it runs in the event loop of one
thread, and every wait is bounded.
"""

import asyncio
import logging
import re
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import httpx
import orjson

from apt_jobs.artifacts.models import EXTERNAL_PREFIX
from apt_jobs.errors import AptJobsError, InvalidInput, NotFound, Unavailable, WorkerLacks
from apt_jobs.generation.request import Generated, OnText, Request, Stopped
from apt_jobs.generation.sequences import FinishReason
from apt_jobs.jobs.spec import GenerateSpec

logger = logging.getLogger(__name__)

LIST_EVERY_S = 5.0
CONNECT_TIMEOUT_S = 5.0
MAX_TEXT_S = 3_600.0  # of one text, however much of it comes
MAX_REQUESTS = 64  # at once
MAX_MODELS = 200
MAX_BYTES = 1 << 20  # of a list, an event or an error
MAX_TEXT_CHARS = 1 << 20
MAX_SHOWN_CHARS = 500
_NAME = re.compile(r"[^A-Za-z0-9._-]+")
_NOT_THERE = ("top_k", "min_p", "repetition_penalty", "min_tokens", "stop_token_ids", "logprobs", "regex", "truncate")


@dataclass(slots=True)
class _Text:
    """One output that grows."""

    text: str = ""
    finish_reason: FinishReason | None = None
    num_prompt_tokens: int = 0
    num_tokens: int = 0


class ExternalEngine:
    """Thread-safe.

    Args:
        url: of the server, as `http://127.0.0.1:8000/v1`.
        api_key: sent as a bearer token.
        timeout_s: longest silence while a text is waited for.
    """

    def __init__(self, url: str, api_key: str | None = None, *, timeout_s: float = 120.0) -> None:
        self._url, self._timeout_s = url.rstrip("/"), timeout_s
        self._headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self._names: dict[str, str] = {}  # by our id, the server's
        self._why_not: str | None = "it has not answered yet"
        self._listed = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="external engine", daemon=True)
        self._thread.start()

    @property
    def model_ids(self) -> list[str]:
        """Return our ids of what the server had a moment ago; none while it does not answer."""
        return sorted(self._names)

    def submit(self, model_id: str, spec: GenerateSpec, on_text: OnText | None = None) -> Request:
        """Queue a request, as `Engine.submit` does.

        Raises:
            InvalidInput: it asks for what such servers do not have.
            WorkerLacks: the server does not have the model, or does not answer.
        """
        missing = [name for name in spec.changed_options() if name in _NOT_THERE]
        if spec.embed is not None:
            missing.append("embed")
        if missing:
            raise InvalidInput(f"model {model_id} is an external engine's, which has no {', '.join(missing)}")
        self._listed.wait(CONNECT_TIMEOUT_S)
        name = self._names.get(model_id)
        if name is None:
            why = f"does not answer: {self._why_not}" if self._why_not else "does not list it in its /v1/models"
            raise WorkerLacks(f"the external engine of {model_id} {why}")
        request = Request(spec, on_text=on_text)
        task = asyncio.run_coroutine_threadsafe(self._serve(request, name), self._loop)

        def stop() -> None:
            task.cancel()

        request.on_stop = stop
        return request

    def close(self) -> None:
        """Close all connections; requests at work fail."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        limits = httpx.Limits(max_connections=MAX_REQUESTS, max_keepalive_connections=MAX_REQUESTS)
        timeout = httpx.Timeout(self._timeout_s, connect=CONNECT_TIMEOUT_S)
        self._client = httpx.AsyncClient(headers=self._headers, timeout=timeout, limits=limits, trust_env=False)
        self._loop.create_task(self._list_loop())
        self._loop.run_forever()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.run_until_complete(self._client.aclose())
        self._loop.close()

    async def _list_loop(self) -> None:
        while True:
            why_not = None
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    self._names = await self._list()
            except (httpx.HTTPError, TimeoutError, AptJobsError) as exc:
                self._names, why_not = {}, str(exc) or repr(exc)
            if why_not != self._why_not:
                logger.info("the external engine: %s", why_not or "answers", extra={"url": self._url})
            self._why_not = why_not
            self._listed.set()
            await asyncio.sleep(LIST_EVERY_S)

    async def _list(self) -> dict[str, str]:
        async with self._client.stream("GET", f"{self._url}/models") as response:
            body = await _read(response)
        if response.status_code != 200:
            raise _refusal(response.status_code, body)
        try:
            names = [str(model["id"]) for model in orjson.loads(body)["data"][:MAX_MODELS]]
        except (ValueError, KeyError, TypeError) as exc:
            raise Unavailable(f"its /v1/models is no list of models: {exc!r}") from exc
        return {(EXTERNAL_PREFIX + _NAME.sub("--", name))[:100]: name for name in names}

    async def _serve(self, request: Request, model: str) -> None:
        """Answer a request: each draw of each text is a request of its own."""
        spec = request.spec
        texts = [_Text() for _ in range(spec.num_sequences)]
        tasks = [
            asyncio.create_task(self._generate(request, index, text, _body(spec, model, index)))
            for index, text in enumerate(texts)
        ]
        try:
            await asyncio.gather(*tasks)
        except asyncio.CancelledError:
            request.fail(Stopped("the generation was stopped"))
        except TimeoutError:
            request.fail(Unavailable(f"the external engine was at a text for {MAX_TEXT_S:.0f} s"))
        except httpx.TimeoutException:
            request.fail(Unavailable(f"the external engine was silent for {self._timeout_s:.0f} s"))
        except httpx.HTTPError as exc:
            request.fail(Unavailable(f"the external engine does not answer: {exc!r}"))
        except AptJobsError as exc:
            request.fail(exc)
        except Exception as exc:
            logger.exception("a request to the external engine broke")
            request.fail(Unavailable(f"the request to the external engine broke: {exc!r}"))
        else:
            request.succeed(_generated(texts, spec.n))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _generate(self, request: Request, index: int, text: _Text, body: dict[str, Any]) -> None:
        path = "completions" if "prompt" in body else "chat/completions"

        def add(more: str) -> None:
            text.text += more
            if len(text.text) > MAX_TEXT_CHARS:
                raise Unavailable(f"the external engine sends more than {MAX_TEXT_CHARS:,} characters")
            if more and request.on_text is not None:
                request.on_text(index, more, [])

        async with (
            asyncio.timeout(MAX_TEXT_S),
            self._client.stream("POST", f"{self._url}/{path}", json=body) as response,
        ):
            if response.status_code != 200:
                raise _refusal(response.status_code, await _read(response))
            async for event in _events(response):
                _take(event, text, add)
        if text.finish_reason is None:
            raise Unavailable("the external engine ended a stream before its text was done")


def _body(spec: GenerateSpec, model: str, index: int) -> dict[str, Any]:
    """Return the request of one draw. What is left out is as the server has it."""
    draw = index % spec.n
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": spec.max_new_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": spec.temperature,
        "top_p": spec.top_p,
        "seed": None if spec.seed is None else (spec.seed + draw) % 2**63,
        "stop": spec.stop or None,
        "logit_bias": {str(token): bias for token, bias in spec.logit_bias.items()} or None,
        "presence_penalty": spec.presence_penalty or None,
        "frequency_penalty": spec.frequency_penalty or None,
    }
    if spec.json_schema is not None:
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": spec.json_schema, "strict": True},
        }
    if spec.messages is not None:
        body["messages"] = [message.model_dump() for message in spec.messages]
    else:
        body["prompt"] = spec.texts[index // spec.n]
    return {name: value for name, value in body.items() if value is not None}


def _take(event: dict[str, Any], text: _Text, add: Callable[[str], None]) -> None:
    """Add what an event says."""
    if (error := event.get("error")) is not None:
        raise Unavailable(f"the external engine failed: {_words(error)}")
    try:
        for choice in event.get("choices") or ():
            add(choice.get("text") or (choice.get("delta") or {}).get("content") or "")
            if (reason := choice.get("finish_reason")) is not None:
                text.finish_reason = "length" if reason == "length" else "stop"
        if usage := event.get("usage"):
            text.num_prompt_tokens, text.num_tokens = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise Unavailable(f"the external engine sends what is no completion: {exc!r}") from exc


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """Yield the data of server-sent events, each of bounded size, until `[DONE]`."""
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        if len(rest) > MAX_BYTES:
            raise Unavailable(f"the external engine sends an event of more than {MAX_BYTES:,} bytes")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            try:
                event = orjson.loads(data)
            except ValueError as exc:
                raise Unavailable(f"the external engine sends what is no JSON: {data[:100]!r}") from exc
            if isinstance(event, dict):
                yield event


async def _read(response: httpx.Response) -> bytes:
    """Read a body of bounded size."""
    body = b""
    async for part in response.aiter_bytes():
        body += part
        if len(body) > MAX_BYTES:
            raise Unavailable(f"the external engine sends more than {MAX_BYTES:,} bytes")
    return body


def _refusal(status: int, body: bytes) -> AptJobsError:
    """Return what a status of the server means here."""
    try:
        document = orjson.loads(body)
        words = _words(document.get("error") or document.get("detail") or document)
    except (ValueError, AttributeError):
        words = body[:MAX_SHOWN_CHARS].decode(errors="replace")
    detail = f"the external engine answers {status}: {words}"
    if status == 404:
        return NotFound(detail)
    return InvalidInput(detail) if status in (400, 413, 422) else Unavailable(detail)


def _words(error: object) -> str:
    message = error.get("message", error) if isinstance(error, dict) else error
    return str(message)[:MAX_SHOWN_CHARS]


def _generated(texts: list[_Text], num_draws: int) -> Generated:
    firsts = texts[::num_draws]
    return Generated(
        outputs=[text.text for text in texts],
        num_prompt_tokens=[text.num_prompt_tokens for text in firsts],
        num_tokens=[text.num_tokens for text in texts],
        finish_reasons=[text.finish_reason or "stop" for text in texts],
        truncated=[False] * len(firsts),
    )
