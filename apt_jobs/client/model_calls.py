"""What both clients do with models: text from them, and the names that people give to them."""

from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from typing import Any, Literal, overload

from apt_jobs.client import calls
from apt_jobs.client.async_transport import AsyncTransport
from apt_jobs.client.following import ChatReader
from apt_jobs.client.transport import Transport


class ModelCalls(Transport):
    """The part of `Client` that is about models."""

    @overload
    def generate(self, text: str, *, stream: Literal[False] = False, **options: Any) -> dict[str, Any]: ...

    @overload
    def generate(self, text: str, *, stream: Literal[True], **options: Any) -> Generator[dict[str, Any]]: ...

    def generate(
        self, text: str, *, stream: bool = False, **options: Any
    ) -> dict[str, Any] | Generator[dict[str, Any]]:
        """Continue a text; options are those of `POST /api/generate`.

        With `stream=True`, events as they come: `{"kind": "delta", "text": ...}`, `{"kind": "restarted"}` when the text
        begins again, and last `{"kind": "end"}` with all of the answer. Closing the generator cancels the job.

        Example:
            client.generate("Once upon a time", max_length=50)["generated_text"]
        """
        if stream:
            return self._stream(calls.generate(text, {**options, "stream": True}))
        return self._send(calls.generate(text, options))

    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        model: str = "default",
        stream: Literal[False] = False,
        **options: Any,
    ) -> dict[str, Any]: ...

    @overload
    def chat(
        self, messages: Sequence[Mapping[str, str]], *, model: str = "default", stream: Literal[True], **options: Any
    ) -> Generator[dict[str, Any]]: ...

    def chat(
        self, messages: Sequence[Mapping[str, str]], *, model: str = "default", stream: bool = False, **options: Any
    ) -> dict[str, Any] | Generator[dict[str, Any]]:
        """Get the assistant's next message; options and answer are those of `POST /v1/chat/completions`.

        With `stream=True`, events as they come: `{"kind": "delta", "text": ...}`, and last `{"kind": "end"}` with
        `finish_reason` and `usage`. Closing the generator cancels the job.

        Example:
            for event in client.chat([{"role": "user", "content": "Hello"}], stream=True): ...
        """
        if stream:
            streamed = {**options, "stream": True, "stream_options": {"include_usage": True}}
            return self._stream(calls.chat(messages, model, streamed), ChatReader().read)
        return self._send(calls.chat(messages, model, options))

    def promote_model(self, alias: str, model: str) -> dict[str, Any]:
        """Let an alias stand for a model, or for a job's `job_...@latest`."""
        return self._send(calls.promote_model(alias, model))

    def delete_alias(self, alias: str) -> None:
        """Remove an alias; the model stays."""
        self._send(calls.delete_alias(alias))

    def models(self) -> list[dict[str, Any]]:
        """Get the models and checkpoints that can generate."""
        return self._send(calls.list_of_all("models"))


class AsyncModelCalls(AsyncTransport):
    """The same of `AsyncClient`."""

    @overload
    async def generate(self, text: str, *, stream: Literal[False] = False, **options: Any) -> dict[str, Any]: ...

    @overload
    async def generate(self, text: str, *, stream: Literal[True], **options: Any) -> AsyncGenerator[dict[str, Any]]: ...

    async def generate(
        self, text: str, *, stream: bool = False, **options: Any
    ) -> dict[str, Any] | AsyncGenerator[dict[str, Any]]:
        """Continue a text; options are those of `POST /api/generate`.

        With `stream=True`, events as they come: `{"kind": "delta", "text": ...}`, `{"kind": "restarted"}` when the text
        begins again, and last `{"kind": "end"}` with all of the answer. Closing the generator cancels the job.

        Example:
            async for event in await client.generate("Once upon a time", stream=True): ...
        """
        if stream:
            return self._stream(calls.generate(text, {**options, "stream": True}))
        return await self._send(calls.generate(text, options))

    @overload
    async def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        model: str = "default",
        stream: Literal[False] = False,
        **options: Any,
    ) -> dict[str, Any]: ...

    @overload
    async def chat(
        self, messages: Sequence[Mapping[str, str]], *, model: str = "default", stream: Literal[True], **options: Any
    ) -> AsyncGenerator[dict[str, Any]]: ...

    async def chat(
        self, messages: Sequence[Mapping[str, str]], *, model: str = "default", stream: bool = False, **options: Any
    ) -> dict[str, Any] | AsyncGenerator[dict[str, Any]]:
        """Get the assistant's next message; options and answer are those of `POST /v1/chat/completions`.

        With `stream=True`, events as they come: `{"kind": "delta", "text": ...}`, and last `{"kind": "end"}` with
        `finish_reason` and `usage`. Closing the generator cancels the job.

        Example:
            async for event in await client.chat([{"role": "user", "content": "Hello"}], stream=True): ...
        """
        if stream:
            streamed = {**options, "stream": True, "stream_options": {"include_usage": True}}
            return self._stream(calls.chat(messages, model, streamed), ChatReader().read)
        return await self._send(calls.chat(messages, model, options))

    async def promote_model(self, alias: str, model: str) -> dict[str, Any]:
        """Let an alias stand for a model, or for a job's `job_...@latest`."""
        return await self._send(calls.promote_model(alias, model))

    async def delete_alias(self, alias: str) -> None:
        """Remove an alias; the model stays."""
        await self._send(calls.delete_alias(alias))

    async def models(self) -> list[dict[str, Any]]:
        """Get the models and checkpoints that can generate."""
        return await self._send(calls.list_of_all("models"))
