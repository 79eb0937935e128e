"""`/api/models`: what can generate, what is known of it, and the names that people gave to it."""

import re
from typing import Literal

from pydantic import BaseModel, Field
from sqlalchemy.orm import Session
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from apt_jobs.artifacts.model_facts import ModelFacts, model_facts
from apt_jobs.artifacts.models import (
    EXTERNAL_PREFIX,
    list_local_models,
    local_model_dir,
    model_exists,
    model_folders,
    resolve_model,
)
from apt_jobs.db.access import Role
from apt_jobs.db.checkpoints import get_checkpoint, list_checkpoints, newest_checkpoint
from apt_jobs.db.jobs import get_job
from apt_jobs.db.model_aliases import list_aliases, remove_alias, set_alias
from apt_jobs.db.models import Checkpoint
from apt_jobs.db.service_values import DEFAULT_MODEL, get_value
from apt_jobs.db.workers import warm_models
from apt_jobs.errors import AptJobsError, Conflict, InvalidInput, NotFound
from apt_jobs.events.codec import timestamp
from apt_jobs.jobs.spec import CHECKPOINT_ID_PATTERN, ModelName
from apt_jobs.operations.liveness import alive_within_s
from apt_jobs.operations.submit import hold_model
from apt_jobs.settings import Settings
from apt_jobs.web.api.endpoint import endpoint
from apt_jobs.web.problems import ProblemError
from apt_jobs.web.service import Service, service_of

MAX_MODELS = 200
RESERVED = "default"  # what /v1 calls the default model

_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class ModelAnswer(BaseModel):
    id: str
    source: Literal["checkpoint", "local", "external"]
    name: str
    job_id: str | None
    step: int | None
    val_loss: float | None
    created_at: str | None
    is_default: bool
    aliases: list[str] = Field(description="Names that stand for it now.")
    can_generate: bool
    why_not: str | None = Field(description="Why it cannot generate.")
    is_warm: bool = Field(description="A living worker has it in memory.")
    is_chat: bool = Field(description="It has a template for chats.")
    context_tokens: int | None
    num_parameters: int | None
    size_bytes: int | None = Field(description="Of the weights on disk.")
    dtype: str | None = Field(description="Of the weights on disk, as F32 or BF16.")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelAnswer]
    has_more: bool


class AliasBody(BaseModel):
    model: ModelName = Field(description="Id of `GET /api/models`, or a job's `job_...@latest`, which it follows.")


class AliasAnswer(BaseModel):
    alias: str
    model: str = Field(description="What it stands for.")
    id: str = Field(description="The model that this is now.")


@endpoint(role=Role.VIEWER, tag="generation", answers={200: ModelList}, operation="list_models")
async def get_models(request: Request) -> Response:
    """Return the checkpoints, the newest first, and the local models; whether each can generate, and why not."""
    return JSONResponse((await list_models(service_of(request))).model_dump(mode="json"))


@endpoint(role=Role.SUBMITTER, tag="generation", body=AliasBody, answers={200: AliasAnswer}, operation="promote_model")
async def put_alias(request: Request) -> Response:
    """Let an alias stand for a model: requests that name it use that model from now on, those that run are not touched.

    `job_...@latest` follows the checkpoints of a job while it trains.
    """
    service, alias, model = service_of(request), request.path_params["alias"], request.state.body.model
    if not _ALIAS.fullmatch(alias):
        raise InvalidInput(f"{alias[:100]!r} is no alias; write letters, digits, dots and dashes, at most 64")
    if alias == RESERVED:
        raise InvalidInput(f"{RESERVED!r} is the default model; POST /api/checkpoints/load sets it")

    def write(session: Session) -> str:
        if alias.startswith(("job_", "ckpt_")) or local_model_dir(service.settings, alias) is not None:
            raise Conflict(f"{alias!r} is the id of a model; choose another alias")
        if model in list_aliases(session):
            raise InvalidInput(f"model: {model!r} is an alias itself; name the model")
        hold_model(session, model)
        if not model_exists(session, service.settings, model):
            raise NotFound(f"no model {model!r}; GET /api/models lists what can generate")
        set_alias(session, alias, model)
        return resolve_model(session, alias)

    answer = AliasAnswer(alias=alias, model=model, id=await service.write(write))
    return JSONResponse(answer.model_dump(mode="json"))


@endpoint(role=Role.SUBMITTER, tag="generation", answers={204: None}, operation="delete_alias")
async def delete_alias(request: Request) -> Response:
    """Remove an alias; the model stays."""
    await service_of(request).write(remove_alias, request.path_params["alias"])
    return Response(status_code=204)


