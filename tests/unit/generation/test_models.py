"""Finding and loading models: no name leads out of its folder, nothing damaged or pickled is loaded, no code is run."""

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from apt_jobs.artifacts.models import ModelFolders
from apt_jobs.db.engine import Database
from apt_jobs.db.events import append_events
from apt_jobs.db.jobs import claim_next, insert_job
from apt_jobs.db.service_values import DEFAULT_MODEL, set_value
from apt_jobs.errors import InvalidCheckpoint, InvalidInput, NotFound
from apt_jobs.events.kinds import CheckpointSaved
from apt_jobs.generation.catalog import choose_model, find_model
from apt_jobs.generation.models import load_model
from apt_jobs.jobs.ids import new_checkpoint_id
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.settings import Settings
from tests.unit.generation.tiny_model import write_manifest

CPU = torch.device("cpu")


@pytest.fixture
def settings(make_settings: Callable[..., Settings], sqlite_url: str) -> Settings:
    settings = make_settings(database_url=sqlite_url)
    settings.checkpoints_dir.mkdir(parents=True)
    settings.local_models_dir.mkdir()
    return settings


@pytest.fixture
def checkpoint_dir(tmp_path: Path, model_dir: Path) -> Path:
    folder = tmp_path / "step-00000001-a1"
    shutil.copytree(model_dir, folder)
    write_manifest(folder)
    return folder


def register(database: Database, filename: str) -> str:
    """A checkpoint row as a training job's event makes it."""
    checkpoint_id = new_checkpoint_id()
    with database.write() as session:
        job = insert_job(session, TrainSpec(kind="train"))
        assert claim_next(session, "train", "w", 60.0)
        saved = CheckpointSaved(
            step=1,
            epoch=0,
            checkpoint_id=checkpoint_id,
            filename=filename,
            size_bytes=1,
            val_loss=None,
            train_loss=None,
            is_best=True,
        )
        append_events(session, job.id, 1, [(datetime.now(UTC), saved)], 60.0)
    return checkpoint_id


def test_a_checkpoint_is_found_by_its_id(settings: Settings, sqlite_database: Database, checkpoint_dir: Path) -> None:
    folder = settings.checkpoints_dir / "job_x" / checkpoint_dir.name
    shutil.copytree(checkpoint_dir, folder)
    checkpoint_id = register(sqlite_database, f"job_x/{folder.name}")
    assert find_model(settings, sqlite_database, checkpoint_id) == ModelFolders(folder.resolve())
    shutil.rmtree(folder)
    with pytest.raises(InvalidCheckpoint, match="not complete on this host"):
        find_model(settings, sqlite_database, checkpoint_id)


def test_an_unknown_checkpoint_is_not_found(settings: Settings, sqlite_database: Database) -> None:
    with pytest.raises(NotFound):
        find_model(settings, sqlite_database, new_checkpoint_id())


@pytest.mark.parametrize("filename", ["../outside", "{absolute}", "job_x/../../outside", "link", ".", ""])
def test_a_checkpoint_row_never_leads_out_of_its_folder(
    settings: Settings, sqlite_database: Database, tmp_path: Path, checkpoint_dir: Path, filename: str
) -> None:
    outside = settings.root / "outside"
    shutil.copytree(checkpoint_dir, outside)
    (settings.checkpoints_dir / "link").symlink_to(outside)
    (settings.checkpoints_dir / "job_x").mkdir()
    write_manifest(settings.checkpoints_dir / "job_x")
    checkpoint_id = register(sqlite_database, filename.format(absolute=outside))
    with pytest.raises(InvalidCheckpoint):
        find_model(settings, sqlite_database, checkpoint_id)


def test_a_local_model_is_found_by_its_name(settings: Settings, sqlite_database: Database, model_dir: Path) -> None:
    folder = settings.local_models_dir / "tiny-Llama_1.0"
    shutil.copytree(model_dir, folder)
    assert find_model(settings, sqlite_database, folder.name) == ModelFolders(folder.resolve())


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "..",
        ".",
        "",
        "a/b",
        "outside",
        "link",
        "%2e%2e",
        "C:\\x",
        "a\x00b",
        ".hidden",
        "no config",
        "tiny\n",
    ],
)
def test_other_names_are_no_local_models(
    settings: Settings, sqlite_database: Database, model_dir: Path, name: str
) -> None:
    outside = settings.root / "outside"
    for folder in (outside, settings.local_models_dir / ".hidden", settings.local_models_dir / "a" / "b"):
        shutil.copytree(model_dir, folder)
    (settings.local_models_dir / "link").symlink_to(outside)
    (settings.local_models_dir / "tiny").mkdir()
    with pytest.raises(NotFound):
        find_model(settings, sqlite_database, name)


