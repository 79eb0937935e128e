"""Fine-tuning on packed conversations under real torchrun, two ranks: resume to the bit, and what a validation is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from apt_jobs.events.kinds import StepTrained, TrainingStarted, Validated
from apt_jobs.jobs.dataset_format import DatasetFormat
from apt_jobs.jobs.run_file import RunFile
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.training.prepared import read_pointer
from tests.integration.run_files import run_file_in
from tests.integration.training.test_training import events_of, launch
from tests.integration.training.tiny_chat_model import (
    CONTEXT,
    conversations,
    preferences,
    save_chat_model,
    write_jsonl,
)

SEED, NUM_ROWS = 5, 60
OPTIONS = {
    "max_steps": 4,
    "batch_size": 1,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.01,
    "warmup_steps": 1,
    "checkpoint_every_steps": 2,
    "validation_fraction": 0.2,
    "seed": SEED,
}


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("model") / "chat")


def _tune(folder: Path, model: Path, resume_dir: Path | None = None, num_ranks: int = 2, **options: Any) -> RunFile:
    folder.mkdir()
    (folder / "checkpoints").mkdir()
    is_pairs = options.get("objective") == "dpo"
    spec = {
        "kind": "train",
        "num_ranks": num_ranks,
        "device": "cpu",
        "dataset": "mine",
        "base_model": "chat",
        "model": {"max_seq_len": CONTEXT},
        "training": {**OPTIONS, **options},
    }
    run_file = run_file_in(
        folder,
        TrainSpec.model_validate(spec),
        dataset_file=write_jsonl(folder / "rows.jsonl", (preferences if is_pairs else conversations)(NUM_ROWS)),
        dataset_format=DatasetFormat.JSONL,
        base_model_dir=model,
        resume_dir=resume_dir,
    )
    (folder / "run.json").write_text(run_file.model_dump_json())
    assert launch(run_file, num_ranks) == 0, events_of(run_file)
    return run_file


@pytest.fixture(scope="module")
def whole(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFile:
    return _tune(tmp_path_factory.mktemp("tuning") / "whole", chat_model)


def test_a_resumed_fine_tuning_ends_bitwise_where_the_whole_one_did(
    whole: RunFile, chat_model: Path, tmp_path: Path
) -> None:
    resumed = _tune(tmp_path / "resumed", chat_model, whole.checkpoints_dir / "step-00000002-a1")
    assert [event.step for event in events_of(resumed) if isinstance(event, StepTrained)] == [3, 4]
    expected = load_file(whole.checkpoints_dir / "step-00000004-a1" / "model.safetensors")
    found = load_file(resumed.checkpoints_dir / "step-00000004-a1" / "model.safetensors")
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_the_validation_loss_is_the_mean_over_the_answer_tokens_of_a_seeded_sample(whole: RunFile) -> None:
    model = AutoModelForCausalLM.from_pretrained(whole.checkpoints_dir / "step-00000004-a1", dtype=torch.float32)
    examples = read_pointer(whole.run_dir).open_examples()
    order = torch.randperm(NUM_ROWS, generator=torch.Generator().manual_seed(SEED)).tolist()
    loss_sum = num_targets = 0.0
    for one in order[: NUM_ROWS // 5]:
        part = slice(int(examples.bounds[one]), int(examples.bounds[one + 1]))
        ids = torch.tensor(examples.tokens[part].astype("int64"))[None]
        labels = torch.where(torch.tensor(examples.answers[part].astype(bool)), ids, -100)
        with torch.no_grad():
            count = float((labels != -100).sum())
            loss_sum += model(input_ids=ids, labels=labels).loss.item() * count
            num_targets += count
    validated = [event.val_loss for event in events_of(whole) if isinstance(event, Validated)]
    assert validated[-1] == pytest.approx(loss_sum / num_targets, rel=1e-5)


def test_tokens_are_counted_without_padding(whole: RunFile) -> None:
    (started,) = (event for event in events_of(whole) if isinstance(event, TrainingStarted))
    assert 3.0 * CONTEXT < started.tokens_per_step < 4 * CONTEXT


def test_a_checkpoint_has_the_template(whole: RunFile) -> None:
    tokenizer = AutoTokenizer.from_pretrained(whole.checkpoints_dir / "step-00000004-a1")
    assert "<|im_start|>" in tokenizer.chat_template


def test_preferences_resume_against_the_model_that_they_began_with(chat_model: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_ranks": 1, "objective": "dpo", "learning_rate": 0.003}
    pairs = _tune(tmp_path / "whole", chat_model, **options)
    resumed = _tune(tmp_path / "resumed", chat_model, pairs.checkpoints_dir / "step-00000002-a1", **options)
    trained = [[event for event in events_of(run) if isinstance(event, StepTrained)] for run in (pairs, resumed)]
    losses = [[event.train_loss for event in steps] for steps in trained]
    assert losses[0][0] == pytest.approx(0.6931, abs=1e-4)  # log 2: the model is its own reference
    assert losses[1] == losses[0][2:]
