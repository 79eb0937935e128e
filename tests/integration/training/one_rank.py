"""Trainings of one rank in this process, without torchrun: a second each, for what does not depend on ranks."""

import os
import socket
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file

from apt_jobs.events.kinds import Event
from apt_jobs.events.spool import SpoolReader, SpoolWriter
from apt_jobs.jobs.run_file import RunFile
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.training.loop import train
from tests.integration.run_files import run_file_in

OPTIONS: dict[str, Any] = {
    "max_steps": 4,
    "batch_size": 2,
    "learning_rate": 0.01,
    "warmup_steps": 1,
    "checkpoint_every_steps": 2,
    "validate_every_steps": 2,
    "validation_fraction": 0.1,
    "max_validation_batches": 2,
}
MODEL = {"d_model": 16, "num_layers": 1, "num_attention_heads": 2, "vocab_size": 300, "max_seq_len": 32}
TEXT = "A short text that is trained on, 一段很短的文字, over and over again.\n" * 60


def run_file_of(folder: Path, spec: dict[str, Any], options: dict[str, Any], **fields: Any) -> RunFile:
    """Write the text, and return a run file that trains on it."""
    folder.mkdir()
    (folder / "checkpoints").mkdir()
    (folder / "text.txt").write_text(TEXT)
    whole = {"kind": "train", "device": "cpu", "training": {**OPTIONS, **options}, **spec}
    spec_of_job = TrainSpec.model_validate(whole)
    run_file = run_file_in(folder, spec_of_job, dataset_file=folder / "text.txt", **fields)
    (folder / "run.json").write_text(run_file.model_dump_json())
    return run_file


def train_here(run_file: RunFile) -> list[Event]:
    """Train to the end in this process; returns the events of the spool."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    generators = torch.get_rng_state()
    with patch.dict(os.environ, {**place, "GLOO_SOCKET_IFNAME": "lo"}), SpoolWriter(run_file.spool_path(0)) as spool:
        train(run_file, spool)
    torch.set_rng_state(generators)
    return [event for _, event in SpoolReader(run_file.spool_path(0)).read()]


def require_same_checkpoints(first: Path, second: Path) -> None:
    """Compare the tensors of two checkpoints, bit by bit."""
    files = sorted(path.name for path in first.glob("*.safetensors"))
    assert files == sorted(path.name for path in second.glob("*.safetensors"))
    for name in files:
        expected, found = load_file(first / name), load_file(second / name)
        assert expected.keys() == found.keys(), name
        for key, tensor in expected.items():
            assert torch.equal(tensor, found[key]), (name, key)
