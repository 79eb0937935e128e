"""Which files may hold weights."""

import json
from pathlib import Path

import pytest

from apt_jobs.errors import InvalidCheckpoint
from apt_jobs.training.weight_files import INDEX, require_safetensors


def index(folder: Path, *names: object) -> None:
    (folder / INDEX).write_text(
        json.dumps({"weight_map": {f"layer {number}": name for number, name in enumerate(names)}})
    )


def test_one_file_or_all_files_of_the_index_are_enough(tmp_path: Path) -> None:
    (tmp_path / "model-1.safetensors").touch()
    index(tmp_path, "model-1.safetensors")
    require_safetensors(tmp_path)
    (tmp_path / INDEX).unlink()
    (tmp_path / "model.safetensors").touch()
    require_safetensors(tmp_path)


@pytest.mark.parametrize("name", ["model-2.safetensors", "evil.bin", "../model.safetensors", "/x.safetensors", ""])
def test_another_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "model-1.safetensors").touch()
    (tmp_path / "evil.bin").touch()
    index(tmp_path, "model-1.safetensors", name)
    with pytest.raises(InvalidCheckpoint, match="no safetensors file in its folder"):
        require_safetensors(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": []}}', "[" * 100_000])
def test_a_senseless_index_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(InvalidCheckpoint, match="cannot be read"):
        require_safetensors(tmp_path)


def test_no_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match=r"lacks model\.safetensors"):
        require_safetensors(tmp_path)
