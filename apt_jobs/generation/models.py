"""From a folder to a loaded model. The only reader of model files.

Weights are safetensors, code is only what is installed here, and nothing is fetched from a network.
"""

import hashlib
import inspect
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import logging as transformers_logging

from apt_jobs.artifacts.manifest import MANIFEST
from apt_jobs.artifacts.model_facts import why_not_whole
from apt_jobs.errors import AptJobsError, InvalidCheckpoint, NotFound, Unavailable
from apt_jobs.generation.constraints import Vocabulary
from apt_jobs.training.adapters import load_adapter, merge_adapter
from apt_jobs.training.weight_files import require_safetensors

MAX_MANIFEST_BYTES = 16 << 20
TOKENIZER = "tokenizer.json"
DEFAULT_CONTEXT_TOKENS = 2_048  # of models that do not say
_LOADED_FILES = ("*.json", "*.safetensors", "tokenizer.model", "*.txt", "*.jinja")
_NOT_LOADED = frozenset({MANIFEST, "optimizer.safetensors", "training_state.json"})

_CACHE_ARGUMENTS = ("past_key_values", "cache_params")

_LOADING = threading.Lock()  # transformers changes global state while it loads: two at once lack weights

Fingerprint = tuple[tuple[str, int, int], ...]  # name, bytes and modification time (ns) of each file that is loaded


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """How a model wants to be sampled where a request says nothing: its generation_config.json."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


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
    cache_argument: str | None  # the forward's name of its cache; none: it has one of its own kind
    joinable: bool  # rows of different age can share its cache
    vocabulary: Vocabulary
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)

    @classmethod
    def of(cls, folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> "LoadedModel":
        """Describe a model that is where it should run.

        Raises:
            InvalidCheckpoint: it is not one that continues texts.
        """
        arguments = frozenset(inspect.signature(model.forward).parameters)
        cache_argument = next((name for name in _CACHE_ARGUMENTS if name in arguments), None)
        if cache_argument is None and "use_cache" not in arguments:
            raise InvalidCheckpoint(
                f"models of type {model.config.model_type!r} cannot be served: they do not continue a text"
            )
        embeddings: Any = model.get_input_embeddings()
        num_embeddings = embeddings.weight.shape[0]
        end_tokens = frozenset(token for token in _end_tokens(model, tokenizer) if token < num_embeddings)
        num_logits: int = model.config.get_text_config(decoder=True).vocab_size
        kinds = (DynamicLayer, DynamicSlidingWindowLayer)
        return cls(
            folder=folder,
            model=model,
            tokenizer=tokenizer,
            context_tokens=_context_tokens(model, tokenizer),
            end_tokens=end_tokens,
            first_tokens=_first_tokens(tokenizer, end_tokens),
            forward_arguments=arguments,
            cache_argument=cache_argument,
            joinable=cache_argument == "past_key_values"
            and all(type(layer) in kinds for layer in DynamicCache(config=model.config).layers),
            vocabulary=Vocabulary(tokenizer, num_logits, end_tokens),
            defaults=_defaults(model),
        )

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def vocabulary_size(self) -> int:
        """Return the number of logits."""
        return self.vocabulary.size

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a prompt; at least one. The name of a special token in it is text like any other."""
        tokens: list[int] = self.tokenizer.encode(text, verbose=False, split_special_tokens=True)
        return tokens or list(self.first_tokens)


