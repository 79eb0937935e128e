"""The example that tokenises text into shards: what it writes is what jobs read."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.training.tokenizer import train_tokenizer

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


def test_shards_hold_the_documents_in_order_each_with_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["some words and 文字\n" * 30, "other words\n" * 10]
    tokenizer = train_tokenizer("".join(texts), 300, 64)
    tokenizer.save_pretrained(tmp_path / "model")
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    files = [str(tmp_path / f"{number}.txt") for number in range(2)]
    options = ["--output", str(tmp_path / "shards"), "--shard-tokens", "100"]
    monkeypatch.setattr(sys, "argv", ["make_shards.py", str(tmp_path / "model"), *files, *options])
    runpy.run_path(str(EXAMPLES / "make_shards.py"), run_name="__main__")
    shards = [np.fromfile(file, "<u2") for file in sorted((tmp_path / "shards").glob("*.u16.bin"))]
    assert [len(shard) for shard in shards[:-1]] == [100] * (len(shards) - 1)
    assert tokenizer.decode(np.concatenate(shards).tolist()) == tokenizer.eos_token.join([*texts, ""])


@pytest.mark.parametrize("name", ["shards_job.json", "preferences_job.json", "lora_job.json", "fine_tuning_job.json"])
def test_the_jobs_of_the_examples_are_jobs(name: str) -> None:
    TrainSpec.model_validate(json.loads((EXAMPLES / name).read_text()))
