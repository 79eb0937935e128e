"""How many tokens a second the whole product streams over REST, and how soon an interactive text begins beside a batch.

    python -m benchmarks.gpu_serve            # on a GPU: 1, 32 and 128 clients of the 135M Llama
    python -m benchmarks.gpu_serve --small    # on CPU, in small form

Starts `apt-jobs up` in a folder of its own. Each client streams one text of 128 new tokens over server-sent events.
"crowded": the first token of one short text while one request has 64 texts of many tokens.
"""

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.gpu_generate import llama

START_S, REQUEST_S, COMPILE_S = 120.0, 240.0, 100.0
REPEATS = 5


def save(folder: Path, *, small: bool) -> None:
    """Write the model with a tokenizer of bytes, and of a word for each other token, so that all of them are text."""
    model = llama(small=small).to(torch.float32 if small else torch.bfloat16)  # type: ignore[arg-type]  # one argument
    model.save_pretrained(folder)
    alphabet = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words = {f"w{number}": number for number in range(len(alphabet), model.config.vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet | words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)  # type: ignore[no-untyped-call]


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Start the product; yields its URL and the headers of its key."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {**os.environ, "APT_JOBS_DATA_DIR": str(folder), "APT_JOBS_PORT": str(port)}
    with (folder / "up.log").open("w") as log:
        up = subprocess.Popen([sys.executable, "-m", "apt_jobs", "up"], env=environment, stdout=log, stderr=log)
    try:
        url, deadline_s = f"http://127.0.0.1:{port}", time.monotonic() + START_S
        while True:
            try:
                key = json.loads((folder / "local.json").read_text())["api_key"]
                headers = {"authorization": f"Bearer {key}"}
                workers = httpx.get(f"{url}/api/workers", headers=headers).raise_for_status().json()
                if any(worker["kind"] == "generate" for worker in workers["data"]):
                    break
            except (OSError, httpx.HTTPError, ValueError, KeyError):
                pass
            if time.monotonic() > deadline_s:
                raise TimeoutError((folder / "up.log").read_text()[-4_000:])
            time.sleep(0.2)
        yield url, headers
    finally:
        up.send_signal(signal.SIGINT)
        up.wait(60)


async def stream(client: httpx.AsyncClient, number: int, num_prompt: int, num_new: int) -> tuple[float, int]:
    """Stream one text; returns seconds to its first token and its number of tokens."""
    body = {
        "model": "llama",
        "text": f"{number:04d}".ljust(num_prompt, "x"),
        "max_tokens": num_new,
        "min_tokens": num_new,
        "temperature": 0.0,
        "stream": True,
    }
    began_s, first_s, num_tokens = time.perf_counter(), 0.0, 0
    async with client.stream("POST", "/api/generate", json=body) as response:
        if response.is_error:
            raise RuntimeError((await response.aread()).decode())
        async for line in response.aiter_lines():
            if not line.startswith("data:"):
                continue
            first_s = first_s or time.perf_counter() - began_s
            found = json.loads(line[5:])
            num_tokens = (found.get("usage") or {}).get("completion_tokens", num_tokens)
    return first_s, num_tokens


async def crowd(url: str, headers: dict[str, str], rows: int, num_prompt: int, num_new: int) -> dict[str, Any]:
    """Stream `rows` texts at once, a few times; returns medians."""
    limits = httpx.Limits(max_connections=rows)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=REQUEST_S, limits=limits) as client:
        rates, firsts, counted = list[float](), list[float](), 0
        for repeat in range(REPEATS):
            began_s = time.perf_counter()
            done = await asyncio.gather(
                *(stream(client, rows * repeat + row, num_prompt, num_new) for row in range(rows))
            )
            rates.append(rows * num_new / (time.perf_counter() - began_s))
            firsts += [first_s for first_s, _ in done]
            counted += sum(num for _, num in done)
        return {
            "tokens_per_s": round(statistics.median(rates), 1),
            "best": round(max(rates), 1),
            "first_token_ms": round(1e3 * statistics.median(firsts), 1),
            "counted": counted,
        }


async def crowded(url: str, headers: dict[str, str], num_batch: int, num_long: int) -> dict[str, float]:
    """Return the first token of one text alone, and beside a request with many long ones."""
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=REQUEST_S) as client:
        alone = [(await stream(client, 9_000 + number, 16, 4))[0] for number in range(REPEATS)]
        texts = [f"batch {number}" for number in range(num_batch)]
        body = {"model": "llama", "texts": texts, "max_tokens": num_long, "min_tokens": num_long}
        batch = asyncio.create_task(client.post("/api/batch_generate", json=body))
        await asyncio.sleep(1.0)
        beside = [(await stream(client, 9_100 + number, 16, 4))[0] for number in range(REPEATS)]
        is_running = not batch.done()
        batch.cancel()
        return {
            "alone_ms": round(1e3 * statistics.median(alone), 1),
            "beside_ms": round(1e3 * statistics.median(beside), 1),
            "batch_still_ran": float(is_running),
        }


def main() -> None:
    """Measure and print one line of JSON a figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model and few tokens")
    parser.add_argument("--rows", type=int, nargs="+", help="default: 1 32 128; small: 1 3")
    parser.add_argument("--compile-s", type=float, default=COMPILE_S, help="seconds for the compiler, of each size")
    options = parser.parse_args()
    rows = options.rows or ([1, 3] if options.small else [1, 32, 128])
    num_prompt, num_new = (9, 8) if options.small else (64, 128)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(folder / "models" / "llama", small=options.small)
        with served(folder) as (url, headers):
            for num_rows in rows:
                for kind, pause_s in {"graphs": 0.0, "compiled": 0.0 if options.small else options.compile_s}.items():
                    if kind == "compiled" and not pause_s:
                        continue
                    time.sleep(pause_s)
                    found = asyncio.run(crowd(url, headers, num_rows, num_prompt, num_new))
                    print(num_rows, kind, json.dumps(found), flush=True)
            beside = asyncio.run(crowded(url, headers, *((4, 64) if options.small else (64, 1_900))))
            print("crowded", json.dumps(beside), flush=True)


if __name__ == "__main__":
    main()