def fingerprint(folder: Path) -> Fingerprint:
    """Return what is in a model's folder now, without reading it: another one means that it has to be loaded again.

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


def load_model(folder: Path, device: torch.device, adapters: tuple[Path, ...] = ()) -> LoadedModel:
    """Read a model into memory, and add adapters to its weights: float32 on CPU, bfloat16 on a GPU.

    Raises:
        NotFound: the folder is gone.
        InvalidCheckpoint: something in it is missing, damaged or not supported; the message says what.
        Unavailable: the GPU has no room for it.
    """
    _require_files(folder)
    for each in (folder, *adapters):
        if (each / MANIFEST).is_file():
            _verify(each)
    with _loading(folder):
        return _load(folder, device, adapters)


def beside_adapters(base: LoadedModel, adapters: tuple[Path, ...]) -> LoadedModel:
    """Describe a model in memory as it is with adapters, whose matrices are elsewhere: the last one's tokenizer counts.

    Raises:
        NotFound: an adapter's folder is gone.
        InvalidCheckpoint: an adapter is damaged, or its tokenizer does not fit.
    """
    for each in adapters:
        if not each.is_dir():
            raise NotFound(f"model {each.name!r} was deleted")
        if (each / MANIFEST).is_file():
            _verify(each)
    with _loading(adapters[-1]):
        return _described(adapters[-1], base.model, _tokenizer_of(base.folder, adapters))


@contextmanager
def _loading(folder: Path) -> Iterator[None]:
    """Load one thing at a time, and name what is wrong with it."""
    _quiet_transformers()
    try:
        with _LOADING:
            yield
    except AptJobsError:
        raise
    except torch.OutOfMemoryError as exc:
        raise Unavailable(f"the GPU has no room for model {folder.name!r}: {exc}") from exc
    except Exception as exc:  # a foreign file makes the libraries raise whatever comes to them, bare Exception included
        if not folder.is_dir():
            raise NotFound(f"model {folder.name!r} was deleted") from exc
        raise InvalidCheckpoint(f"model {folder.name!r} cannot be loaded: {type(exc).__name__}: {exc}") from exc


def _tokenizer_of(folder: Path, adapters: tuple[Path, ...]) -> PreTrainedTokenizerBase:
    """Read the tokenizer of the last adapter that has one, else the model's."""
    own = [each for each in adapters if (each / TOKENIZER).is_file()]
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        own[-1] if own else folder, local_files_only=True, trust_remote_code=False
    )
    return tokenizer


def _described(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> LoadedModel:
    embeddings: Any = model.get_input_embeddings()
    num_embeddings = embeddings.weight.shape[0]
    if len(tokenizer) > num_embeddings:
        raise InvalidCheckpoint(
            f"model {folder.name!r} has {num_embeddings} embeddings for a tokenizer of {len(tokenizer)} tokens"
        )
    return LoadedModel.of(folder, model, tokenizer)


def _load(folder: Path, device: torch.device, adapters: tuple[Path, ...]) -> LoadedModel:
    tokenizer = _tokenizer_of(folder, adapters)
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
    for adapter in adapters:
        load_adapter(model, adapter)
        merge_adapter(model)
    return _described(folder, model.to(device).eval(), tokenizer)


def _defaults(model: PreTrainedModel) -> SamplingDefaults:
    """Read the model's generation config; what it does not say, or says out of range, is left as it is."""
    config = model.generation_config
    if config is None or not config.do_sample:
        penalty = getattr(config, "repetition_penalty", None)
        return SamplingDefaults(repetition_penalty=_within(penalty, 0.01, 10.0, 1.0))
    return SamplingDefaults(
        temperature=_within(config.temperature, 0.0, 10.0, 1.0),
        top_k=int(_within(config.top_k, 0, 1 << 20, 0)),
        top_p=_within(config.top_p, 1e-6, 1.0, 1.0),
        min_p=_within(config.min_p, 0.0, 1.0, 0.0),
        repetition_penalty=_within(config.repetition_penalty, 0.01, 10.0, 1.0),
    )


def _within(value: object, low: float, high: float, default: float) -> float:
    valid = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    return float(value) if valid else default  # type: ignore[arg-type]  # `valid` says that it is a number


def _context_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    seen = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if seen is None and tokenizer.model_max_length < 1 << 30:  # "unlimited" is 1e30
        seen = tokenizer.model_max_length
    return int(seen or DEFAULT_CONTEXT_TOKENS)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    seen = getattr(model.generation_config, "eos_token_id", None)
    if seen is None:
        seen = tokenizer.eos_token_id
    return frozenset([] if seen is None else [seen] if isinstance(seen, int) else seen)


def _first_tokens(tokenizer: PreTrainedTokenizerBase, end_tokens: frozenset[int]) -> tuple[int, ...]:
    """Return the token that starts a text; models that have none learned to start after the end of another one."""
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
    if (lacks := why_not_whole(folder)) is not None:
        raise InvalidCheckpoint(lacks)
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