async def list_models(service: Service) -> ModelList:
    """Return the checkpoints, the newest first, and the local models."""

    def read(session: Session) -> tuple[list[ModelAnswer], bool]:
        rows, has_more = list_checkpoints(session, limit=MAX_MODELS)
        known = _Known(session, service.settings, _default(session))
        answers = [known.checkpoint(session, row) for row in rows]
        answers += [known.local(name) for name in list_local_models(service.settings)]
        answers += [known.external(model_id) for model_id in known.external_ids]
        return answers, has_more

    data, has_more = await service.read(read)
    return ModelList(data=data, has_more=has_more)


async def require_model(service: Service, name: str) -> ModelAnswer:
    """Return one model by its id, an alias or a job's checkpoint.

    Raises:
        ProblemError: 404.
    """
    settings = service.settings

    def read(session: Session) -> ModelAnswer | None:
        model_id = resolve_model(session, name)
        known = _Known(session, settings, _default(session))
        if CHECKPOINT_ID_PATTERN.match(model_id):
            return known.checkpoint(session, get_checkpoint(session, model_id))
        if model_id in known.external_ids:
            return known.external(model_id)
        return None if local_model_dir(settings, model_id) is None else known.local(model_id)

    try:
        found = await service.read(read)
    except NotFound as exc:
        raise ProblemError(404, str(exc), kind="model_not_found") from exc
    if found is None:
        detail = f"the model {name!r} does not exist; GET /v1/models lists those that do"
        raise ProblemError(404, detail, kind="model_not_found")
    return found


def _default(session: Session) -> str | None:
    newest = newest_checkpoint(session)
    return get_value(session, DEFAULT_MODEL) or (newest.id if newest else None)


class _Known:
    """What holds for all models of a list."""

    def __init__(self, session: Session, settings: Settings, default: str | None) -> None:
        self._settings, self._default = settings, default
        self._aliases: dict[str, list[str]] = {}
        for alias in list_aliases(session):
            try:
                self._aliases.setdefault(resolve_model(session, alias), []).append(alias)
            except NotFound:  # a checkpoint that was deleted
                continue
        self._warm = warm_models(session, alive_within_s(settings))
        self.external_ids = sorted(model_id for model_id in self._warm if model_id.startswith(EXTERNAL_PREFIX))

    def checkpoint(self, session: Session, row: Checkpoint) -> ModelAnswer:
        try:  # of an adapter the facts are those of the model below it
            facts = model_facts(model_folders(session, self._settings, row.id).folder)
        except AptJobsError as exc:
            facts = ModelFacts(why_not=str(exc))
        return self._answer(
            row.id,
            facts,
            source="checkpoint",
            name=f"{get_job(session, row.job_id).name or row.job_id} at step {row.step}",
            job_id=row.job_id,
            step=row.step,
            val_loss=row.val_loss,
            created_at=timestamp(row.created_at),
        )

    def local(self, name: str) -> ModelAnswer:
        folder = local_model_dir(self._settings, name)
        facts = ModelFacts(why_not="its folder is gone") if folder is None else model_facts(folder)
        return self._answer(
            name, facts, source="local", name=name, job_id=None, step=None, val_loss=None, created_at=None
        )

    def external(self, model_id: str) -> ModelAnswer:
        """Describe a model of an external engine, of which only the name is known."""
        name = model_id.removeprefix(EXTERNAL_PREFIX)
        return self._answer(
            model_id,
            ModelFacts(is_chat=True),
            source="external",
            name=name,
            job_id=None,
            step=None,
            val_loss=None,
            created_at=None,
        )

    def _answer(
        self,
        model_id: str,
        facts: ModelFacts,
        *,
        source: Literal["checkpoint", "local", "external"],
        name: str,
        job_id: str | None,
        step: int | None,
        val_loss: float | None,
        created_at: str | None,
    ) -> ModelAnswer:
        return ModelAnswer(
            id=model_id,
            source=source,
            name=name,
            job_id=job_id,
            step=step,
            val_loss=val_loss,
            created_at=created_at,
            is_default=model_id == self._default,
            aliases=self._aliases.get(model_id, []),
            can_generate=facts.why_not is None,
            why_not=facts.why_not,
            is_warm=model_id in self._warm,
            is_chat=facts.is_chat,
            context_tokens=facts.context_tokens,
            num_parameters=facts.num_parameters,
            size_bytes=facts.size_bytes,
            dtype=facts.dtype,
        )
