"""`/v1/embeddings`: the mean of a model's last hidden states, through the queue like every other generation."""

import base64
import struct
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from apt_jobs.db.access import Role
from apt_jobs.jobs.spec import MAX_TEXT_CHARS, GenerateSpec, ModelName
from apt_jobs.web.api.generation_requests import CLIENT_LEFT, ClientLeft, JobFailed
from apt_jobs.web.openai.endpoint import dialect
from apt_jobs.web.openai.generation_jobs import begin_job, job_of, refusal

MAX_INPUTS = 2_048

InputText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_TEXT_CHARS)]
InputTokens = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=MAX_TEXT_CHARS)]


class EmbeddingRequest(BaseModel):
    """`POST /v1/embeddings`."""

    model_config = ConfigDict(extra="forbid")

    model: ModelName
    input: (
        InputText
        | Annotated[list[InputText], Field(min_length=1, max_length=MAX_INPUTS)]
        | InputTokens
        | Annotated[list[InputTokens], Field(min_length=1, max_length=MAX_INPUTS)]
    ) = Field(description="A text, token ids, or a list of either.")
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: None = Field(None, description="Embeddings have the model's width.")
    user: Annotated[str, StringConstraints(max_length=1_000)] | None = Field(None, description="Ignored.")

    def job(self) -> GenerateSpec:
        """Return the job."""
        given: Any = self.input
        is_one = isinstance(given, str) or isinstance(given[0], int)
        return GenerateSpec(
            kind="generate",
            texts=[""],
            embed=[given] if is_one else given,
            model=None if self.model == "default" else self.model,
            priority=10,
        )


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str = Field(description="Numbers, or base64 of little-endian float32.")


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


@dialect(
    role=Role.SUBMITTER,
    body=EmbeddingRequest,
    answers={200: EmbeddingList},
    operation="create_embeddings",
    problems={404, 409, 504},
)
async def embed(request: Request) -> Response:
    """Return the mean of the model's last hidden states over the tokens of each input."""
    body: EmbeddingRequest = request.state.body
    generation = await begin_job(request, job_of(body), body.model)
    try:
        result = await generation.result(request)
    except ClientLeft:
        return Response(status_code=CLIENT_LEFT)
    except JobFailed as exc:
        raise refusal(exc) from exc
    finally:
        generation.close()
    return JSONResponse(embeddings_of(generation.job.id, body.model, result, body.encoding_format))


def embeddings_of(
    _job_id: str, model: str, result: dict[str, Any], encoding_format: str | None = None
) -> dict[str, Any]:
    """Return the answer that a job's result is; without a format numbers, as OpenAI does."""
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": encoded if encoding_format == "base64" else _numbers(encoded),
        }
        for index, encoded in enumerate(result["outputs"])
    ]
    usage = {name: result["usage"][name] for name in ("prompt_tokens", "total_tokens")}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def _numbers(encoded: str) -> list[float]:
    raw = base64.b64decode(encoded)
    return list(struct.unpack(f"<{len(raw) // 4}f", raw))
