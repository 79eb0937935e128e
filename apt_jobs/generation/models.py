"""Models that can generate: from an id to a folder, from a folder to a loaded model. The only reader of model files.

Ids come from requests and file names from training processes: neither is trusted with a path. Weights are safetensors,
code is only what is installed here, and nothing is fetched from a network.
"""

import hashlib
import inspect
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import logging as transformers_logging

from apt_jobs.artifacts.paths import inside
from apt_jobs.db.checkpoints import get_checkpoint, newest_checkpoint
from apt_jobs.db.engine import Database
from apt_jobs.db.service_values import DEFAULT_MODEL, get_value
from apt_jobs.errors import AptJobsError, InvalidCheckpoint, InvalidInput, NotFound, Unavailable
from apt_jobs.jobs.spec import CHECKPOINT_ID_PATTERN
from apt_jobs.settings import Settings
from apt_jobs.training.weight_files import require_safetensors

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 16 << 20
DEFAULT_CONTEXT_TOKENS = 2_048  # of models that do not say
LOCAL_NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_NEEDED_FILES = ("config.json", "tokenizer.json")
_LOADED_FILES = ("*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja")
_NOT_LOADED = frozenset({MANIFEST, "optimizer.safetensors", "training_state.json"})

Fingerprint = tuple[tuple[str, int, int], ...]  # name, bytes and modification time (ns) of each file that is loaded


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A causal language model in memory, and what the engine has to know of it."""

    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    context_tokens: int  # most tokens that it can attend to
    end_tokens: frozenset[int]
    first_tokens: tuple[int, ...]  # what an empty prompt starts from
    forward_arguments: frozenset[str]
    joinable: bool  # rows of different age can share its cache

    @property
    def device(self) -> torch.device:
        return self.model.device

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt; at least one."""
        tokens: list[int] = self.tokenizer.encode(text, verbose=False)
        return tokens or list(self.first_tokens)


def choose_model(database: Database, asked: str | None) -> str:
    """The id of the model to use: the one asked for, else the service's default, else the newest checkpoint.

    Raises:
        InvalidInput: there is none.
        NotFound: the default was deleted. Which model takes its place is for a person to say.
    """
    if asked is not None:
        return asked
    with database.read() as session:
        default = get_value(session, DEFAULT_MODEL)
        if default is None:
            newest = newest_checkpoint(session)
            if newest is None:
                raise InvalidInput("no model can generate yet: train one first, or name a local model")
            return newest.id
        if CHECKPOINT_ID_PATTERN.match(default):
            try:
                get_checkpoint(session, default)
            except NotFound as exc:
                raise NotFound(
                    f"the default model, checkpoint {default}, was deleted; choose another one "
                    "(POST /api/checkpoints/load), or name a model in the request"
                ) from exc
    return default


def find_model(settings: Settings, database: Database, model_id: str) -> Path:
    """The folder of a checkpoint id or of a local model's name.

    Raises:
        NotFound: there is no such model.
        InvalidCheckpoint: the checkpoint's folder is gone, incomplete or not where checkpoints are.
    """
    if CHECKPOINT_ID_PATTERN.match(model_id):
        with database.read() as session:
            filename = get_checkpoint(session, model_id).filename
        folder = inside(settings.checkpoints_dir, filename)
        if folder is None or not (folder / MANIFEST).is_file():
            raise InvalidCheckpoint(f"checkpoint {model_id} is registered, but its files are not complete on this host")
        return folder
    local = inside(settings.local_models_dir, model_id) if LOCAL_NAME_PATTERN.fullmatch(model_id) else None
    if local is None or not (local / "config.json").is_file():
        raise NotFound(f"no model {model_id!r}; GET /api/models lists what can generate")
    return local


def fingerprint(folder: Path) -> Fingerprint:
    """What is in a model's folder now, without reading it: another one means that it has to be loaded again.

    Raises:
        NotFound: the folder is gone.
    """
    try:
        found = tuple((file.name, stat.st_size, stat.st_mtime_ns) for file in _loaded(folder) if (stat := file.stat()))
    except OSError as exc:
        raise NotFound(f"model {folder.name!r} was deleted") from exc
    if not found:
        raise NotFound(f"model {folder.name!r} was deleted")
    return found


def load_model(folder: Path, device: torch.device) -> LoadedModel:
    """Read a model into memory: float32 on CPU, bfloat16 on a GPU.

    Raises:
        NotFound: the folder is gone.
        InvalidCheckpoint: something in it is missing, damaged or not supported; the message says what.
        Unavailable: the GPU has no room for it.
    """
    _require_files(folder)
    if (folder / MANIFEST).is_file():
        _verify(folder)
    _quiet_transformers()
    try:
        return _load(folder, device)
    except AptJobsError:
        raise
    except torch.OutOfMemoryError as exc:
        raise Unavailable(f"the GPU has no room for model {folder.name!r}: {exc}") from exc
    except Exception as exc:  # a foreign file makes the libraries raise whatever comes to them, bare Exception included
        if not folder.is_dir():
            raise NotFound(f"model {folder.name!r} was deleted") from exc
        raise InvalidCheckpoint(f"model {folder.name!r} cannot be loaded: {type(exc).__name__}: {exc}") from exc


