"""What the next token of a sequence may be: a JSON schema, a regular expression, no end before so many tokens.

llguidance compiles a grammar and says before each token which ones go on with it; here that becomes a mask over logits.
The compilation is bounded in size and time, fetches nothing, and runs without Python's lock.
Shapes: V vocabulary, W words of 32 bits that hold it.
"""

import threading
from typing import Any

import llguidance.hf
import orjson
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from apt_jobs.errors import InvalidInput

MAX_ERROR_CHARS = 500
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"  # bounded: a model that likes blanks would not come to an end
_LIMITS = LLParserLimits(max_grammar_size=100_000, verbose_errors=False)


class Vocabulary:
    """The tokens of a model as bytes, and grammars over them. Thread-safe."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int, end_tokens: frozenset[int]) -> None:
        self.size = size
        self._tokenizer = tokenizer
        self._end_tokens = sorted(token for token in end_tokens if token < min(size, len(tokenizer)))
        self._lock = threading.Lock()
        self._compiled: LLTokenizer | None = None  # a second for a large vocabulary: not before it is needed

    def token_bytes(self, token: int) -> bytes:
        """Return what a token stands for; of a special token its name."""
        return self._by_bytes().decode_bytes([token])

    def matcher(self, json_schema: dict[str, Any] | None, regex: str | None) -> LLMatcher:
        """Compile a grammar.

        Raises:
            InvalidInput: it is wrong, too large, or nothing matches it; the message says what.
        """
        if json_schema is not None:
            field, schema = "json_schema", orjson.dumps(json_schema).decode()
            grammar = LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": _WHITESPACE})
        else:
            assert regex is not None
            field, grammar = "regex", LLMatcher.grammar_from_regex(regex)
        matcher = LLMatcher(self._by_bytes(), grammar, log_level=0, limits=_LIMITS)
        is_possible = not matcher.is_stopped() and bool(_allowed_by(matcher, self.size).any())
        if not is_possible or matcher.is_stopped():  # for what is in the grammar, or by its first tokens
            why = _error_of(matcher)
            if not why or why.startswith("NoExtension"):
                why = "no text of this model's tokens matches it"
            raise InvalidInput(f"{field} cannot be used: {why}")
        return matcher

    @property
    def grammar_end_tokens(self) -> frozenset[int]:
        """Return the tokens that a grammar ends with; also of a model that knows none."""
        return frozenset(self._by_bytes().eos_tokens)

    def _by_bytes(self) -> LLTokenizer:
        with self._lock:
            if self._compiled is None:
                try:
                    self._compiled = llguidance.hf.from_tokenizer(
                        self._tokenizer,  # type: ignore[arg-type]  # it says so itself if it is not a fast one
                        n_vocab=max(self.size, len(self._tokenizer)),
                        eos_token=self._end_tokens or None,
                    )
                except ValueError as exc:
                    raise InvalidInput(f"the tokenizer of this model serves no grammars or logprobs: {exc}") from exc
            return self._compiled


class Constraint:
    """What one sequence's tokens may be. It is told of each token, and asked before the next."""

    def __init__(
        self, vocabulary_size: int, matcher: LLMatcher | None = None, *, min_tokens: int = 0, never: frozenset[int]
    ) -> None:
        """Constrain a sequence.

        Args:
            vocabulary_size: of the logits.
            matcher: of the grammar, this sequence's own; none: any text.
            min_tokens: so many tokens come before any of `never`, unless the grammar has nothing else.
            never: the end tokens.
        """
        self._size, self._matcher, self._min_tokens = vocabulary_size, matcher, min_tokens
        self._never = sorted(token for token in never if token < vocabulary_size)
        self._num_tokens = 0
        self._allowed_W: Tensor | None = None  # of the next token; none: not computed yet

    @property
    def is_active(self) -> bool:
        """Say whether the next token is not free."""
        return self._matcher is not None or self._num_tokens < self._min_tokens

    @property
    def is_complete(self) -> bool:
        """Say whether nothing can follow any more."""
        return self._matcher is not None and self._matcher.is_stopped()

    def allowed(self) -> Tensor:
        """Return the tokens that may come next, a bit each, as int32 words (W,).

        Raises:
            InvalidInput: the grammar has become too complex, or no token goes on with it.
        """
        if self._allowed_W is None:
            self._allowed_W = self._computed()
        return self._allowed_W

    def accept(self, token: int) -> None:
        """Move on by a token.

        Raises:
            InvalidInput: the grammar does not allow it, or has become too complex.
        """
        self._num_tokens += 1
        self._allowed_W = None
        if self._matcher is not None and not self._matcher.consume_token(token):
            raise self._broken(_error_of(self._matcher))

    def _computed(self) -> Tensor:
        if self._matcher is None:
            allowed_W = torch.full((num_words(self._size),), -1, dtype=torch.int32)
        else:
            allowed_W = _allowed_by(self._matcher, self._size)
            if self._matcher.is_error() or not bool(allowed_W.any()):
                raise self._broken(_error_of(self._matcher))
        if self._num_tokens < self._min_tokens:
            longer_W = allowed_W.clone()
            for token in self._never:
                longer_W[token // 32] &= ~_bit(token)
            if bool(longer_W.any()):
                return longer_W
        return allowed_W

    @staticmethod
    def _broken(why: str) -> InvalidInput:
        return InvalidInput(f"json_schema or regex cannot be used: {why or 'no token continues the text'}")


def num_words(vocabulary_size: int) -> int:
    """Return how many words hold a bit for each token."""
    return (vocabulary_size + 31) // 32


def _error_of(matcher: LLMatcher) -> str:
    return matcher.get_error().removesuffix("<non-verbose/>").strip()[:MAX_ERROR_CHARS]


def _allowed_by(matcher: LLMatcher, vocabulary_size: int) -> Tensor:
    words_W = torch.zeros(num_words(vocabulary_size), dtype=torch.int32)
    matcher.unsafe_compute_mask_ptr(words_W.data_ptr(), words_W.numel() * 4)
    return words_W


def _bit(token: int) -> int:
    """Return the bit of a token in its word, as int32."""
    place = token % 32
    return -(1 << 31) if place == 31 else 1 << place
