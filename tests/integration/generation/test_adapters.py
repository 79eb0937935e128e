"""Checkpoints that are adapters: they generate with their base model, and are downloaded as they are or merged."""

import io
import shutil
import tarfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from pydantic import SecretStr
from transformers import AutoModelForCausalLM

from apt_jobs.db.engine import Database
from apt_jobs.db.events import append_events
from apt_jobs.db.jobs import claim, insert_job
from apt_jobs.events.kinds import CheckpointSaved
from apt_jobs.jobs.ids import new_checkpoint_id
from apt_jobs.jobs.lora_options import LoraOptions
from apt_jobs.jobs.spec import TrainSpec
from apt_jobs.settings import Settings
from apt_jobs.training.adapters import add_adapter, write_adapter
from apt_jobs.training.model import load_model
from tests.integration.generation.served import Generating, generating
from tests.unit.generation.tiny_model import tiny_tokenizer, write_manifest

PROMPT = "The queue is"


def adapter_of(base: Path, folder: Path, base_model: str) -> torch.nn.Module:
    """Write the checkpoint of an adapter that changes a lot; returns the model with it."""
    torch.manual_seed(7)
    model = load_model(base)
    add_adapter(model, LoraOptions(r=4), base_model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    folder.mkdir(parents=True)
    write_adapter(folder, model, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    tiny_tokenizer().save_pretrained(folder)
    (folder / "optimizer.safetensors").write_bytes(b"some state")
    write_manifest(folder)
    return model.eval()


class Adapters:
    """A service with a base model `tiny` and the adapter of a job."""

    def __init__(self, running: Generating) -> None:
        self.client, self.settings = running.client, running.settings
        self.base = self.settings.local_models_dir / "tiny"
        database = Database(self.settings.database)
        self.checkpoint_id = new_checkpoint_id()
        with database.write() as session:
            self.job_id = insert_job(session, TrainSpec(kind="train", base_model="tiny")).id
            claim(session, self.job_id, "test", 600.0)
            filename = f"{self.job_id}/step-00000001-a1"
            self.folder = self.settings.checkpoints_dir / filename
            self.model = adapter_of(self.base, self.folder, "tiny")
            saved = CheckpointSaved(self.checkpoint_id, filename, 1, 0, 1.0, 1.0, 10, is_best=True)
            append_events(session, self.job_id, 1, [(datetime.now(UTC), saved)], 600.0)
        database.dispose()

    def generate(self, model: str) -> httpx.Response:
        return self.client.post("/api/generate", json={"text": PROMPT, "model": model, "max_length": 12})

    def download(self, **query: str) -> httpx.Response:
        return self.client.get(f"/api/checkpoints/{self.checkpoint_id}/download", params=query)

    def expected(self) -> str:
        model: Any = self.model
        ids = torch.tensor([tiny_tokenizer().encode(PROMPT)])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        text = str(tiny_tokenizer().decode(output[0, ids.shape[1] :], skip_special_tokens=True))
        return text.rstrip("\N{REPLACEMENT CHARACTER}")  # half a character at the end is not shown


@pytest.fixture(scope="module")
def adapters(
    tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path, valkey_server_url: str
) -> Iterator[Adapters]:
    folder = tmp_path_factory.mktemp("adapters")
    file = folder / "apt_jobs.sqlite3"
    file.write_bytes(sqlite_template.read_bytes())
    settings = Settings(
        data_dir=folder / "data",
        database_url=SecretStr(f"sqlite:///{file}"),
        redis_url=SecretStr(valkey_server_url.replace("db=0", "db=1")),
    )
    with generating(settings) as running, running.worker():
        yield Adapters(running)


@pytest.mark.parametrize("by", ["job_id", "checkpoint_id"])
def test_an_adapter_generates_with_its_base_model(adapters: Adapters, by: str) -> None:
    answer = adapters.generate(getattr(adapters, by)).json()
    assert answer["generated_text"] == adapters.expected()
    assert answer["model"] == adapters.checkpoint_id
    assert adapters.generate("tiny").json()["generated_text"] != adapters.expected()


def test_a_download_is_the_adapter_as_peft_writes_it(adapters: Adapters) -> None:
    with tarfile.open(fileobj=io.BytesIO(adapters.download().content)) as tar:
        names = {Path(name).name for name in tar.getnames()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_a_merged_download_is_a_whole_model_in_the_type_asked(adapters: Adapters, tmp_path: Path, dtype: str) -> None:
    with tarfile.open(fileobj=io.BytesIO(adapters.download(merged="true", dtype=dtype).content)) as tar:
        tar.extractall(tmp_path, filter="data")
    folder = tmp_path / adapters.checkpoint_id
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any("adapter" in name or "optimizer" in name for name in names)
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert merged.dtype is getattr(torch, dtype)
    ids = torch.arange(1, 20)[None]
    expected, found = adapters.model(ids).logits, merged(ids).logits.float()
    assert (found - expected).norm() / expected.norm() < (1e-5 if dtype == "float32" else 0.03)
    assert list((adapters.settings.root / "merged").iterdir()) == []


def test_a_type_without_merging_is_refused(adapters: Adapters) -> None:
    answer = adapters.download(dtype="float16")
    assert answer.status_code == 422
    assert "merged=true" in answer.text


def test_a_base_model_that_was_moved_is_named_and_works_again_when_it_is_back(adapters: Adapters) -> None:
    elsewhere = adapters.base.with_name("elsewhere")
    shutil.move(adapters.base, elsewhere)
    try:
        refused = adapters.generate(adapters.job_id)
        assert refused.status_code == 422
        assert "its base model 'tiny' at its place: it was moved or deleted" in refused.text
        merged = adapters.download(merged="true")
        assert merged.status_code == 404
        assert "base model 'tiny', which was moved or deleted" in merged.text
        assert adapters.download().status_code == 200
    finally:
        shutil.move(elsewhere, adapters.base)
    assert adapters.generate(adapters.job_id).status_code == 200


def test_a_job_without_a_checkpoint_is_no_model(adapters: Adapters) -> None:
    job = adapters.client.post("/api/jobs", json={"kind": "train"}).json()
    assert adapters.generate(job["id"]).status_code == 422