def _load(folder: Path, device: torch.device) -> LoadedModel:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    loaded: Any = AutoModelForCausalLM.from_pretrained(  # Any: typed without `output_loading_info`
        folder,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=torch.float32 if device.type == "cpu" else torch.bfloat16,
        output_loading_info=True,
    )
    model: Any = loaded[0]
    report: dict[str, Any] = loaded[1]
    if absent := sorted(report["missing_keys"]) or sorted(map(str, report["mismatched_keys"])):
        raise InvalidCheckpoint(
            f"model {folder.name!r} lacks {len(absent)} weights that its config.json asks for, first {absent[0]}"
        )
    num_embeddings = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > num_embeddings:
        raise InvalidCheckpoint(
            f"model {folder.name!r} has {num_embeddings} embeddings for a tokenizer of {len(tokenizer)} tokens"
        )
    arguments = frozenset(inspect.signature(model.forward).parameters)
    if not {"past_key_values", "attention_mask"} <= arguments:
        raise InvalidCheckpoint(f"models of type {model.config.model_type!r} cannot be served: they keep no cache")
    end_tokens = frozenset(token for token in _end_tokens(model, tokenizer) if token < num_embeddings)
    return LoadedModel(
        folder=folder,
        model=model.to(device).eval(),
        tokenizer=tokenizer,
        context_tokens=_context_tokens(model, tokenizer),
        end_tokens=end_tokens,
        first_tokens=_first_tokens(tokenizer, end_tokens),
        forward_arguments=arguments,
        joinable=all(
            type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
            for layer in DynamicCache(config=model.config).layers
        ),
    )


def _context_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    said = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if said is None and tokenizer.model_max_length < 1 << 30:  # "unlimited" is 1e30
        said = tokenizer.model_max_length
    return int(said or DEFAULT_CONTEXT_TOKENS)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    said = getattr(model.generation_config, "eos_token_id", None)
    if said is None:
        said = tokenizer.eos_token_id
    return frozenset([] if said is None else [said] if isinstance(said, int) else said)


def _first_tokens(tokenizer: PreTrainedTokenizerBase, end_tokens: frozenset[int]) -> tuple[int, ...]:
    """The token that starts a text; models that have none learned to start after the end of another one."""
    if tokenizer.bos_token_id is not None:
        return (tokenizer.bos_token_id,)
    if end_tokens:
        return (min(end_tokens),)
    return tuple(tokenizer.encode("\n", verbose=False)) or (0,)


def _loaded(folder: Path) -> list[Path]:
    files = {file for pattern in _LOADED_FILES for file in folder.glob(pattern) if file.name not in _NOT_LOADED}
    return sorted(files)


def _require_files(folder: Path) -> None:
    if not folder.is_dir():
        raise NotFound(f"model {folder.name!r} was deleted")
    lacking = [name for name in _NEEDED_FILES if not (folder / name).is_file()]
    if not any(folder.glob("model*.safetensors")):
        lacking.append("model.safetensors")
    if lacking:
        raise InvalidCheckpoint(
            f"model {folder.name!r} lacks {', '.join(lacking)}; a model folder holds config.json, tokenizer.json and "
            "weights as safetensors (pickled weights are not read)"
        )
    require_safetensors(folder)


def _verify(folder: Path) -> None:
    """Compare every file that will be loaded with the manifest's size and SHA-256."""
    listed = _read_manifest(folder)
    for file in _loaded(folder):
        entry = listed.pop(file.name, None)
        if not isinstance(entry, dict):
            raise InvalidCheckpoint(f"checkpoint {folder.name!r} is damaged: {file.name} is not in its manifest")
        actual = _sha256(file)
        if actual != entry.get("sha256"):
            raise InvalidCheckpoint(
                f"checkpoint {folder.name!r} is damaged: {file.name} has sha256 {actual[:12]}..., "
                f"the manifest says {str(entry.get('sha256'))[:12]}...; choose another checkpoint"
            )
    if gone := [name for name in sorted(listed) if not (folder / name).is_file()]:
        raise InvalidCheckpoint(f"checkpoint {folder.name!r} is damaged: {', '.join(gone)} is gone")


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    try:
        if file.stat().st_size > MAX_MANIFEST_BYTES:
            raise InvalidCheckpoint(
                f"checkpoint {folder.name!r} is damaged: its manifest has {file.stat().st_size} bytes"
            )
        manifest = json.loads(file.read_bytes())
        listed = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as exc:
        raise InvalidCheckpoint(f"checkpoint {folder.name!r} is damaged: its manifest cannot be read: {exc}") from exc
    if not isinstance(listed, dict):
        raise InvalidCheckpoint(f"checkpoint {folder.name!r} is damaged: its manifest lists no files")
    return dict(listed)


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _quiet_transformers() -> None:
    """No progress bars and advice on stderr: what goes wrong is in the errors raised here."""
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # the library's
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # the library's
