"""Embeddings of texts: the mean of the last hidden states over a text's tokens.

Shapes: B inputs, T tokens of the longest one, D the model's width. Inputs are read a few at a time between the steps of
texts that are generated, so that nobody waits long for them.
"""

import base64
import logging
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from apt_jobs.errors import AptJobsError, InvalidCheckpoint, InvalidInput, Unavailable
from apt_jobs.generation.adapter_bank import adapting_rows
from apt_jobs.generation.models import LoadedModel
from apt_jobs.generation.request import Generated, Request

logger = logging.getLogger(__name__)

MAX_VALUES = 1 << 21  # of all embeddings of a request: 11 MB as base64, in one row of the database
_CPU_TOKENS, _GPU_TOKENS = 1_024, 16_384  # read in a step, padding included


@dataclass(slots=True, eq=False)
class _Wanted:
    """A request whose inputs are read."""

    request: Request
    prompts: list[list[int]]
    adapter_slot: int
    outputs: list[str] = field(default_factory=list)


class Embedder:
    """The embeddings of one model. All calls come from the model's thread."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._wanted: deque[_Wanted] = deque()
        self._max_tokens = _CPU_TOKENS if model.device.type == "cpu" else _GPU_TOKENS

    @property
    def has_work(self) -> bool:
        """Whether inputs wait."""
        return bool(self._wanted)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InvalidInput: an input is too long, has a token that is none of the model's, or there are too many.
        """
        inputs = request.spec.embed or []
        width = self._model.model.get_input_embeddings().weight.shape[1]  # type: ignore[index]
        if len(inputs) * int(width) > MAX_VALUES:
            raise InvalidInput(
                f"{len(inputs):,} embeddings of {width:,} numbers are more than fit one answer; "
                f"send at most {MAX_VALUES // int(width):,} inputs at once"
            )
        model = self._model if request.adapter is None else request.adapter.model
        prompts = [_prompt(model, index, one) for index, one in enumerate(inputs)]
        self._wanted.append(_Wanted(request, prompts, 0 if request.adapter is None else request.adapter.slot))

    def step(self) -> None:
        """Read the next inputs of the oldest request; the last ones answer it."""
        wanted = self._wanted[0]
        if wanted.request.is_over:  # it was stopped
            self._wanted.popleft()
            return
        prompts = self._next(wanted)
        try:
            with adapting_rows([wanted.adapter_slot] * len(prompts), self._model.device):
                wanted.outputs += _embed(self._model, prompts)
        except torch.OutOfMemoryError as exc:
            if len(prompts) > 1:
                self._max_tokens = max(self._max_tokens // 2, 1)
                return
            self._fail(Unavailable(f"no memory for an input of {len(prompts[0]):,} tokens: {exc}"))
        except AptJobsError as exc:
            self._fail(exc)
        except Exception as exc:  # a model's forward raises whatever comes to it
            logger.exception("embeddings broke", extra={"model": self._model.folder.name})
            self._fail(InvalidCheckpoint(f"model {self._model.folder.name!r} cannot embed: {exc!r}"))
        if len(wanted.outputs) == len(wanted.prompts):
            self._wanted.popleft()
            wanted.request.succeed(_generated(wanted))

    def fail_all(self, error: AptJobsError) -> None:
        """Answer everybody with an error."""
        while self._wanted:
            self._fail(error)

    def _fail(self, error: AptJobsError) -> None:
        self._wanted.popleft().request.fail(error)

    def _next(self, wanted: _Wanted) -> list[list[int]]:
        """Return as many inputs as fit a step, at least one."""
        chosen: list[list[int]] = []
        longest = 0
        for prompt in wanted.prompts[len(wanted.outputs) :]:
            longest = max(longest, len(prompt))
            if chosen and longest * (len(chosen) + 1) > self._max_tokens:
                break
            chosen.append(prompt)
        return chosen


def _prompt(model: LoadedModel, index: int, one: str | list[int]) -> list[int]:
    tokens = model.encode(one) if isinstance(one, str) else one
    if len(tokens) > model.context_tokens:
        raise InvalidInput(
            f"input {index} has {len(tokens):,} tokens; the context of model {model.folder.name!r} has "
            f"{model.context_tokens:,}: shorten it"
        )
    if max(tokens) >= model.vocabulary_size:
        raise InvalidInput(
            f"input {index} has the token {max(tokens):,}; those of model {model.folder.name!r} end at "
            f"{model.vocabulary_size - 1:,}"
        )
    return tokens


@torch.inference_mode()
def _embed(model: LoadedModel, prompts: list[list[int]]) -> list[str]:
    """Return embeddings as base64 of little-endian float32.

    Raises:
        InvalidCheckpoint: they are not finite.
    """
    longest = max(map(len, prompts))
    tokens_BT = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=model.device)
    length_B = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    mask_BT = torch.arange(longest, device=model.device) < length_B[:, None]
    base: Any = model.model.base_model
    hidden_BTD: Tensor = base(input_ids=tokens_BT, attention_mask=mask_BT.long(), use_cache=False)[0].float()
    mean_BD = (hidden_BTD * mask_BT[..., None]).sum(1) / length_B[:, None]
    if not bool(mean_BD.isfinite().all()):
        raise InvalidCheckpoint(f"model {model.folder.name!r} computes numbers that are not finite")
    return [base64.b64encode(row.tobytes()).decode() for row in mean_BD.cpu().numpy().astype("<f4")]


def _generated(wanted: _Wanted) -> Generated:
    num_inputs = len(wanted.prompts)
    return Generated(
        outputs=wanted.outputs,
        num_prompt_tokens=[len(prompt) for prompt in wanted.prompts],
        num_tokens=[0] * num_inputs,
        finish_reasons=["stop"] * num_inputs,
        truncated=[False] * num_inputs,
    )
