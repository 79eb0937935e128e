"""Bodies of the dialect, and the generation jobs that they ask for. What is not there is refused by its name."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from apt_jobs.jobs.sampling_options import MAX_NEW_TOKENS, MAX_SEQUENCES, MAX_TOP_LOGPROBS, Bias, Regex, TokenId
from apt_jobs.jobs.spec import ChatMessage, GenerateSpec, ModelName, Text

COMPLETION_TOKENS = 16  # OpenAI's default
_ABSENT: dict[str, tuple[object, ...]] = {  # parameter: the values that change nothing
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
}
_IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class NamedSchema(BaseModel):
    """A JSON schema and what it is called, which changes nothing."""

    model_config = ConfigDict(extra="forbid")
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """`response_format`."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError(f"type {self.type!r} and json_schema do not go together")
        return self

    def schema_of_text(self) -> dict[str, Any] | None:
        """Return the schema that the text has to match."""
        if self.json_schema is not None:
            return self.json_schema.schema_ or {}
        return {"type": "object"} if self.type == "json_object" else None


class DialectRequest(BaseModel):
    """What both kinds of completion take."""

    model_config = ConfigDict(extra="forbid")

    model: ModelName
    max_tokens: int | None = Field(None, ge=1, le=MAX_NEW_TOKENS)
    temperature: float | None = Field(None, ge=0.0, le=2.0)
    top_p: float | None = Field(None, ge=0.0, le=1.0)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0.0, le=1.0)
    presence_penalty: float | None = Field(None, ge=-2.0, le=2.0)
    frequency_penalty: float | None = Field(None, ge=-2.0, le=2.0)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10.0)
    logit_bias: dict[TokenId, Bias] | None = Field(None, max_length=300)
    n: int | None = Field(None, ge=1, le=MAX_SEQUENCES)
    response_format: ResponseFormat | None = None
    regex: Regex | None = None
    min_tokens: int | None = Field(None, ge=0, le=MAX_NEW_TOKENS)
    stop_token_ids: list[TokenId] | None = Field(None, max_length=64)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_changes_nothing(cls, values: Any) -> Any:
        """Drop parameters that ask for nothing; refuse by name those that ask for what is not there."""
        if not isinstance(values, dict):
            return values
        left = {name: value for name, value in values.items() if name not in _IGNORED}
        for name, neutral in _ABSENT.items():
            if name in left and name not in cls.model_fields:
                value = left.pop(name)
                if value is not None and value not in neutral:
                    raise ValueError(f"the parameter {name!r} is not supported; leave it out")
        return left

    @property
    def include_usage(self) -> bool:
        """Return whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def spec(self, texts: list[str], max_tokens: int, logprobs: int | None, **more: Any) -> GenerateSpec:
        """Return the job."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return GenerateSpec(
            kind="generate",
            texts=texts,
            model=None if self.model == "default" else self.model,
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p or (None if self.top_p is None else 1e-6),  # 0: the likeliest token
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self.logit_bias or {},
            n=self.n or 1,
            logprobs=logprobs,
            json_schema=None if self.response_format is None else self.response_format.schema_of_text(),
            regex=self.regex,
            min_tokens=self.min_tokens or 0,
            stop_token_ids=self.stop_token_ids or [],
            seed=None if self.seed is None else self.seed % 2**63,
            stop=[text for text in stop if text],
            stream=bool(self.stream),
            priority=10,
            **more,
        )


class CompletionRequest(DialectRequest):
    """`POST /v1/completions`."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_SEQUENCES)]
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    @field_validator("logprobs", mode="before")
    @classmethod
    def _no_logprobs(cls, value: object) -> object:
        return None if value is False else value

    def job(self) -> GenerateSpec:
        """Return the job."""
        texts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        return self.spec(texts, self.max_tokens or COMPLETION_TOKENS, self.logprobs)


class TextPart(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """A message of a chat. Other fields that OpenAI has are for tools, which are not there."""

    model_config = ConfigDict(extra="ignore")
    role: Annotated[str, StringConstraints(min_length=1, max_length=40)]
    content: Text | list[TextPart]

    def plain(self) -> ChatMessage:
        """Return it as a job has it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return ChatMessage(role="system" if self.role == "developer" else self.role, content=content)


class ChatRequest(DialectRequest):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=1_000)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_NEW_TOKENS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    @model_validator(mode="after")
    def _logprobs_first(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens differ; send one of them")
        return self

    def job(self) -> GenerateSpec:
        """Return the job: without a limit it ends where the model ends it, or its context."""
        messages = [message.plain() for message in self.messages]
        limit = self.max_completion_tokens or self.max_tokens or MAX_NEW_TOKENS
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self.spec([messages[-1].content], limit, logprobs, messages=messages)
