"""`/v1/models`: what `GET /api/models` lists, and its aliases, in OpenAI's form."""

from datetime import datetime

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from apt_jobs.db.access import Role
from apt_jobs.web.api.models import ModelAnswer, list_models, require_model
from apt_jobs.web.openai.answers import OpenAIModel, OpenAIModelList
from apt_jobs.web.openai.endpoint import dialect
from apt_jobs.web.service import service_of


@dialect(role=Role.VIEWER, answers={200: OpenAIModelList}, operation="list_openai_models")
async def get_models(request: Request) -> Response:
    """List the models that can generate, and the aliases of models."""
    models = [one for one in (await list_models(service_of(request))).data if one.can_generate]
    data = [_model(one, one.id) for one in models]
    data += [_model(one, alias) for one in models for alias in one.aliases]
    return JSONResponse(OpenAIModelList(data=data).model_dump())


@dialect(role=Role.VIEWER, answers={200: OpenAIModel}, operation="get_openai_model")
async def get_model(request: Request) -> Response:
    """Return one model, by its id, an alias, or a job's `@best`, `@latest` or `@step`."""
    name = request.path_params["model"]
    return JSONResponse(_model(await require_model(service_of(request), name), name).model_dump())


def _model(model: ModelAnswer, name: str) -> OpenAIModel:
    created = 0 if model.created_at is None else int(datetime.fromisoformat(model.created_at).timestamp())
    return OpenAIModel(id=name, created=created, owned_by=model.job_id or "local")
