"""One tiny model for all tests here, and one engine."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from apt_jobs.generation.engine import Engine
from tests.unit.generation.tiny_model import llama_config, save_model


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny", llama_config())


@pytest.fixture(scope="session")
def long_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a context that is not soon full. Read only."""
    return save_model(tmp_path_factory.mktemp("models") / "long", llama_config(max_position_embeddings=8_192))


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(warm_models=2, device="cpu")
    yield engine
    engine.close()
