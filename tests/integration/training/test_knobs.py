"""What a job may choose of its optimizer and schedule: all of it resumes bit by bit, on one rank and with shards."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from apt_jobs.events.kinds import (
    CheckpointSaved,
    LayersNamed,
    LineLogged,
    MetricsLogged,
    SamplesGenerated,
    StepTrained,
    TrainingStarted,
    Validated,
)
from apt_jobs.jobs.checkpoint_state import read_checkpoint_state
from apt_jobs.jobs.run_file import NamedSource, RunFile
from apt_jobs.training.checkpoint import TRAINED
from apt_jobs.training.loss import LossTerms, chunked_loss_of
from tests.integration.training.one_rank import MODEL, require_same_checkpoints, run_file_of, train_here
from tests.integration.training.test_training import events_of, launch

SPEC: dict[str, Any] = {"model": {**MODEL, "dropout": 0.1}}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw"},
    "adafactor": {"optimizer": "adafactor"},
    "lion": {"optimizer": "lion", "learning_rate": 1e-3},
    "muon": {"optimizer": "muon"},
    "average": {"ema_decay": 0.9},
    "average_of_some": {"ema_decay": 0.9, "freeze": ["*.mlp.*"], "optimizer": "lion"},
    "bf16": {"precision": "bf16-true"},
    "groups": {
        "parameter_groups": [
            {"pattern": "model.embed_tokens.*", "learning_rate_factor": 0.1},
            {"pattern": "*norm*", "weight_decay": 0.01},
        ],
        "freeze": ["*.mlp.*"],
    },
}
SCHEDULES = ("cosine", "linear", "constant", "wsd", "inverse_sqrt")
LAST = "step-00000004-a1"


def require_bitwise_resume(folder: Path, options: dict[str, Any]) -> list[float]:
    """Train four steps, and again from the checkpoint of the second; returns the learning rates."""
    whole = run_file_of(folder / "whole", SPEC, options)
    rates = [event.learning_rate for event in train_here(whole) if isinstance(event, StepTrained)]
    resumed = run_file_of(folder / "resumed", SPEC, options, resume_dir=whole.checkpoints_dir / "step-00000002-a1")
    again = [event.learning_rate for event in train_here(resumed) if isinstance(event, StepTrained)]
    assert again == rates[2:]
    require_same_checkpoints(whole.checkpoints_dir / LAST, resumed.checkpoints_dir / LAST)
    return rates


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_way_to_step_resumes_bitwise(tmp_path: Path, name: str) -> None:
    require_bitwise_resume(tmp_path, OPTIMIZERS[name])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_resumes_bitwise(tmp_path: Path, schedule: str) -> None:
    rates = require_bitwise_resume(tmp_path, {"schedule": schedule, "warmup_steps": 1})
    assert rates[0] == 0.01


def test_muon_trains_shards_as_it_trains_whole_weights(tmp_path: Path) -> None:
    """It is no sum over elements, and knows blocks by their class, which is another one when they are sharded."""
    options = {"optimizer": "muon", "learning_rate": 1e-3, "max_steps": 2}
    runs = []
    for sharding in ("ddp", "fsdp2"):
        run_file = run_file_of(tmp_path / sharding, {**SPEC, "num_ranks": 2}, {**options, "sharding": sharding})
        assert launch(run_file) == 0, events_of(run_file)
        runs.append(load_file(run_file.checkpoints_dir / "step-00000002-a1" / "model.safetensors"))
    for key, tensor in runs[0].items():
        assert (tensor - runs[1][key]).norm() < 0.02 * tensor.norm(), key


@pytest.mark.parametrize("sharding", ["alone", "fsdp2"])
def test_the_model_of_a_checkpoint_is_the_average_of_what_is_trained(tmp_path: Path, sharding: str) -> None:
    """It is resumed bit by bit, and training is what it would be without."""
    num_ranks = 1 if sharding == "alone" else 2
    every_step: dict[str, Any] = {"checkpoint_every_steps": 1, "keep_checkpoints": 10, "validate_every_steps": 1}
    options = {**every_step, "sharding": sharding if num_ranks > 1 else "ddp"}

    def run(name: str, **fields: Any) -> RunFile:
        spec = {**SPEC, "num_ranks": num_ranks}
        run_file = run_file_of(tmp_path / name, spec, {**options, **fields.pop("options", {})}, **fields)
        if num_ranks == 1:
            train_here(run_file)
        else:
            assert launch(run_file) == 0, events_of(run_file)
        return run_file

    whole = run("whole", options={"ema_decay": 0.4})
    folders = [whole.checkpoints_dir / f"step-{step:08d}-a1" for step in range(1, 5)]
    average = load_file(folders[0] / "model.safetensors")
    for step, folder in enumerate(folders[1:], start=2):
        trained, found = load_file(folder / TRAINED), load_file(folder / "model.safetensors")
        decay = min(0.4, (1 + step) / (10 + step))
        average = {name: decay * average[name] + (1 - decay) * trained[name] for name in average}
        for name, tensor in average.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
            assert not found[name].equal(trained[name])
    resumed = run("resumed", options={"ema_decay": 0.4}, resume_dir=folders[1])
    require_same_checkpoints(folders[3], resumed.checkpoints_dir / folders[3].name)
    if num_ranks == 1:
        plain = run("plain")
        found = load_file(plain.checkpoints_dir / folders[3].name / "model.safetensors")
        assert all(tensor.equal(found[name]) for name, tensor in load_file(folders[3] / TRAINED).items())
        losses = [
            [event.val_loss for event in events_of(run_file) if isinstance(event, Validated)]
            for run_file in (plain, whole)
        ]
        assert all(ours != averaged for ours, averaged in zip(*losses, strict=True))


def test_pure_bf16_trains_and_saves_bfloat16(tmp_path: Path) -> None:
    run_file = run_file_of(tmp_path / "run", SPEC, {"precision": "bf16-true", "max_steps": 8})
    losses = [event.train_loss for event in train_here(run_file) if isinstance(event, StepTrained)]
    assert losses[-1] < losses[0]
    folder = run_file.checkpoints_dir / "step-00000008-a1"
    for name in ("model.safetensors", "optimizer.safetensors"):
        kinds = {tensor.dtype for tensor in load_file(folder / name).values() if tensor.dim()}
        assert kinds == {torch.bfloat16}, name


def test_frozen_parameters_stay_and_are_not_watched(tmp_path: Path) -> None:
    run_file = run_file_of(tmp_path / "frozen", SPEC, {"freeze": ["model.layers.*"], "max_steps": 4})
    events = train_here(run_file)
    started = next(event for event in events if isinstance(event, TrainingStarted))
    assert started.num_trainable_parameters is not None
    assert 0 < started.num_trainable_parameters < started.num_parameters
    named = next(event for event in events if isinstance(event, LayersNamed))
    assert not any(name.startswith("model.layers.") for name in named.names)
    first, last = (
        load_file(run_file.checkpoints_dir / f"step-0000000{step}-a1" / "model.safetensors") for step in (2, 4)
    )
    moved = {name.startswith("model.layers.") for name in first if not first[name].equal(last[name])}
    assert moved == {False}


@pytest.mark.parametrize("kind", ["llama", "gemma2"])  # one whose loss is computed in chunks, one that has its own
def test_terms_of_the_loss_are_those_of_their_papers_in_training_alone(kind: str) -> None:
    torch.manual_seed(1)
    auto: Any = AutoModelForCausalLM
    small = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = AutoConfig.for_model(kind, **small, num_attention_heads=2, num_key_value_heads=2, head_dim=8)
    model = auto.from_config(config, attn_implementation="eager").eval()
    ids = torch.randint(0, 60, (2, 12))
    labels = ids.clone()
    labels[0, :6] = -100
    logits = model(input_ids=ids).logits[:, :-1].double()
    targets, counted = labels[:, 1:], labels[:, 1:] != -100
    log_z = logits.logsumexp(-1)
    of_target = logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    smoothed = 0.9 * (log_z - of_target) + 0.1 * (log_z - logits.mean(-1))
    expected = (smoothed + 0.01 * log_z.square())[counted].mean().float()
    plain = (log_z - of_target)[counted].mean().float()
    chunked_loss_of(model, LossTerms(label_smoothing=0.1, z_loss=0.01))
    torch.testing.assert_close(model.train()(input_ids=ids, labels=labels).loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.eval()(input_ids=ids, labels=labels).loss, plain, rtol=1e-5, atol=1e-5)


def test_a_training_without_progress_ends_early_and_finishes(tmp_path: Path) -> None:
    options = {
        "max_steps": 20,
        "validate_every_steps": 1,
        "checkpoint_every_steps": 10,
        "early_stopping_patience": 3,
        "learning_rate": 10.0,  # it diverges
        "grad_clip_norm": None,
    }
    spec = {**SPEC, "model": {**MODEL, "dropout": 0.0}}
    run_file = run_file_of(tmp_path / "run", spec, options)
    events = train_here(run_file)
    losses = [event.val_loss for event in events if isinstance(event, Validated)]
    best = losses.index(min(losses))
    assert len(losses) == best + 4 < 20
    assert run_file.outcome_path.read_text() == "finished"
    saved = [event.step for event in events if isinstance(event, CheckpointSaved)]
    assert saved[-1] == len(losses)
    assert any(isinstance(event, LineLogged) and "ended early: 3 validations" in event.message for event in events)
    state = read_checkpoint_state(run_file.checkpoints_dir / f"step-{saved[-1]:08d}-a1")
    assert (state.lowest_val_loss, state.num_worse) == (min(losses), 3)


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path: Path) -> None:
    worse_from_then_on = {"learning_rate": 3.0, "grad_clip_norm": None, "warmup_steps": 5, "keep_checkpoints": 1}
    often = {"checkpoint_every_steps": 1, "validate_every_steps": 1, "max_steps": 5}
    spec = {**SPEC, "model": {**MODEL, "dropout": 0.0}}
    run_file = run_file_of(tmp_path / "run", spec, {**worse_from_then_on, **often})
    saved = [event for event in train_here(run_file) if isinstance(event, CheckpointSaved)]
    best = min(saved, key=lambda event: event.val_loss or 0.0)
    assert best.step < 5
    kept = {folder.name for folder in run_file.checkpoints_dir.iterdir()}
    assert kept == {f"step-{step:08d}-a1" for step in (best.step, 5)}


def test_a_mixture_resumes_bitwise_and_is_evaluated_by_name(tmp_path: Path) -> None:
    def run(name: str, resume_dir: Path | None = None) -> RunFile:
        mixed = {
            "datasets": [{"name": "text"}, {"name": "second", "weight": 2.0}],
            "validation_datasets": {"held": "h"},
        }
        run_file = run_file_of(tmp_path / name, {**SPEC, **mixed}, {}, resume_dir=resume_dir)
        for file in ("second", "h"):
            (tmp_path / file).write_text(f"another text, {file}, of other words\n" * 100)
        second, held = (NamedSource(name=file, file=tmp_path / file) for file in ("second", "h"))
        run_file = run_file.model_copy(update={"mixed_sources": [second], "evaluation_sources": {"held": held}})
        events = train_here(run_file)
        measured = [event for event in events if isinstance(event, MetricsLogged)]
        assert [event.step for event in measured] == ([2, 4] if resume_dir is None else [4])
        losses = [event.val_loss for event in events if isinstance(event, Validated)]
        for event, val_loss in zip(measured, losses, strict=True):
            assert event.values["validation/perplexity"] == pytest.approx(math.exp(val_loss))
            assert event.values["eval/held/perplexity"] == pytest.approx(math.exp(event.values["eval/held/loss"]))
            assert 0 < event.values["eval/held/bits_per_byte"] < event.values["eval/held/loss"] / math.log(2)
            assert event.values["eval/held/loss"] != val_loss
        return run_file

    whole = run("whole")
    resumed = run("resumed", whole.checkpoints_dir / "step-00000002-a1")
    require_same_checkpoints(whole.checkpoints_dir / LAST, resumed.checkpoints_dir / LAST)


@pytest.mark.parametrize("sharding", ["alone", "fsdp2"])
def test_samples_are_what_the_checkpoint_generates_and_change_no_weight(tmp_path: Path, sharding: str) -> None:
    prompts = ["A short text", "一段很短的", "x" * 500]  # the last one is longer than the context
    asked: dict[str, Any] = {"sample_prompts": prompts, "sample_tokens": 6, "max_steps": 4}
    num_ranks = 1 if sharding == "alone" else 2
    spec = {**SPEC, "num_ranks": num_ranks}
    if num_ranks > 1:
        asked["sharding"] = sharding
    run_file = run_file_of(tmp_path / "run", spec, asked)
    if num_ranks == 1:
        train_here(run_file)
    else:
        assert launch(run_file) == 0, events_of(run_file)
    events = [event for event in events_of(run_file) if isinstance(event, SamplesGenerated)]
    assert [event.step for event in events] == [2, 4]
    assert events[0].prompts == tuple(prompts)
    folder = run_file.checkpoints_dir / LAST
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model.eval()
    for prompt, text in zip(prompts, events[1].texts, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids[:, -26:]
        expected = model.generate(ids, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids))
        assert text == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    if num_ranks == 1:
        plain = run_file_of(tmp_path / "plain", spec, {"max_steps": 4})
        train_here(plain)
        require_same_checkpoints(folder, plain.checkpoints_dir / LAST)


def test_samples_are_drawn_by_the_seed(tmp_path: Path) -> None:
    asked = {"sample_prompts": ["A short"], "sample_temperature": 1.5, "max_steps": 2, "batch_size": 1}
    drawn = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        events = train_here(run_file_of(tmp_path / name, SPEC, {**asked, "seed": seed, "learning_rate": 1e-9}))
        drawn += [event.texts for event in events if isinstance(event, SamplesGenerated)]
    assert drawn[0] == drawn[1] != drawn[2]
