"""The loss of a causal language model: the cross entropy of the next token, without a second copy of all logits.

Hugging Face's own loss holds all logits, in the type of the computation and again in float32: of 16 x 1,024 tokens and
a vocabulary of 50,304 those are 5 GB, and more in the backward pass. Here the head and the loss are one function of a
chunk of tokens, which can be compiled as one.
Shapes: B sequences, T tokens, N = B * T, D width of the model, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutputWithPast

from apt_jobs.training.sequences import IGNORED_LABEL

# Models whose logits are those of the output embedding and whose loss is the cross entropy, nothing more: no soft cap,
# no scale, no auxiliary loss. All others keep the loss of their own.
PLAIN_HEADS = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel"}
)
CHUNK_LOGITS = 1 << 27  # of one chunk: 0.5 GB in float32
COMPILED_CHUNK_LOGITS = 1 << 30  # a compiled chunk holds its logits once, in bfloat16: 2 GB
MAX_CHUNKS = 256
ChunkLoss = Callable[[Tensor, Tensor, Tensor | None, Tensor, float, float], Tensor]


@dataclass(frozen=True, slots=True)
class LossTerms:
    """What a training changes of the cross entropy; a validation is that alone.

    Label smoothing: a share of each target goes to all tokens alike (Szegedy et al. 2016, section 7). z_loss: this many
    times the squared log of the softmax's denominator, which keeps logits small (PaLM, Chowdhery et al. 2022, section
    5; 1e-4 there).
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    @property
    def is_any(self) -> bool:
        return bool(self.label_smoothing or self.z_loss)


NO_TERMS = LossTerms()


class ChunkedLoss:
    """Replaces the `forward` of one model: with `labels` it returns the loss alone, without them the logits."""

    def __init__(self, model: nn.Module, terms: LossTerms = NO_TERMS) -> None:
        self._terms = terms
        self._chunk_loss: ChunkLoss = _chunk_loss
        self._chunk_logits = CHUNK_LOGITS
        model.forward = MethodType(self._forward, model)

    def compile(self) -> None:
        """Compute head and loss by a compiled function from now on."""
        self._chunk_loss = torch.compile(_chunk_loss, dynamic=False)
        self._chunk_logits = COMPILED_CHUNK_LOGITS

    def uncompile(self) -> None:
        """Undo `compile`."""
        self._chunk_loss, self._chunk_logits = _chunk_loss, CHUNK_LOGITS

    def _forward(
        self,
        model: Any,
        input_ids: Tensor,
        labels: Tensor | None = None,
        logits_to_keep: Tensor | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        hidden_BTD: Tensor = model.base_model(input_ids=input_ids, **options)[0]
        head = model.get_output_embeddings()
        if labels is None:
            kept = hidden_BTD if logits_to_keep is None else hidden_BTD[:, logits_to_keep]
            return CausalLMOutputWithPast(logits=head(kept))
        # The token at t predicts the one at t + 1; the last one predicts nothing.
        targets_N = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL).reshape(-1)
        hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        size = len(targets_N) // self._num_chunks(len(targets_N), head.weight.shape[0])
        chunks = zip(torch.split(hidden_ND, size), torch.split(targets_N, size), strict=True)
        terms = self._terms if model.training else NO_TERMS
        sums = [
            self._chunk_loss(hidden, head.weight, head.bias, targets, terms.label_smoothing, terms.z_loss)
            for hidden, targets in chunks
        ]
        num_targets = (targets_N != IGNORED_LABEL).sum()
        loss = torch.stack(sums).sum() / num_targets
        return CausalLMOutputWithPast(loss=loss)

    def _num_chunks(self, num_tokens: int, vocab_size: int) -> int:
        """Return the least number of equal chunks that are small enough; one if there is none up to `MAX_CHUNKS`."""
        least = max(-(-num_tokens * vocab_size // self._chunk_logits), 1)
        fitting = (number for number in range(least, MAX_CHUNKS + 1) if num_tokens % number == 0)
        return next(fitting, 1)


def chunked_loss_of(model: nn.Module, terms: LossTerms = NO_TERMS) -> ChunkedLoss | None:
    """Give `model` the chunked loss if it computes the same; None: the model keeps its own, with `terms`."""
    if type(model).__name__ in PLAIN_HEADS:
        return ChunkedLoss(model, terms)
    if terms.is_any:
        plain: Any = model.loss_function

        def loss_function(logits: Tensor, labels: Tensor, vocab_size: int, **options: Any) -> Tensor:
            if not model.training:
                loss: Tensor = plain(logits=logits, labels=labels, vocab_size=vocab_size, **options)
                return loss
            targets_N = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL).reshape(-1).to(logits.device)
            total = _sum_of_losses(logits.reshape(-1, vocab_size), targets_N, terms.label_smoothing, terms.z_loss)
            return total / (targets_N != IGNORED_LABEL).sum()

        model.loss_function = loss_function  # type: ignore[assignment]  # what Hugging Face's forward calls
    return None


def _chunk_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    return _sum_of_losses(F.linear(hidden_ND, weight_VD, bias_V), targets_N, label_smoothing, z_loss)


def _sum_of_losses(logits_NV: Tensor, targets_N: Tensor, label_smoothing: float, z_loss: float) -> Tensor:
    """Sum of the losses in float32. Targets of `IGNORED_LABEL` count nothing."""
    logits_NV = logits_NV.float()
    total = F.cross_entropy(
        logits_NV, targets_N, ignore_index=IGNORED_LABEL, reduction="sum", label_smoothing=label_smoothing
    )
    if z_loss:
        total = total + z_loss * (logits_NV.logsumexp(-1).square() * (targets_N != IGNORED_LABEL)).sum()
    return total
