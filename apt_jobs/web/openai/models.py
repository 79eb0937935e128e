"""`/v1/models`: what `GET /api/models` lists, in OpenAI's form."""

from datetime import datetime

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from apt_jobs.db.access import Role
from apt_jobs.web.api.generation import ModelAnswer, list_models
from apt_jobs.web.openai.answers import OpenAIModel, OpenAIModelList
from apt_jobs.web.openai.endpoint import dialect
from apt_jobs.web.problems import ProblemError
from apt_jobs.web.service import service_of


@dialect(role=Role.VIEWER, answers={200: OpenAIModelList}, operation="list_openai_models")
async def get_models(request: Request) -> Response:
    """List models."""
    models = await list_models(service_of(request))
    return JSONResponse(OpenAIModelList(data=[_model(one) for one in models.data]).model_dump())


@dialect(role=Role.VIEWER, answers={200: OpenAIModel}, operation="get_openai_model")
async def get_model(request: Request) -> Response:
    """Return one model."""
    model_id = request.path_params["model"]
    for one in (await list_models(service_of(request))).data:
        if one.id == model_id:
            return JSONResponse(_model(one).model_dump())
    detail = f"the model {model_id!r} does not exist; GET /v1/models lists those that do"
    raise ProblemError(404, detail, kind="model_not_found")


def _model(model: ModelAnswer) -> OpenAIModel:
    created = 0 if model.created_at is None else int(datetime.fromisoformat(model.created_at).timestamp())
    return OpenAIModel(id=model.id, created=created, owned_by=model.job_id or "local")
