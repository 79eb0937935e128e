"""From tokens back to text, token by token: characters that span several tokens come out whole, stop strings end it."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what a decoder makes of bytes that are not UTF-8
NUM_CONTEXT_TOKENS = 8  # of the prompt, so that the first word keeps the space before it


class TextStream:
    """The text that grows behind a prompt. `stop`: it ends before the first of these. `incremental`: `pop` is called.

    Tokens are decoded together with those before them, because a tokenizer may write a token differently at the start.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Sequence[int],
        stop: Sequence[str],
        *,
        incremental: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-NUM_CONTEXT_TOKENS:])
        self._stop = list(stop)
        self._context_start = 0  # tokens from here are decoded together ...
        self._text_start = len(self._tokens)  # ... and those from here are not in `_text` yet
        self._text = ""
        self._incremental = incremental
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
        self._append(text[len(known) :])
        self._context_start, self._text_start = self._text_start, len(self._tokens)

    def _append(self, more: str) -> None:
        longest = max(map(len, self._stop), default=0)
        search_from = max(0, len(self._text) - longest)
        self._text += more
        places = [place for stop in self._stop if (place := self._text.find(stop, search_from)) >= 0]
        if places:
            self._text = self._text[: min(places)]
            self.stopped = True

    def _decode(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text
