"""`/api/datasets/{name}/preview`: the first rows of a data set, with the tokens of a model if one is named."""

import asyncio
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from apt_jobs.artifacts.dataset_preview import SHOWN_TOKENS, preview, source_of
from apt_jobs.artifacts.dataset_rows import Source
from apt_jobs.artifacts.datasets import list_datasets
from apt_jobs.artifacts.models import model_dir
from apt_jobs.db.access import Role
from apt_jobs.errors import InvalidInput, NotFound
from apt_jobs.jobs.spec import BUILTIN_DATASET, Name
from apt_jobs.web.api.endpoint import endpoint
from apt_jobs.web.api.jobs import Query
from apt_jobs.web.service import service_of

TOKENIZER = "tokenizer.json"


class PreviewQuery(Query):
    rows: int = Field(5, ge=1, le=50, description="How many rows to return.")
    model: Name | None = Field(None, description="Id of `GET /api/models`: return its tokenizer's tokens, too.")


class PreviewPart(BaseModel):
    """A text of a row."""

    name: str = Field(description="Its field, or the role of its message.")
    text: str = Field(description="Its beginning.")
    is_cut: bool
    is_trained_on: bool = Field(description="false: the model reads it only, as a prompt.")
    tokens: list[str] | None = Field(description="Of what is shown, by the tokenizer of `model`; null: none is named.")


class PreviewRow(BaseModel):
    """A row of a data set, or what is wrong with it."""

    where: str = Field(description='As errors name it: "line 3". Empty for a text that is one document.')
    parts: list[PreviewPart]
    fault: str | None = Field(description="Why jobs would refuse it.")


class DatasetPreview(BaseModel):
    name: str
    kind: str | None = Field(description="text, conversation, completion or preference; null: token ids.")
    rows: list[PreviewRow]
    token_ids: list[int] = Field(description="The first ones of a file of tokens; else empty.")
    text: str | None = Field(description="What `token_ids` say by the tokenizer of `model`.")


@endpoint(role=Role.VIEWER, tag="datasets", query=PreviewQuery, answers={200: DatasetPreview}, problems={404})
async def preview_dataset(request: Request) -> Response:
    """Return the first rows of a data set: what a job would train on, and what is wrong with them."""
    service, query = service_of(request), request.state.query
    source = await asyncio.to_thread(_source, service.settings.datasets_dir, request.path_params["name"])
    folder = None
    if query.model is not None:
        folder = await service.read(model_dir, service.settings, query.model)
    answer = await asyncio.to_thread(_answer, source, query.rows, folder)
    return JSONResponse(answer.model_dump(mode="json"))


def _source(datasets_dir: Path, name: str) -> Source:
    if name == BUILTIN_DATASET:
        return Source(name, None)
    found = list_datasets(datasets_dir) if datasets_dir.is_dir() else iter(())
    for known, record in found:  # compared with what is there: no path is made from what came
        if known == name:
            return source_of(datasets_dir, known, record)
    raise NotFound(f"there is no data set {name[:100]!r}")


def _answer(source: Source, num_rows: int, model: Path | None) -> DatasetPreview:
    found = preview(source, num_rows)
    tokenizer = None if model is None else _load_tokenizer(model)
    rows = [
        PreviewRow(
            where=row.where,
            fault=row.fault,
            parts=[
                PreviewPart(
                    name=part.name,
                    text=part.text,
                    is_cut=part.is_cut,
                    is_trained_on=part.is_trained_on,
                    tokens=None if tokenizer is None else _tokens(tokenizer, part.text),
                )
                for part in row.parts
            ],
        )
        for row in found.rows
    ]
    text = tokenizer.decode(found.token_ids, skip_special_tokens=False) if tokenizer and found.token_ids else None
    return DatasetPreview(name=source.name, kind=found.kind, rows=rows, token_ids=found.token_ids, text=text)


def _load_tokenizer(model: Path) -> Any:
    """Load the tokenizer of a model. `tokenizers` is light, and is where models are, if not everywhere.

    Raises:
        InvalidInput: it is not installed here, or the model has none.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as exc:
        raise InvalidInput("model: this service has no tokenizers: pip install 'apt-jobs[train]'") from exc
    try:
        return Tokenizer.from_file(str(model / TOKENIZER))
    except Exception as exc:  # of no type of its own
        raise InvalidInput(f"model: its {TOKENIZER} cannot be read: {exc}") from exc


def _tokens(tokenizer: Any, text: str) -> list[str]:
    """Return the pieces of the text that its first tokens stand for."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    return [text[begin:end] for begin, end in encoding.offsets[:SHOWN_TOKENS]]
