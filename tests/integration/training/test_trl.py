"""Fine-tuning against TRL's own trainers: the same data, order, seed and options give the same losses, in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from apt_jobs.events.kinds import StepTrained
from apt_jobs.jobs.dataset_format import DatasetFormat
from apt_jobs.jobs.run_file import RunFile
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.training.data import _epoch_order
from tests.integration.run_files import run_file_in
from tests.integration.training.test_training import events_of, launch
from tests.integration.training.tiny_chat_model import (
    CONTEXT,
    completions,
    conversations,
    preferences,
    save_chat_model,
    write_jsonl,
)

pytestmark = pytest.mark.filterwarnings("default")  # of TRL and what it uses
NUM_STEPS, NUM_ROWS, SEED = 10, 48, 3
OPTIONS: dict[str, Any] = {
    "max_steps": NUM_STEPS,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.003,
    "schedule": "constant",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "validation_fraction": 0.0,
    "checkpoint_every_steps": 1_000,
    "precision": "fp32",
    "seed": SEED,
}


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("model") / "chat")


def _ours(folder: Path, model: Path, rows: list[dict[str, Any]], **options: Any) -> list[float]:
    folder.mkdir()
    (folder / "checkpoints").mkdir()
    spec = {
        "kind": "train",
        "device": "cpu",
        "dataset": "mine",
        "base_model": "chat",
        "model": {"max_seq_len": CONTEXT},
        "training": {**OPTIONS, **options},
        "data": {"packing": False},
    }
    run_file = run_file_in(
        folder,
        TrainSpec.model_validate(spec),
        dataset_file=write_jsonl(folder / "rows.jsonl", rows),
        dataset_format=DatasetFormat.JSONL,
        base_model_dir=model,
    )
    (folder / "run.json").write_text(run_file.model_dump_json())
    assert launch(run_file, num_ranks=1) == 0, events_of(run_file)
    return _losses(run_file)


def _losses(run_file: RunFile) -> list[float]:
    return [event.train_loss for event in events_of(run_file) if isinstance(event, StepTrained)]


def _in_our_order(rows: list[dict[str, Any]]) -> Dataset:
    return Dataset.from_list([rows[number] for number in _epoch_order(SEED, 0, len(rows)).tolist()])


def _arguments(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "trl"),
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.003,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "sequential",
        "activation_checkpointing": False,
        "max_length": CONTEXT,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "seed": SEED,
        "disable_tqdm": True,
    }


def _of_trl(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["messages", "completion"])
def test_fine_tuning_has_the_losses_of_trl(kind: str, chat_model: Path, tmp_path: Path) -> None:
    rows = conversations(NUM_ROWS) if kind == "messages" else completions(NUM_ROWS)
    ours = _ours(tmp_path / "ours", chat_model, rows)
    trainer = SFTTrainer(
        model=_model(chat_model),
        args=SFTConfig(**_arguments(tmp_path), assistant_only_loss=kind == "messages"),
        train_dataset=_in_our_order(rows),
        processing_class=AutoTokenizer.from_pretrained(chat_model),
    )
    theirs = _of_trl(trainer)
    assert len(ours) == NUM_STEPS
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert ours[-1] < ours[0] - 0.5


def test_preferences_have_the_losses_of_trl(chat_model: Path, tmp_path: Path) -> None:
    rows = preferences(NUM_ROWS)
    ours = _ours(tmp_path / "ours", chat_model, rows, objective="dpo", dpo_beta=0.2)
    trainer = DPOTrainer(
        model=_model(chat_model),
        ref_model=_model(chat_model),
        args=DPOConfig(**_arguments(tmp_path), beta=0.2),
        train_dataset=_in_our_order(rows),
        processing_class=AutoTokenizer.from_pretrained(chat_model),
    )
    theirs = _of_trl(trainer)
    assert len(ours) == NUM_STEPS
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert ours[-1] < ours[0] - 0.05
