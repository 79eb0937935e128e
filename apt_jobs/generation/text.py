"""From tokens back to text, token by token: characters that span several tokens come out whole, stop strings end it."""

import bisect
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what a decoder makes of bytes that are not UTF-8
NUM_CONTEXT_TOKENS = 8  # of the prompt, so that the first word keeps the space before it


class TextStream:
    """The text that grows behind a prompt.

    Tokens are decoded together with those before them, because a tokenizer may write a token differently at the start.

    Args:
        tokenizer: of the model.
        prompt: tokens before the text.
        stop: the text ends before the first of these.
        min_tokens: what begins in the first so many tokens is no stop string.
        incremental: `pop`, or `num_shown`, is called.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Sequence[int],
        stop: Sequence[str],
        *,
        min_tokens: int = 0,
        incremental: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-NUM_CONTEXT_TOKENS:])
        self._stop = list(stop)
        self._context_start = 0  # tokens from here are decoded together ...
        self._text_start = len(self._tokens)  # ... and those from here are not in `_text` yet
        self._text = ""
        self._incremental = incremental
        self._num_before = len(self._tokens)  # tokens that are not the text's
        self._min_tokens = min_tokens
        self._stop_from = 0  # characters that no stop string begins in
        self._starts: list[int] = []  # where in the text each token begins that is in `_text`
        self._num_popped = 0  # characters
        self._is_finished = False
        self.stopped = False  # a stop string was found

    def push(self, token: int) -> None:
        """Add one token and look for the stop strings."""
        self._tokens.append(token)
        if (self._stop or self._incremental) and not self.stopped:
            self._take(flush=False)

    def pop(self) -> str:
        """Return what was added since the last time. What may be the beginning of a stop string waits for the rest."""
        end = len(self._text)
        if not (self.stopped or self._is_finished):
            end -= self._num_held_back()
        popped = self._text[self._num_popped : end]
        self._num_popped = max(self._num_popped, end)
        return popped

    def num_shown(self) -> int:
        """Return how many tokens are in what was popped; all if the text was finished by no stop string."""
        if self._is_finished and not self.stopped:
            return len(self._tokens) - self._num_before
        return bisect.bisect_left(self._starts, self._num_popped)

    def finish(self) -> str:
        """Return the whole text. An incomplete character at its end is left out."""
        if not (self.stopped or self._is_finished):
            self._take(flush=True)
        self._is_finished = True
        return self._text

    def _num_held_back(self) -> int:
        """Return the characters at the end that begin a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for length in range(min(longest, len(self._text)), 0, -1):
            end = self._text[-length:]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0

    def _take(self, *, flush: bool) -> None:
        """Move what is readable from tokens to text."""
        known = self._decode(self._tokens[self._context_start : self._text_start])
        text = self._decode(self._tokens[self._context_start :])
        if flush:
            text = text.rstrip(REPLACEMENT)
        elif text.endswith(REPLACEMENT):
            return  # the rest of the character is in the next token
        self._starts += [len(self._text)] * (len(self._tokens) - self._text_start)
        self._append(text[len(known) :])
        self._context_start, self._text_start = self._text_start, len(self._tokens)

    def _append(self, more: str) -> None:
        longest = max(map(len, self._stop), default=0)
        search_from = max(self._stop_from, len(self._text) - longest)
        self._text += more
        if len(self._tokens) - self._num_before <= self._min_tokens:
            self._stop_from = len(self._text)
            return
        places = [place for stop in self._stop if (place := self._text.find(stop, search_from)) >= 0]
        if places:
            self._text = self._text[: min(places)]
            self.stopped = True

    def _decode(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text
