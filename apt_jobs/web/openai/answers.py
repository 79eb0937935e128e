"""Answers of the dialect, as `/openapi.json` describes them; names and meanings are OpenAI's."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from apt_jobs.web.api.generation import FinishReason


class OpenAIModel(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Seconds since 1970; 0: not known.")
    owned_by: str = Field(description="The training job, or `local`.")


class OpenAIModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[OpenAIModel]


class PromptTokensDetails(BaseModel):
    cached_tokens: int = Field(description="Known from another text that began with them.")


class CompletionUsage(BaseModel):
    prompt_tokens: int = Field(description="Each prompt once, however many choices it has.")
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: FinishReason


class CompletionAnswer(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: CompletionUsage


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: dict[str, Any] | None
    finish_reason: FinishReason


class ChatAnswer(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: CompletionUsage
