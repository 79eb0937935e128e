"""How fast data sets are prepared: text and conversations, against `tokenizers` and transformers doing only their part.

The peers hold everything in memory and write nothing; ours reads the file, and writes tokens and borders to the disk.
"""

import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from apt_jobs.events.spool import SpoolWriter
from apt_jobs.jobs.dataset_format import DatasetFormat
from apt_jobs.jobs.run_file import RunFile
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.training.prepare import prepared_data
from apt_jobs.training.tokenizer import train_tokenizer
from benchmarks.rows import Row, paired_row

Peer = tuple[str, Callable[[], None]]
NUM_TURNS = 3
TEXT_MB, NUM_CONVERSATIONS = 4, 2_000
PEER_LINES = 10_000  # encoded at once
TEMPLATE = (
    "{% for message in messages %}{{ message.role + ': ' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + eos_token }}{% endgeneration %}{% else %}{{ message.content + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def rows() -> Iterator[Row]:
    """`data/text` and `data/conversations` in MB/s (more is better)."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(20_000)]
    lines = [" ".join(draw.choices(words, k=100)) + "\n" for _ in range(TEXT_MB * 1_540)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = train_tokenizer("".join(lines[:2_000]), 8_192, 4_096)
        tokenizer.chat_template = TEMPLATE
        (folder / "model").mkdir()
        tokenizer.save_pretrained(folder / "model")
        (folder / "model" / "config.json").write_text('{"model_type": "llama"}')
        (folder / "text").write_text("".join(lines))
        encode = ("tokenizers.encode_batch_fast", lambda: _encode(tokenizer, lines))
        yield _row("data/text", folder, folder / "text", DatasetFormat.TEXT, encode)
        chats = [_conversation(draw, lines) for _ in range(NUM_CONVERSATIONS)]
        (folder / "chats").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
        apply = ("apply_chat_template, one by one as TRL does", lambda: _apply(tokenizer, chats))
        yield _row("data/conversations", folder, folder / "chats", DatasetFormat.JSONL, apply)


def _row(name: str, folder: Path, file: Path, dataset_format: DatasetFormat, named_peer: Peer) -> Row:
    ours, megabytes = _prepared(folder, file, dataset_format), file.stat().st_size / 1e6
    peer_name, peer = named_peer
    pairs = [(megabytes / _time_s(ours), megabytes / _time_s(peer)) for _ in range(NUM_TURNS)]
    return paired_row(name, [pair[0] for pair in pairs], [pair[1] for pair in pairs], peer_name, "MB/s")


def _time_s(function: Callable[[], None]) -> float:
    began_s = time.perf_counter()
    function()
    return time.perf_counter() - began_s


def _prepared(folder: Path, file: Path, dataset_format: DatasetFormat) -> Callable[[], None]:
    """Return a preparation of the file, in a folder of its own each time: it finds nothing made."""

    def prepare() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as run_dir:
            run_file = _run_file(Path(run_dir), folder / "model", file, dataset_format)
            with SpoolWriter(run_file.spool_path(0)) as spool, prepared_data(run_file, spool, 0) as tokenizer:
                assert tokenizer is not None

    return prepare


def _run_file(run_dir: Path, model: Path, file: Path, dataset_format: DatasetFormat) -> RunFile:
    spec = {"kind": "train", "dataset": "mine", "base_model": "model", "model": {"max_seq_len": 4_096}}
    return RunFile(
        job_id="job_x",
        attempt=1,
        spec=TrainSpec.model_validate(spec),
        dataset_file=file,
        dataset_format=dataset_format,
        base_model_dir=model,
        run_dir=run_dir,
        checkpoints_dir=run_dir / "checkpoints",
        checkpoint_prefix="job_x",
    )


def _conversation(draw: random.Random, lines: list[str]) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * draw.randint(1, 3)
    return [{"role": role, "content": draw.choice(lines)[: draw.randint(50, 600)]} for role in roles]


def _encode(tokenizer: PreTrainedTokenizerFast, lines: list[str]) -> None:
    for first in range(0, len(lines), PEER_LINES):
        tokenizer.backend_tokenizer.encode_batch_fast(lines[first : first + PEER_LINES], add_special_tokens=False)


def _apply(tokenizer: PreTrainedTokenizerFast, chats: list[Any]) -> None:
    for chat in chats:
        tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True)
