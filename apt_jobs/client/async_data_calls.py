"""What a client brings to the service for jobs: data sets, secrets and packed code. A part of `AsyncClient`."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from apt_jobs.client import calls
from apt_jobs.client.async_transport import AsyncTransport
from apt_jobs.client.packing import pack_folder
from apt_jobs.client.upload_plan import next_step, upload_steps
from apt_jobs.errors import AptJobsError, NotFound
from apt_jobs.jobs.code import DEFAULT_MAX_BYTES

PART_BYTES = 1 << 20  # of an upload


class AsyncDataCalls(AsyncTransport):
    """The methods of `AsyncClient` for data sets and code, and for what is kept."""

    async def prune(self, policy: Mapping[str, Any] | None = None, *, dry_run: bool = True) -> dict[str, Any]:
        """Remove what a policy says, in one run, or say what would go."""
        return await self._send(calls.prune(policy, dry_run))

    async def datasets(self) -> list[dict[str, Any]]:
        """Get the data sets, the built-in one first."""
        return await self._send(calls.list_of_all("datasets"))

    async def upload_dataset(
        self, name: str, content: bytes | IO[bytes], *, format: str = "text", column: str = "text"
    ) -> dict[str, Any]:
        """Add a data set, from bytes or an open file. `format` and `column` are those of `POST /api/datasets`."""
        body = content if isinstance(content, bytes) else _parts_of(content)
        answer = await self._json(
            "POST", "/api/datasets", params=calls.upload_parameters(name, format, column), content=body
        )
        return dict(answer)

    async def upload_dataset_file(
        self,
        name: str,
        file: str | os.PathLike[str],
        *,
        format: str = "text",
        column: str = "text",
        on_progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, Any]:
        """Add a data set from a file, in parts, as `Client.upload_dataset_file` does.

        Raises:
            InvalidInput: the file cannot be read, or is not of the format.
            Conflict: there is such a data set.
        """
        steps = upload_steps(Path(file), name, format, column, on_progress)
        answer: dict[str, Any] | AptJobsError | None = None
        while True:
            step = await asyncio.to_thread(next_step, steps, answer)  # it reads the file
            if isinstance(step, dict):
                return step
            answer = None
            if isinstance(step, float):
                await asyncio.sleep(step)
                continue
            try:
                answer = await self._send(step)
            except AptJobsError as exc:
                answer = exc

    async def preview_dataset(self, name: str, *, rows: int = 5, model: str | None = None) -> dict[str, Any]:
        """Get the first rows of a data set, and their tokens by the tokenizer of `model`."""
        return await self._send(calls.preview_dataset(name, rows, model))

    async def delete_dataset(self, name: str) -> None:
        """Delete a data set."""
        await self._send(calls.delete_dataset(name))

    async def secrets(self) -> list[dict[str, Any]]:
        """Get the names of the secrets that jobs may ask for; nobody gets their values."""
        return await self._send(calls.list_of_all("secrets"))

    async def set_secret(self, name: str, value: str) -> dict[str, Any]:
        """Store a value, which jobs with `"secrets": [name]` get as an environment variable. Needs the role admin."""
        return await self._send(calls.set_secret(name, value))

    async def delete_secret(self, name: str) -> None:
        """Remove a secret; jobs that run keep it."""
        await self._send(calls.delete_secret(name))

    async def upload_code(self, folder: str | os.PathLike[str], max_bytes: int = DEFAULT_MAX_BYTES) -> dict[str, Any]:
        """Pack a folder and upload it, unless the service has it: what git tracks and what it does not ignore.

        Args:
            folder: The code, from which a job's command runs.
            max_bytes: More than so many are not packed.

        Returns:
            What the service knows of it; a job brings it as `"code": {"sha256": ...}`.

        Raises:
            InvalidInput: the folder holds what cannot be packed; the message names the file.
            Denied: the operator does not allow it.

        Example:
            code = await client.upload_code(".")
            command = ["python", "train.py"]
            job = {"kind": "train", "code": {"sha256": code["sha256"]}, "argv": command, "launcher": "none"}
            await client.submit(job)
        """
        with ExitStack() as stack:
            packed = await asyncio.to_thread(stack.enter_context, pack_folder(Path(folder), max_bytes))
            try:
                return await self.code(packed.sha256)
            except NotFound:
                path, parts = calls.code_path(packed.sha256), _parts_of(packed.file)
                return dict(await self._json("PUT", path, content=parts, timeout=calls.UPLOAD_TIMEOUT_S))

    async def code(self, sha256: str) -> dict[str, Any]:
        """Get what is known of packed code: its size, commit and branch, and the diff to that commit.

        Raises:
            NotFound: it was never uploaded, or was removed since no job names it.
        """
        return await self._send(calls.get_code(sha256))


async def _parts_of(file: IO[bytes]) -> AsyncIterator[bytes]:
    while part := await asyncio.to_thread(file.read, PART_BYTES):
        yield part
