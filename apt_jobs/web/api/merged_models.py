"""A checkpoint as one whole model: merged in a process of its own, since the web process never loads torch."""

import asyncio
import contextlib
import importlib.util
import os
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Literal

from apt_jobs.artifacts.models import ModelFolders
from apt_jobs.errors import InvalidCheckpoint, Unavailable
from apt_jobs.settings import Settings

DType = Literal["float32", "bfloat16", "float16"]
CHUNK_BYTES = 1 << 18
READY_WITHIN_S = 900.0  # until the first byte: all is loaded, merged and saved by then
MAX_ERROR_BYTES = 4_000
_one_at_a_time = asyncio.Semaphore(1)  # each holds a whole model in memory


async def merged_tar(settings: Settings, name: str, folders: ModelFolders, dtype: DType) -> AsyncIterator[bytes]:
    """Return the tar file of the merged model, as a stream that has begun.

    Raises:
        Unavailable: another model is merged now, or torch is not installed here.
        InvalidCheckpoint: the model cannot be loaded or merged, or there is no room for it.
    """
    if importlib.util.find_spec("torch") is None:
        raise Unavailable(
            "models are merged by torch, which is not installed with this web process: download the adapter without "
            "merged=true and merge it with peft, or install apt-jobs[train] here"
        )
    if _one_at_a_time.locked():
        raise Unavailable("another model is merged now; try again in a minute")
    chunks = _chunks(settings, name, folders, dtype)
    try:
        first = await anext(chunks)
    except BaseException:
        await chunks.aclose()
        raise
    return _joined(first, chunks)


async def _joined(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for chunk in rest:
        yield chunk


async def _chunks(settings: Settings, name: str, folders: ModelFolders, dtype: DType) -> AsyncGenerator[bytes, None]:
    """Yield what the process writes; it ends with this generator."""
    command = [
        *(sys.executable, "-m", "apt_jobs.training.merge", "--dtype", dtype, "--name", name),
        *("--scratch", str(settings.merged_dir), str(folders.folder), *map(str, folders.adapters)),
    ]
    async with _one_at_a_time:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            async with asyncio.timeout(READY_WITHIN_S):
                chunk = await process.stdout.read(CHUNK_BYTES)
            if not chunk:
                error = (await process.stderr.read())[-MAX_ERROR_BYTES:].decode("utf-8", "replace").strip()
                raise InvalidCheckpoint(f"the model cannot be merged: {error.splitlines()[-1] if error else 'no word'}")
            while chunk:
                yield chunk
                chunk = await process.stdout.read(CHUNK_BYTES)
        except TimeoutError as exc:
            raise Unavailable(f"the model was not merged within {READY_WITHIN_S:.0f} s") from exc
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await process.wait()
