"""Texts that a model generates from `sample_prompts` at each checkpoint, short, without a cache of keys and values.

Every token is a whole forward pass over rows of the training's own shape, so that nothing new is compiled and a
sharded model gathers its weights as it always does. No random number of the training is used.
Shapes: R rows, T tokens of a row, V vocabulary.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from apt_jobs.artifacts.conversations import RowKind
from apt_jobs.jobs.training_options import TrainingOptions
from apt_jobs.training.ddp import Rank
from apt_jobs.training.ema import WeightAverage
from apt_jobs.training.reporter import Reporter

MAX_SHOWN_CHARS = 4_000  # of a text


class Samples:
    """Generates for one training. Of a sharded model `generate` is a collective: all ranks do the same."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerFast,
        options: TrainingOptions,
        context: int,
        kind: RowKind,
        rank: Rank,
        reporter: Reporter,
        autocast: Callable[[], AbstractContextManager[None]],
        average: WeightAverage | None,
    ) -> None:
        """Prepare the prompts. `context`: tokens of a row; `kind`: of the rows that are trained on."""
        self._model, self._tokenizer, self._options, self._context = model, tokenizer, options, context
        self._rank, self._reporter, self._autocast, self._average = rank, reporter, autocast, average
        self._is_sharded = options.sharding == "fsdp2"
        self._num_new = min(options.sample_tokens, context // 2)
        is_chat = kind in (RowKind.CONVERSATION, RowKind.PREFERENCE) and tokenizer.chat_template is not None
        self._prompts = [self._ids_of(prompt, is_chat=is_chat) for prompt in options.sample_prompts]

    @torch.no_grad()
    def generate(self, step: int) -> None:
        """Continue all prompts and report the texts. Sync point: the host reads each token."""
        if not self._prompts or not (self._is_sharded or self._rank.is_first):
            return
        generator = torch.Generator().manual_seed((self._options.seed + step) % 2**63)
        size, found = self._options.batch_size, list[list[int]]()
        was_training = self._model.training
        nn.Module.train(self._model, False)
        with nullcontext() if self._average is None else self._average.applied():
            for first in range(0, len(self._prompts), size):
                found += self._continue(self._prompts[first : first + size], generator)
        nn.Module.train(self._model, was_training)
        texts = [str(self._tokenizer.decode(ids, skip_special_tokens=True))[:MAX_SHOWN_CHARS] for ids in found]
        self._reporter.sampled(step, self._options.sample_prompts, texts)

    def _continue(self, prompts: list[list[int]], generator: torch.Generator) -> list[list[int]]:
        """Return the new tokens of each prompt, without EOS. At most `batch_size` prompts."""
        ids_RT = torch.zeros((self._options.batch_size, self._context), dtype=torch.int64)
        lengths = [len(prompt) for prompt in prompts]
        for row, prompt in enumerate(prompts):
            ids_RT[row, : len(prompt)] = torch.tensor(prompt)
        new: list[list[int]] = [[] for _ in prompts]
        ended = [False] * len(prompts)
        for _ in range(self._num_new):
            logits_RV = self._logits(ids_RT, [length - 1 for length in lengths])
            for row, token in enumerate(self._choose(logits_RV, generator)):
                ended[row] = ended[row] or token == self._tokenizer.eos_token_id
                if not ended[row]:
                    new[row].append(token)
                    ids_RT[row, lengths[row]] = token
                    lengths[row] += 1
            if all(ended) and not self._is_sharded:  # ranks that differ in a last bit must not part here
                break
        return new

    def _logits(self, ids_RT: Tensor, places: list[int]) -> Tensor:
        """Return the logits at one place of each of the first rows, on the host in float32."""
        kept = torch.tensor(sorted(set(places)))
        where = torch.searchsorted(kept, torch.tensor(places))
        device = self._rank.device
        with self._autocast():
            output = self._model(input_ids=ids_RT.to(device), use_cache=False, logits_to_keep=kept.to(device))
        rows = torch.arange(len(places), device=device)
        found: Tensor = output.logits[rows, where.to(device)]
        return found.float().cpu()

    def _choose(self, logits_RV: Tensor, generator: torch.Generator) -> list[int]:
        if self._options.sample_temperature == 0.0 or not logits_RV.isfinite().all():  # a broken model has no choice
            tokens: list[int] = logits_RV.argmax(-1).tolist()
            return tokens
        shares_RV = (logits_RV / self._options.sample_temperature).softmax(-1)
        drawn: list[int] = torch.multinomial(shares_RV, 1, generator=generator)[:, 0].tolist()
        return drawn

    def _ids_of(self, prompt: str, *, is_chat: bool) -> list[int]:
        """Return the prompt's tokens, the last ones that leave room for an answer."""
        if is_chat:
            messages = [{"role": "user", "content": prompt}]
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = self._tokenizer(str(text), add_special_tokens=False)["input_ids"]
        else:
            ids = self._tokenizer(prompt)["input_ids"]
        return list(ids)[-(self._context - self._num_new) :]
