"""A web process and a generation worker with tiny models, and the official client of OpenAI's dialect."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from pydantic import SecretStr
from transformers import AutoTokenizer

from apt_jobs.settings import Settings
from tests.integration.generation.served import Generating, generating
from tests.unit.generation.tiny_model import llama_config, save_model

TEMPLATE = (
    "{% for message in messages %}{{ '<|end|>' + message['role'] + ': ' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|end|>assistant: ' }}{% endif %}"
)


@pytest.fixture(scope="package")
def stack(
    tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path, valkey_server_url: str
) -> Iterator[Generating]:
    folder = tmp_path_factory.mktemp("openai")
    file = folder / "apt_jobs.sqlite3"
    file.write_bytes(sqlite_template.read_bytes())
    settings = Settings(
        data_dir=folder / "data",
        database_url=SecretStr(f"sqlite:///{file}"),
        redis_url=SecretStr(valkey_server_url.replace("db=0", "db=2")),  # the wake-ups of other tests are not ours
    )
    chat = save_model(settings.local_models_dir / "chatty", llama_config(max_position_embeddings=512))
    tokenizer = AutoTokenizer.from_pretrained(chat)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(chat)
    with generating(settings) as running, running.worker():
        yield running


@pytest.fixture
def client(stack: Generating) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{stack.client.base_url}/v1".replace("//v1", "/v1"), api_key=stack.served.key, max_retries=0
    ) as client:
        yield client