def test_the_default_is_the_chosen_model_then_the_newest_checkpoint_then_a_clear_refusal(
    sqlite_database: Database,
) -> None:
    with pytest.raises(InvalidInput, match="no model can generate yet: train one first"):
        choose_model(sqlite_database, None)
    register(sqlite_database, "a")
    newest = register(sqlite_database, "b")
    assert choose_model(sqlite_database, None) == newest
    with sqlite_database.write() as session:
        set_value(session, DEFAULT_MODEL, "my-model")
    assert choose_model(sqlite_database, None) == "my-model"
    assert choose_model(sqlite_database, "asked") == "asked"


def test_a_default_that_was_deleted_is_not_replaced_silently(sqlite_database: Database) -> None:
    register(sqlite_database, "a")
    with sqlite_database.write() as session:
        set_value(session, DEFAULT_MODEL, new_checkpoint_id())
    with pytest.raises(NotFound, match=r"the default model, .* was deleted; choose another one"):
        choose_model(sqlite_database, None)


def test_a_checkpoint_loads(checkpoint_dir: Path) -> None:
    model = load_model(checkpoint_dir, CPU)
    assert model.context_tokens == 64
    assert model.model.dtype == torch.float32
    assert not model.model.training


def flip_a_byte(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def shorten(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_byte, r"model\.safetensors has sha256"),
        (shorten, r"model\.safetensors has sha256"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"lacks tokenizer\.json"),
        (lambda folder: (folder / "generation_config.json").unlink(), r"generation_config\.json is gone"),
        (lambda folder: (folder / "added_tokens.json").write_text("{}"), "is not in its manifest"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text('{"files": []}'), "lists no files"),
        (lambda folder: (folder / "manifest.json").write_text("[" * 100_000), "manifest cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text('{"files": {"config.json": 3}}'), "not in its manifest"),
    ],
)
def test_a_damaged_checkpoint_is_refused(checkpoint_dir: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(checkpoint_dir)
    with pytest.raises(InvalidCheckpoint, match=message):
        load_model(checkpoint_dir, CPU)


def test_a_folder_that_is_gone_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="deleted"):
        load_model(tmp_path / "gone", CPU)


@pytest.fixture
def local_dir(tmp_path: Path, model_dir: Path) -> Path:
    folder = tmp_path / "local"
    shutil.copytree(model_dir, folder)
    return folder


def change_config(folder: Path, **fields: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_pickled_weights_are_refused_and_not_opened(local_dir: Path) -> None:
    (local_dir / "model.safetensors").unlink()
    trap = local_dir / "trapped"
    (local_dir / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(trap).encode() + b"'\ntR.")
    with pytest.raises(InvalidCheckpoint, match="pickled weights are not read"):
        load_model(local_dir, CPU)
    assert not trap.exists()


@pytest.mark.parametrize("model_type", ["llama", "unheard-of"])
def test_code_in_a_model_folder_is_not_run(local_dir: Path, model_type: str) -> None:
    trap = local_dir / "trapped"
    (local_dir / "evil.py").write_text(f"from pathlib import Path\nPath({str(trap)!r}).touch()\n")
    change_config(local_dir, model_type=model_type, auto_map={"AutoModelForCausalLM": "evil.M", "AutoConfig": "evil.C"})
    if model_type == "llama":
        load_model(local_dir, CPU)  # this type is known here: its code is used
    else:
        with pytest.raises(InvalidCheckpoint, match="cannot be loaded"):
            load_model(local_dir, CPU)
    assert not trap.exists()


def test_weights_that_are_not_there_are_named(local_dir: Path) -> None:
    weights = load_file(local_dir / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, local_dir / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidCheckpoint, match=r"lacks 1 weights .* first model\.norm\.weight"):
        load_model(local_dir, CPU)


def test_weights_of_another_size_are_refused(local_dir: Path) -> None:
    change_config(local_dir, intermediate_size=72)
    with pytest.raises(InvalidCheckpoint):
        load_model(local_dir, CPU)


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(local_dir: Path) -> None:
    tokenizer = json.loads((local_dir / "tokenizer.json").read_text())
    tokenizer["added_tokens"] += [
        {"id": 330 + number, "content": f"<{number}>", "special": False, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}
        for number in range(40)
    ]  # fmt: skip
    (local_dir / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InvalidCheckpoint, match="340 embeddings for a tokenizer of"):
        load_model(local_dir, CPU)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model_type": 3}', '{"model_type": "bert"}', "\x00"])
def test_a_senseless_config_is_refused(local_dir: Path, content: str) -> None:
    (local_dir / "config.json").write_text(content)
    with pytest.raises(InvalidCheckpoint):
        load_model(local_dir, CPU)
