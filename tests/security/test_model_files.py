"""Model folders that somebody else made: pickles, headers that lie and code beside the weights. Nothing of it runs."""

import json
import pickle
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from apt_jobs.errors import InvalidCheckpoint
from apt_jobs.generation.models import load_model as load_for_generation
from apt_jobs.training.checkpoint import load_training_state
from apt_jobs.training.ddp import Rank
from apt_jobs.training.model import load_model as load_for_training
from tests.unit.generation.tiny_model import llama_config, save_model

CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"
Evil = Callable[[Path, Path], object]  # a model's folder, and a file whose appearance means that something ran


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._canary,)


def pickled(name: str) -> Evil:
    def plant(folder: Path, canary: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(pickle.dumps(Trap(canary)))

    return plant


def torch_archive(folder: Path, canary: Path) -> None:
    """A file as `torch.save` makes it, with a pickle of ours inside."""
    (folder / WEIGHTS).unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Trap(canary)))
        archive.writestr("archive/version", "3\n")


def pickled_as_safetensors(folder: Path, canary: Path) -> None:
    (folder / WEIGHTS).write_bytes(pickle.dumps(Trap(canary)))


def index_names(weights_file: str) -> Evil:
    """Weights in several files, one of which is somewhere or something else."""

    def plant(folder: Path, canary: Path) -> None:
        names = list(_header(folder / WEIGHTS))
        (folder / WEIGHTS).rename(folder.parent / "outside.safetensors")
        (folder / "evil.bin").write_bytes(pickle.dumps(Trap(canary)))
        (folder / "model-x.safetensors").write_bytes(pickle.dumps(Trap(canary)))
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, weights_file)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return plant


def header(change: Callable[[dict[str, Any]], object]) -> Evil:
    """Weights whose header lies."""

    def plant(folder: Path, _canary: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        told = json.loads(content[8 : 8 + length])
        change(told)
        encoded = json.dumps(told).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])

    return plant


def raw_weights(content: bytes) -> Evil:
    def plant(folder: Path, _canary: Path) -> None:
        (folder / WEIGHTS).write_bytes(content)

    return plant


def code_for(auto_map: dict[str, str], **fields: object) -> Evil:
    """Code of the model's own, for a kind of model that is not known here."""

    def plant(folder: Path, canary: Path) -> None:
        (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(canary)!r}).touch()\n")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "auto_map": auto_map, **fields}))

    return plant


def _header(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    told: dict[str, Any] = json.loads(content[8 : 8 + length])
    told.pop("__metadata__", None)
    return told


def _first(told: dict[str, Any]) -> dict[str, Any]:
    name = next(name for name in told if name != "__metadata__")
    entry: dict[str, Any] = told[name]
    return entry


def overlapping(told: dict[str, Any]) -> None:
    for entry in told.values():
        if "data_offsets" in entry:
            entry["data_offsets"] = _first(told)["data_offsets"]


EVIL: dict[str, Evil] = {
    "pickled weights": pickled("pytorch_model.bin"),
    "a pickle in .pt": pickled("model.pt"),
    "a pickle in .pth": pickled("consolidated.00.pth"),
    "a pickle in torch's archive": torch_archive,
    "a pickle named safetensors": pickled_as_safetensors,
    "an index of pickles": index_names("evil.bin"),
    "an index of a pickle with another name": index_names("model-x.safetensors"),
    "a header of 2^63 bytes": raw_weights(struct.pack("<Q", 1 << 63) + b"{}"),
    "a header that is longer than the file": raw_weights(struct.pack("<Q", 99_000_000) + b"{}"),
    "a header that nests": raw_weights(struct.pack("<Q", 400_000) + b'{"a":' + b"[" * 399_995),
    "offsets beyond the file": header(lambda told: _first(told).update(data_offsets=[0, 1 << 50])),
    "a shape of exabytes": header(lambda told: _first(told).update(shape=[1 << 40, 1 << 20])),
    "tensors on top of each other": header(overlapping),
    "a type that is none": header(lambda told: _first(told).update(dtype="__import__('os')")),
    "code for an unknown model": code_for(
        {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, model_type="evil"
    ),
    "code without a type": code_for({"AutoConfig": "evil.Config"}, model_type=None, architectures=["Evil"]),
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "good", llama_config())


@pytest.mark.parametrize("name", EVIL)
def test_an_evil_model_is_refused_and_nothing_runs(tmp_path: Path, model_dir: Path, name: str) -> None:
    folder, canary = tmp_path / "evil", tmp_path / "canary"
    shutil.copytree(model_dir, folder)
    EVIL[name](folder, canary)
    with pytest.raises(InvalidCheckpoint):
        load_for_generation(folder, CPU)
    with pytest.raises((InvalidCheckpoint, SafetensorError, RuntimeError, TypeError)):
        load_for_training(folder)
    assert not canary.exists()
    assert "evil" not in sys.modules


def test_the_good_model_is_taken(model_dir: Path) -> None:
    """So that the test above does not refuse for another reason."""
    load_for_generation(model_dir, CPU)
    load_for_training(model_dir)


@pytest.mark.parametrize("place", ["tokenizer", "adapter", "generation"])
def test_code_beside_a_good_model_does_not_run(tmp_path: Path, model_dir: Path, place: str) -> None:
    folder, canary = tmp_path / "evil", tmp_path / "canary"
    shutil.copytree(model_dir, folder)
    code = f"from pathlib import Path\nPath({str(canary)!r}).touch()\n"
    (folder / "evil.py").write_text(code)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(canary)))
    (folder / "training_args.bin").write_bytes(pickle.dumps(Trap(canary)))
    if place == "tokenizer":
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config |= {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Fast"]}, "chat_template": "{{ 1/0 }}"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    elif place == "adapter":
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "evil/evil"}))
    else:
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text(code)
    for load in (lambda: load_for_generation(folder, CPU), lambda: load_for_training(folder)):
        try:
            load()
        except (InvalidCheckpoint, ImportError):
            continue
    assert not canary.exists()
    assert "evil" not in sys.modules


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", struct.pack("<Q", 1 << 60), b"{}"])
def test_an_optimizer_state_that_is_no_safetensors_is_not_opened(tmp_path: Path, content: bytes) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "training_state.json").write_text('{"global_step": 1}')
    (tmp_path / "optimizer.safetensors").write_bytes(content or pickle.dumps(Trap(canary)))
    (tmp_path / "optimizer.pt").write_bytes(pickle.dumps(Trap(canary)))
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises((SafetensorError, InvalidCheckpoint)):
        load_training_state(tmp_path, model, [optimizer], Rank(0, 1, CPU, "gloo"))
    assert not canary.exists()
