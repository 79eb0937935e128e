"""What generation costs on CPU: many single requests against one with all texts, one token over REST, long texts.

The model has 4 layers of width 128. `join` is of the whole stack, on SQLite; `step` of the engine alone.
"""

import asyncio
import json
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from transformers import LlamaForCausalLM

from apt_jobs.generation.models import load_model
from apt_jobs.generation.probe import make_runner
from apt_jobs.generation.scheduler import Scheduler
from apt_jobs.generation.sequences import Handle, SamplingParams, Sequence
from benchmarks.rows import Row, paired_row
from tests.acceptance.stack import DEADLINE_S, Stack, has_both_workers, until
from tests.unit.generation.tiny_model import llama_config, save_model

NUM_TEXTS, NUM_TOKENS = 32, 40
NUM_ROUNDS = 9
NUM_SINGLE_TOKENS = 40
SHORT, LONG = 100, 2_000  # tokens in the context
NUM_STEPS = 20  # of one measurement
TEXTS = [f"The statement number {number} is" for number in range(NUM_TEXTS)]
BATCH = f"one request with {NUM_TEXTS} texts"


def rows() -> Iterator[Row]:
    """`generate/join-wall` and `join-cpu` (all processes of the stack), `one-token`, `step`."""
    with tempfile.TemporaryDirectory() as folder:
        stack = Stack(Path(folder), APT_JOBS_LEASE_S="60", APT_JOBS_HEARTBEAT_S="10")  # as users have it
        try:
            until(lambda: (stack.data_dir / "local.json").exists())
            save_small(stack.data_dir / "models" / "small")
            with stack.client() as client:
                until(lambda: has_both_workers(client))
            yield from _served(stack)
        finally:
            stack.process.send_signal(signal.SIGINT)
            stack.process.communicate(timeout=DEADLINE_S)
    with tempfile.TemporaryDirectory() as folder:
        yield _step_row(save_small(Path(folder) / "small"))


def save_small(folder: Path) -> Path:
    """Write the model."""
    return save_model(
        folder,
        llama_config(hidden_size=128, intermediate_size=344, num_hidden_layers=4, max_position_embeddings=4_096),
        LlamaForCausalLM,
    )


def _served(stack: Stack) -> Iterator[Row]:
    headers = {"authorization": f"Bearer {json.loads((stack.data_dir / 'local.json').read_text())['api_key']}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{stack.port}", headers=headers, timeout=120.0) as client:

        def batch() -> None:
            _ask(client, "batch_generate", texts=TEXTS, max_length=NUM_TOKENS)

        def singles() -> None:
            asyncio.run(_crowd(client))

        batch()
        singles()
        pairs = [(_measured(stack, singles), _measured(stack, batch)) for _ in range(NUM_ROUNDS)]
        for place, name in enumerate(("wall", "cpu")):
            ours, peer = [pair[0][place] for pair in pairs], [pair[1][place] for pair in pairs]
            yield paired_row(f"generate/join-{name}", ours, peer, BATCH, "s")
        whole_s, engine_s = [], []
        for _ in range(NUM_SINGLE_TOKENS):
            started_s = time.perf_counter()
            answer = _ask(client, "generate", text="a", max_length=1)
            whole_s.append(time.perf_counter() - started_s)
            engine_s.append(answer["generation_time_ms"] / 1e3)
        yield paired_row("generate/one-token", whole_s, engine_s, "the same in the engine", "s")


def _measured(stack: Stack, call: Callable[[], None]) -> tuple[float, float]:
    """Return seconds, and CPU seconds of the stack's processes."""
    before_s, started_s = _cpu_s(stack), time.perf_counter()
    call()
    return time.perf_counter() - started_s, _cpu_s(stack) - before_s


def _cpu_s(stack: Stack) -> float:
    process = psutil.Process(stack.process.pid)
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def _ask(client: httpx.Client, what: str, **body: Any) -> dict[str, Any]:
    response = client.post(f"/api/{what}", json={"model": "small", **body})
    response.raise_for_status()
    answer: dict[str, Any] = response.json()
    return answer


async def _crowd(client: httpx.Client) -> None:
    async with httpx.AsyncClient(base_url=client.base_url, headers=client.headers, timeout=120.0) as crowd:
        bodies = [{"model": "small", "text": text, "max_length": NUM_TOKENS} for text in TEXTS]
        for response in await asyncio.gather(*(crowd.post("/api/generate", json=body) for body in bodies)):
            response.raise_for_status()


def _step_row(folder: Path) -> Row:
    torch.set_num_threads(1)
    model = load_model(folder, torch.device("cpu"))

    def step_s(num_tokens: int) -> float:
        runner = make_runner(model, max_rows=NUM_TEXTS, compile_graphs=False)
        scheduler = Scheduler(runner, "small")
        params = SamplingParams(max_tokens=2 * NUM_STEPS)
        sequences = [
            Sequence([1 + row] * num_tokens, params, model.context_tokens, Handle().push) for row in range(NUM_TEXTS)
        ]
        for sequence in sequences:
            scheduler.submit(sequence)
        while not all(sequence.output_ids for sequence in sequences):
            scheduler.step()
        times_s = []
        for _ in range(NUM_STEPS):
            before_s = time.process_time()
            scheduler.step()
            times_s.append(time.process_time() - before_s)
        runner.close()
        return statistics.median(times_s)

    pairs = [(step_s(LONG), step_s(SHORT)) for _ in range(3)]
    peer = f"a step of {NUM_TEXTS} rows at {SHORT} tokens"
    return paired_row(f"generate/step-{LONG}", [one for one, _ in pairs], [other for _, other in pairs], peer, "s")
