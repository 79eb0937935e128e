"""The built-in trainer under real torchrun, two gloo ranks: resume, stop, faults in the data, what a checkpoint is."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from apt_jobs.events.kinds import (
    CheckpointSaved,
    Event,
    GradientsRecorded,
    LineLogged,
    RankFailed,
    StepTrained,
    Validated,
)
from apt_jobs.events.spool import SpoolReader
from apt_jobs.jobs.run_file import RunFile
from apt_jobs.jobs.spec import TrainSpec
from tests.integration.run_files import run_file_in

MODEL = {"d_model": 16, "num_layers": 1, "num_attention_heads": 2, "vocab_size": 300, "max_seq_len": 32, "dropout": 0.1}
OPTIONS = {
    "max_steps": 8,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.01,
    "warmup_steps": 2,
    "checkpoint_every_steps": 4,
    "validation_fraction": 0.1,
}
TEXT = "A short text that is trained on, 一段很短的文字, over and over again.\n" * 200


def run_ranks(folder: Path, text: str = TEXT, resume_dir: Path | None = None, **options: Any) -> RunFile:
    """Train in `folder`; the run file tells where everything is."""
    folder.mkdir()
    (folder / "checkpoints").mkdir()
    (folder / "text.txt").write_text(text)
    spec = {"kind": "train", "num_ranks": 2, "device": "cpu", "model": MODEL, "training": {**OPTIONS, **options}}
    run_file = run_file_in(
        folder, TrainSpec.model_validate(spec), dataset_file=folder / "text.txt", resume_dir=resume_dir
    )
    (folder / "run.json").write_text(run_file.model_dump_json())
    return run_file


def launch(run_file: RunFile, num_ranks: int = 2, **variables: str) -> int:
    command = [
        *(
            sys.executable,
            "-m",
            "apt_jobs.training.launch_ranks",
            f"--nproc-per-node={num_ranks}",
            "--rdzv-backend=apt-jobs",
        ),
        *("--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", "-m", "apt_jobs.training.run"),
        *("--run-file", str(run_file.run_dir / "run.json")),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    environment |= variables
    return subprocess.run(command, env=environment, capture_output=True, timeout=200, check=False).returncode


def events_of(run_file: RunFile, rank: int = 0) -> list[Event]:
    return [event for _, event in SpoolReader(run_file.spool_path(rank)).read()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFile:
    """Eight steps without a break, checkpoints at 4 and 8."""
    run_file = run_ranks(tmp_path_factory.mktemp("training") / "whole")
    assert launch(run_file) == 0, events_of(run_file)
    return run_file


def test_the_loss_falls_and_every_step_is_told_once(whole: RunFile) -> None:
    steps = [event for event in events_of(whole) if isinstance(event, StepTrained)]
    assert [event.step for event in steps] == list(range(1, 9))
    assert steps[-1].train_loss < steps[0].train_loss
    assert whole.outcome_path.read_text() == "finished"


def test_no_step_before_a_checkpoint_seems_to_take_no_time(whole: RunFile) -> None:
    """The host reads such a step together with the one before."""
    times_ms = [event.step_time_ms for event in events_of(whole) if isinstance(event, StepTrained)]
    assert min(times_ms) > 0.02 * max(times_ms)  # it was a ten-thousandth


def test_a_checkpoint_is_a_hugging_face_model(whole: RunFile) -> None:
    folder = whole.checkpoints_dir / "step-00000008-a1"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("一段很短的文字 and 😀", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "一段很短的文字 and 😀"
    assert torch.isfinite(model(ids).logits).all()


def test_a_resumed_training_ends_bitwise_where_the_whole_one_did(whole: RunFile, tmp_path: Path) -> None:
    resumed = run_ranks(tmp_path / "resumed", resume_dir=whole.checkpoints_dir / "step-00000004-a1")
    assert launch(resumed) == 0, events_of(resumed)
    steps = [event.step for event in events_of(resumed) if isinstance(event, StepTrained)]
    assert steps == [5, 6, 7, 8]
    for name in ("model.safetensors", "optimizer.safetensors", "rng-0.safetensors", "rng-1.safetensors"):
        expected = load_file(whole.checkpoints_dir / "step-00000008-a1" / name)
        found = load_file(resumed.checkpoints_dir / "step-00000008-a1" / name)
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            assert torch.equal(tensor, found[key]), (name, key)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> RunFile:
    """The same eight steps with every parameter cut over the ranks."""
    run_file = run_ranks(tmp_path_factory.mktemp("training") / "sharded", sharding="fsdp2")
    assert launch(run_file) == 0, events_of(run_file)
    return run_file


def test_fsdp2_trains_as_ddp_does(whole: RunFile, sharded: RunFile) -> None:
    for kind in (StepTrained, Validated):
        losses = [[_loss(event) for event in events_of(run) if isinstance(event, kind)] for run in (whole, sharded)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    norms = [
        [norm for event in events_of(run) if isinstance(event, GradientsRecorded) for norm in event.norms]
        for run in (whole, sharded)
    ]
    assert len(norms[0]) > 8
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_an_fsdp2_checkpoint_is_a_whole_hugging_face_model(sharded: RunFile) -> None:
    folder = sharded.checkpoints_dir / "step-00000008-a1"
    model = AutoModelForCausalLM.from_pretrained(folder)
    saved = load_file(folder / "model.safetensors")
    assert set(saved) == {name for name, _ in model.named_parameters()}
    assert all(torch.equal(parameter, saved[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_an_fsdp2_checkpoint_is_resumed_by_either(sharded: RunFile, tmp_path: Path, sharding: str) -> None:
    source = sharded.checkpoints_dir / "step-00000004-a1"
    resumed = run_ranks(tmp_path / "resumed", resume_dir=source, sharding=sharding)
    assert launch(resumed) == 0, events_of(resumed)
    expected = load_file(sharded.checkpoints_dir / "step-00000008-a1" / "model.safetensors")
    found = load_file(resumed.checkpoints_dir / "step-00000008-a1" / "model.safetensors")
    for name, tensor in expected.items():
        if sharding == "fsdp2":
            assert torch.equal(tensor, found[name]), name
        else:
            torch.testing.assert_close(tensor, found[name], rtol=1e-3, atol=1e-4)


def _loss(event: Event) -> float:
    return event.train_loss if isinstance(event, StepTrained) else event.val_loss if isinstance(event, Validated) else 0


def test_a_stop_request_saves_and_ends(tmp_path: Path) -> None:
    run_file = run_ranks(tmp_path / "stopped", max_steps=1000, epochs=1000, checkpoint_every_steps=500)
    run_file.stop_path.touch()
    assert launch(run_file) == 0
    assert run_file.outcome_path.read_text() == "stopped"
    saved = [event for event in events_of(run_file) if isinstance(event, CheckpointSaved)]
    assert [event.step for event in saved] == [2]  # what the host reads of a step it reads one step later


@pytest.mark.parametrize("every_steps", [1, 2])
def test_a_stop_saves_and_does_not_validate(tmp_path: Path, every_steps: int) -> None:
    often: dict[str, Any] = {"checkpoint_every_steps": every_steps, "validate_every_steps": 1}
    run_file = run_ranks(tmp_path / "stopped", max_steps=1000, epochs=1000, validation_fraction=0.5, **often)
    run_file.stop_path.touch()
    assert launch(run_file) == 0
    assert run_file.outcome_path.read_text() == "stopped"
    events = events_of(run_file)
    last_step = max(event.step for event in events if isinstance(event, StepTrained))
    assert last_step == max(event.step for event in events if isinstance(event, CheckpointSaved))
    assert last_step not in [event.step for event in events if isinstance(event, Validated)]


def test_a_model_that_cannot_be_compiled_is_trained_without_and_the_log_says_so(whole: RunFile, tmp_path: Path) -> None:
    run_file = run_ranks(tmp_path / "uncompiled", compile="on")
    assert launch(run_file, CXX="/bin/false", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache")) == 0
    logged = [event for event in events_of(run_file) if isinstance(event, LineLogged)]
    warnings = [event.message for event in logged if event.level == "warning"]
    assert [message.startswith("training without torch.compile, which failed: ") for message in warnings] == [True]
    name = "step-00000008-a1/model.safetensors"
    expected, found = load_file(whole.checkpoints_dir / name), load_file(run_file.checkpoints_dir / name)
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())


def test_recomputed_activations_train_the_same_weights(whole: RunFile, tmp_path: Path) -> None:
    run_file = run_ranks(tmp_path / "recomputed", activation_checkpointing=True)
    assert launch(run_file) == 0, events_of(run_file)
    name = "step-00000008-a1/model.safetensors"
    expected, found = load_file(whole.checkpoints_dir / name), load_file(run_file.checkpoints_dir / name)
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())


def test_a_validation_can_be_limited(whole: RunFile, tmp_path: Path) -> None:
    run_file = run_ranks(tmp_path / "limited", max_validation_batches=1, max_steps=4)
    assert launch(run_file) == 0, events_of(run_file)
    limited, full = (
        next(event.val_loss for event in events_of(run) if isinstance(event, Validated)) for run in (run_file, whole)
    )
    assert limited != full
    assert limited == pytest.approx(full, rel=0.1)


def test_a_damaged_checkpoint_is_refused_by_name(whole: RunFile, tmp_path: Path) -> None:
    copy = tmp_path / "damaged"
    copy.mkdir()
    for path in (whole.checkpoints_dir / "step-00000004-a1").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    state = json.loads((copy / "training_state.json").read_text())
    (copy / "training_state.json").write_text(json.dumps({**state, "global_step": 5}))
    run_file = run_ranks(tmp_path / "refused", resume_dir=copy)
    assert launch(run_file) != 0
    failures = [event for event in events_of(run_file) if isinstance(event, RankFailed)]
    assert failures[0].error == "InvalidCheckpoint"
    assert "training_state.json" in failures[0].message


def test_a_text_that_is_too_short_says_how_much_is_needed(tmp_path: Path) -> None:
    run_file = run_ranks(tmp_path / "short", text="far too short")
    assert launch(run_file) != 0
    failures = [event for event in events_of(run_file) if isinstance(event, RankFailed)]
    assert failures[0].error == "InvalidDataset"
    assert "one step needs 8" in failures[0].message
