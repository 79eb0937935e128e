"""The models that an engine holds: deleted, replaced, damaged, more than fit; requests for others go on."""

import shutil
from pathlib import Path

import pytest
import torch

from apt_jobs.errors import InvalidCheckpoint, NotFound, Unavailable
from apt_jobs.generation import engine as engine_module
from apt_jobs.generation.engine import Engine
from apt_jobs.generation.model_engine import ModelEngine
from apt_jobs.generation.models import LoadedModel, load_model
from apt_jobs.generation.request import Request
from apt_jobs.generation.runner import Runner
from apt_jobs.generation.sequences import SamplingParams
from tests.unit.generation.requests import DEADLINE_S, finish_after, spec, wait_until
from tests.unit.generation.tiny_model import llama_config, save_model


def test_a_warm_model_that_is_deleted_ends_its_text_and_is_not_found_afterwards(
    tmp_path: Path, engine: Engine, long_model_dir: Path
) -> None:
    folder = tmp_path / "deleted"
    shutil.copytree(long_model_dir, folder)
    request = engine.submit(folder, spec("The", max_length=500))
    wait_until(lambda: bool(request.texts))
    shutil.rmtree(folder)
    assert finish_after(request).num_tokens == [500]
    with pytest.raises(NotFound):
        engine.submit(folder, spec("The"))


def test_a_model_that_is_replaced_on_disk_is_read_again(tmp_path: Path, engine: Engine, model_dir: Path) -> None:
    folder = tmp_path / "replaced"
    shutil.copytree(model_dir, folder)
    before = engine.generate(folder, spec("The")).outputs
    shutil.rmtree(folder)
    save_model(folder, llama_config(), seed=2)
    assert engine.generate(folder, spec("The")).outputs != before


def test_models_take_turns_when_there_are_more_than_fit(tmp_path: Path, model_dir: Path) -> None:
    folders = [save_model(tmp_path / f"model-{seed}", llama_config(), seed=seed) for seed in range(3)]
    expected = {}
    for folder in folders:
        lone = Engine(warm_models=1, device="cpu")
        expected[folder] = lone.generate(folder, spec("The", max_length=30)).outputs
        lone.close()
    engine = Engine(warm_models=2, device="cpu")
    requests = [(folder, engine.submit(folder, spec("The", max_length=30))) for _ in range(3) for folder in folders]
    for folder, request in requests:
        assert finish_after(request).outputs == expected[folder]
    engine.close()


def test_a_damaged_model_fails_its_requests_only(tmp_path: Path, engine: Engine, model_dir: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(model_dir, folder)
    (folder / "model.safetensors").write_bytes(b"nonsense")
    damaged, good = engine.submit(folder, spec("x")), engine.submit(model_dir, spec("x"))
    with pytest.raises(InvalidCheckpoint, match="cannot be loaded"):
        damaged.future.result(timeout=DEADLINE_S)
    assert finish_after(good).num_tokens == [20]


def test_what_is_asked_of_a_model_that_could_not_be_loaded_is_answered() -> None:
    def load() -> tuple[LoadedModel, Runner]:
        raise InvalidCheckpoint("damaged")

    model = ModelEngine("damaged", load)
    model.join()
    request = Request(spec("x"))
    model.add(request)
    with pytest.raises(InvalidCheckpoint):
        request.future.result(timeout=0)
    with pytest.raises(InvalidCheckpoint):
        model.submit([1], SamplingParams()).token_ids()


def test_a_model_without_room_gets_that_of_an_idle_one(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(warm_models=2, device="cpu")
    engine.generate(model_dir, spec("x"))
    idle = engine.model(model_dir)
    wait_until(lambda: idle.is_idle)
    other = save_model(tmp_path / "other", llama_config(), seed=2)

    def load_beside_nothing(folder: Path, device: torch.device, adapters: tuple[Path, ...]) -> LoadedModel:
        if idle.model is not None:
            raise Unavailable("the GPU has no room")
        return load_model(folder, device, adapters)

    monkeypatch.setattr(engine_module, "load_model", load_beside_nothing)
    assert finish_after(engine.submit(other, spec("x"))).num_tokens == [20]
    engine.close()
