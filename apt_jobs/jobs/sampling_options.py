"""How a text is continued: the options of a generation job that are about its tokens. All sizes are bounded here."""

import json
from typing import Annotated, Any, Self

from pydantic import Field, StringConstraints, model_validator

from apt_jobs.jobs.strict_model import Strict

MAX_NEW_TOKENS = 4_096
MAX_SEQUENCES = 64  # texts of one generation job, draws included
MAX_TOP_LOGPROBS = 20  # likeliest tokens in place of one
MAX_LOGPROBS = 100_000  # numbers in the result of one generation job
MAX_SCHEMA_CHARS = 32_768
MAX_SCHEMA_DEPTH = 64

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Bias = Annotated[float, Field(ge=-100.0, le=100.0)]
Regex = Annotated[str, StringConstraints(min_length=1, max_length=4_096)]


class SamplingOptions(Strict):
    """How to continue a text. What is left out is as the model's generation_config.json says, else greedy."""

    max_length: int = Field(100, ge=1, le=MAX_NEW_TOKENS, description="Most tokens to add to each text.")
    max_tokens: int | None = Field(
        None, ge=1, le=MAX_NEW_TOKENS, description="The same by its usual name; goes before `max_length`."
    )
    temperature: float | None = Field(None, ge=0.0, le=10.0, description="0: greedy, the likeliest token each time.")
    top_k: int | None = Field(None, ge=0, le=1_000_000, description="Sample from so many likeliest tokens; 0: all.")
    top_p: float | None = Field(
        None, gt=0.0, le=1.0, description="Nucleus sampling: the smallest set of tokens with this mass."
    )
    min_p: float | None = Field(
        None, ge=0.0, le=1.0, description="Drop tokens less likely than this share of the likeliest one's probability."
    )
    repetition_penalty: float | None = Field(
        None, ge=0.01, le=10.0, description="Above 1: tokens of the text and of what was added are less likely."
    )
    logit_bias: dict[TokenId, Bias] = Field(
        default_factory=dict, max_length=300, description="Added to the logits of these tokens, given by their numbers."
    )
    presence_penalty: float = Field(0.0, ge=-2.0, le=2.0, description="Off the logits of tokens that were added.")
    frequency_penalty: float = Field(0.0, ge=-2.0, le=2.0, description="The same for each time they were added.")
    seed: int | None = Field(None, ge=0, le=2**63 - 1, description="Same request, same seed, same text.")
    stop: list[Annotated[str, StringConstraints(min_length=1, max_length=100)]] = Field(
        default_factory=list, max_length=8, description="Generation ends before the first of these."
    )
    stop_token_ids: list[TokenId] = Field(
        default_factory=list, max_length=64, description="Tokens that end the text, besides the model's own."
    )
    min_tokens: int = Field(0, ge=0, le=MAX_NEW_TOKENS, description="No end of any kind before so many tokens.")
    n: int = Field(1, ge=1, le=MAX_SEQUENCES, description="Draws of each text, each with numbers of its own.")
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_TOP_LOGPROBS,
        description="Log-probabilities of the tokens, and of so many likeliest ones in place of each.",
    )
    json_schema: dict[str, Any] | None = Field(
        None, description="The text is JSON of this schema; `{}` is any JSON. Bounded to 32 KiB."
    )
    regex: Regex | None = Field(
        None, description="All of the text matches this regular expression, without look-around."
    )
    truncate: bool = Field(
        False, description="Cut the beginning off a text that is longer than the model's context; else it is refused."
    )

    stream: bool = Field(False, description="Send what is added as it comes; it is stored in the end in any case.")

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.min_tokens > self.max_new_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is above the most tokens, {self.max_new_tokens}")
        if self.num_sequences > MAX_SEQUENCES:
            num_texts = self.num_sequences // self.n
            raise ValueError(f"{num_texts} texts with n={self.n} are {self.num_sequences}; at most {MAX_SEQUENCES}")
        numbers = self.num_sequences * self.max_new_tokens * (1 + (self.logprobs or 0))
        if self.logprobs is not None and numbers > MAX_LOGPROBS:
            raise ValueError(
                f"logprobs={self.logprobs} of {self.num_sequences} x {self.max_new_tokens} tokens are {numbers:,} "
                f"numbers; at most {MAX_LOGPROBS:,}: lower logprobs, max_tokens or n"
            )
        return self

    @model_validator(mode="after")
    def _one_grammar(self) -> Self:
        if self.json_schema is not None:
            if self.regex is not None:
                raise ValueError("json_schema and regex exclude each other; send one of them")
            _require_small_schema(self.json_schema)
        return self

    def changed_options(self) -> list[str]:
        """Return the names of the options here that are not as they are by default."""
        fields = SamplingOptions.model_fields.items()
        return [name for name, field in fields if getattr(self, name) != field.get_default(call_default_factory=True)]

    @property
    def num_sequences(self) -> int:
        """Return how many outputs the answer has."""
        return len(getattr(self, "texts", ("",))) * self.n

    @property
    def max_new_tokens(self) -> int:
        return self.max_length if self.max_tokens is None else self.max_tokens


def _require_small_schema(schema: dict[str, Any]) -> None:
    pending: list[tuple[Any, int]] = [(schema, 1)]
    while pending:
        value, depth = pending.pop()
        if depth > MAX_SCHEMA_DEPTH:
            raise ValueError(f"json_schema is nested deeper than {MAX_SCHEMA_DEPTH}")
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        pending += [(one, depth + 1) for one in inner]
    if (size := len(json.dumps(schema))) > MAX_SCHEMA_CHARS:
        raise ValueError(f"json_schema has {size:,} characters; at most {MAX_SCHEMA_CHARS:,}")
