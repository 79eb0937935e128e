"""The OpenAPI document: what the routes' `@endpoint`s declare, in a form that generators of clients accept.

Schemas have the plain names of their models, operations have ids, and each operation lists the statuses that it gives.
"""

import copy
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode
from pydantic_core import core_schema
from starlette.routing import BaseRoute, Route

from apt_jobs import __version__
from apt_jobs.jobs.spec import AnyJobSpec
from apt_jobs.web.api.examples import EXAMPLES
from apt_jobs.web.openai_errors import ErrorAnswer, openai_status
from apt_jobs.web.problems import MEDIA_TYPE, Problem

REF = "#/components/schemas/{model}"
COOKIE = "apt_session"  # its name of an installation that is not known
TAGS = {
    "jobs": "Submit, list, steer and delete jobs; their events, logs and histories.",
    "training": "The training that runs, or another one: curves, gradients, status.",
    "checkpoints": "List, load, download and delete checkpoints.",
    "generation": "Continue texts; the models that can.",
    "datasets": "Texts to train on.",
    "code": "Packed folders of code that jobs bring.",
    "schedules": "Jobs that come due by a cron expression.",
    "secrets": "Values that jobs are given by name; they are written and never read.",
    "webhooks": "Who is sent word of what happens; the log of deliveries.",
    "service": "Queues, workers, API keys and sessions.",
    "openai": "OpenAI's dialect: what the official clients send and expect.",
}
_STATUSES = {  # what a status of an error means here
    400: "The request is not well-formed.",
    401: "No valid API key or session.",
    403: "The role of the key does not allow this, or the request came from another site.",
    404: "There is no such thing.",
    408: "The body did not arrive in time.",
    409: "The state of something forbids this now.",
    412: "Somebody changed it meanwhile: `If-Match` names another version.",
    413: "The body is too large.",
    415: "The body has a type or encoding that is not read here.",
    422: "The request is well-formed, but has values that are not possible; `errors` names them.",
    429: "Too many at once.",
    503: "The service cannot do this for now.",
    504: "It is not done in time, and goes on.",
    507: "The disk has no room.",
}
_SUCCESS = {200: "Done.", 201: "Created.", 202: "Accepted.", 204: "Done; there is no body."}
_RETRY_AFTER = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 0}}}
_HEADERS: dict[int, dict[str, Any]] = {
    401: {"WWW-Authenticate": {"description": "How to authenticate.", "schema": {"type": "string"}}},
    429: _RETRY_AFTER,
    503: _RETRY_AFTER,
}
_LOCATION = {"Location": {"description": "Path of what was created.", "schema": {"type": "string"}}}
_REPLAYED = {
    "Idempotent-Replayed": {
        "description": "`true`: this repeats the answer to an earlier request with the same `Idempotency-Key`.",
        "schema": {"type": "string", "enum": ["true"]},
    }
}
_IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "A repeated request with this key within 24 hours creates nothing and has the same answer; the same "
    "key with another request is refused with 422.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": r"^[!-~]([ -~]*[!-~])?$"},
}
_PARAMETERS = {  # what those are that mean the same everywhere
    "after": "Id of the last one seen.",
    "job_id": "Only of this job.",
    "limit": "At most so many.",
    "queue": "Only of this queue.",
}
_CONVERTER = re.compile(r"\{(\w+)(?::\w+)?\}")


@dataclass(frozen=True, slots=True)
class Declaration:
    """What one `@endpoint` says of its operation."""

    operation: str
    tag: str
    answers: Mapping[int, Any]
    problems: frozenset[int]
    query: type[BaseModel] | None
    body: Any
    creates: bool
    media: Mapping[str, Any]  # of what is answered instead of JSON, or besides: type to schema
    body_media: Mapping[str, Any]  # of a body that is no JSON
    is_dialect: bool = False  # below `/v1`: errors in OpenAI's form


def openapi_document(routes: Sequence[BaseRoute], *, url: str = "/", cookie: str = COOKIE) -> dict[str, Any]:
    """Describe the declared routes.

    Args:
        routes: The route table; what no `@endpoint` declares is left out.
        url: Where the service answers.
        cookie: Name of the cookie of a browser's session.

    Returns:
        A document of OpenAPI 3.1.
    """
    declared = [
        (route, method, route.endpoint.declaration)
        for route in routes
        if isinstance(route, Route) and hasattr(route.endpoint, "declaration")
        for method in sorted((route.methods or set()) - {"HEAD"})
    ]
    schemas = _Schemas(declaration for _, _, declaration in declared)
    paths: dict[str, Any] = {}
    for route, method, declaration in declared:
        path = _CONVERTER.sub(r"{\1}", route.path)
        text = inspect.cleandoc(route.endpoint.__doc__ or "")
        paths.setdefault(path, {})[method.lower()] = _operation(path, text, declaration, schemas)
    used = {declaration.tag for _, _, declaration in declared}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "apt_jobs",
            "version": __version__,
            "description": "Submit, watch and steer training and generation jobs.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": url, "description": "This service."}],
        "tags": [{"name": tag, "description": TAGS.get(tag, f"{tag.capitalize()}.")} for tag in sorted(used)],
        "security": [{"key": []}, {"browser": []}],
        "paths": paths,
        "components": {
            "schemas": schemas.components,
            "responses": _error_responses([(route.path, declaration) for route, _, declaration in declared], schemas),
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "An API key."},
                "browser": {"type": "apiKey", "in": "cookie", "name": cookie, "description": "A browser's session."},
            },
        },
    }


class _Generator(GenerateJsonSchema):
    def field_is_required(
        self, field: core_schema.ModelField | core_schema.DataclassField | core_schema.TypedDictField, total: bool
    ) -> bool:
        """Require all fields of an answer: what has a default is sent, too."""
        if self.mode == "serialization" and field["type"] == "model-field":
            return True
        return super().field_is_required(field, total)


class _Schemas:
    """The schemas of all declarations, each under its own name."""

    def __init__(self, declarations: Iterable[Declaration]) -> None:
        wanted: dict[tuple[str, JsonSchemaMode], TypeAdapter[Any]] = {
            _key(error): TypeAdapter(error) for error in (Problem, ErrorAnswer)
        }
        for declaration in declarations:
            for answer in filter(None, declaration.answers.values()):
                wanted[_key(answer)] = TypeAdapter(answer)
            for given in filter(None, (declaration.query, declaration.body)):
                wanted[_key(given, "validation")] = TypeAdapter(given)
        inputs = [(name, mode, adapter) for (name, mode), adapter in wanted.items()]
        self._found, definitions = TypeAdapter.json_schemas(inputs, ref_template=REF, schema_generator=_Generator)
        self.components: dict[str, Any] = copy.deepcopy(definitions.get("$defs", {}))
        job = self._found.get(_key(AnyJobSpec, "validation"))
        if job is not None:  # a union has no name of its own
            self.components["AnyJobSpec"] = {**job, "description": "A job of one of the kinds."}
        for declaration_name in [name for name in self.components if name.endswith("Query")]:
            del self.components[declaration_name]  # they are parameters
        self._defs = definitions.get("$defs", {})
        for name, schema in self.components.items():
            schema.pop("title", None)
            for field in schema.get("properties", {}).values():
                field.pop("title", None)
            if name in EXAMPLES:
                schema["examples"] = [EXAMPLES[name]]
        self.components = dict(sorted(self.components.items()))

    def of(self, model: Any, mode: JsonSchemaMode = "serialization") -> dict[str, Any]:
        """Return the reference to a model's schema."""
        if model == AnyJobSpec:
            return {"$ref": REF.format(model="AnyJobSpec")}
        return dict(self._found[_key(model, mode)])

    def parameters(self, query: type[BaseModel]) -> list[dict[str, Any]]:
        """Return the query parameters that a model declares."""
        reference = self._found[_key(query, "validation")]
        schema = self._defs[reference["$ref"].rsplit("/", 1)[1]] if "$ref" in reference else reference
        required = schema.get("required", ())
        return [
            {
                "name": name,
                "in": "query",
                "required": name in required,
                "description": field.get("description") or _PARAMETERS.get(name, ""),
                "schema": _present({key: value for key, value in field.items() if key not in ("title", "description")}),
                **({"style": "form", "explode": True} if field.get("type") == "array" else {}),
            }
            for name, field in schema["properties"].items()
        ]


def _key(model: Any, mode: JsonSchemaMode = "serialization") -> tuple[str, JsonSchemaMode]:
    return (f"{getattr(model, '__module__', '')}.{getattr(model, '__qualname__', model)}", mode)


def _present(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a parameter that is given: what is left out is not null, as null cannot be written."""
    options = [option for option in schema.get("anyOf", ()) if option != {"type": "null"}]
    if len(options) != 1:
        return schema
    rest = {key: value for key, value in schema.items() if key != "anyOf" and (key, value) != ("default", None)}
    return {**options[0], **rest}


def _operation(path: str, text: str, declaration: Declaration, schemas: _Schemas) -> dict[str, Any]:
    sentence, _, _ = text.partition("\n")
    parameters = [
        {"name": name, "in": "path", "required": True, "description": _of_path(name), "schema": {"type": "string"}}
        for name in _CONVERTER.findall(path)
    ]
    if declaration.query is not None:
        parameters += schemas.parameters(declaration.query)
    if declaration.creates:
        parameters.append(_IDEMPOTENCY_KEY)
    operation: dict[str, Any] = {
        "operationId": declaration.operation,
        "tags": [declaration.tag],
        "summary": re.split(r"(?<=[^.])[.:;] ", sentence.rstrip("."), maxsplit=1)[0],
        "description": text,
    }
    if parameters:
        operation["parameters"] = parameters
    if declaration.body is not None:
        content = {"application/json": {"schema": schemas.of(declaration.body, "validation")}}
        operation["requestBody"] = {"required": True, "content": content}
    elif declaration.body_media:
        content = {kind: {"schema": schema} for kind, schema in declaration.body_media.items()}
        operation["requestBody"] = {"required": True, "content": content}
    operation["responses"] = {
        **{
            str(status): _answer(status, answer, declaration, schemas) for status, answer in declaration.answers.items()
        },
        **{
            str(status): {"$ref": f"#/components/responses/{_response_name(status, declaration.is_dialect)}"}
            for status in sorted(problems_of(path, declaration))
        },
    }
    return operation


def problems_of(path: str, declaration: Declaration) -> set[int]:
    """Return the statuses of the errors that an operation gives: its own, and those of what it is made of."""
    found = {400, 401, 403, 429, 503, *declaration.problems}  # of the guard
    if "{" in path:
        found.add(404)
    if declaration.query is not None:
        found.add(422)
    if declaration.body is not None or declaration.body_media:
        found |= {408, 413, 415, 422}
    if declaration.creates:
        found |= {409, 422}
    return {openai_status(status) for status in found} if declaration.is_dialect else found


def _answer(status: int, model: Any, declaration: Declaration, schemas: _Schemas) -> dict[str, Any]:
    response: dict[str, Any] = {"description": _SUCCESS[status]}
    headers: dict[str, Any] = {}
    if declaration.creates:
        headers |= _REPLAYED
    if status in (201, 202):
        headers |= _LOCATION
    if headers:
        response["headers"] = headers
    content: dict[str, Any] = {}
    if model is not None:
        content["application/json"] = {"schema": schemas.of(model)}
    if status == 200:
        content |= {kind: {"schema": schema} for kind, schema in declaration.media.items()}
    if content:
        response["content"] = content
    return response


def _error_responses(declared: Iterable[tuple[str, Declaration]], schemas: _Schemas) -> dict[str, Any]:
    """Return the errors that operations refer to, each once."""
    used = {
        (status, declaration.is_dialect) for path, declaration in declared for status in problems_of(path, declaration)
    }
    return {
        _response_name(status, is_dialect): _problem(status, schemas, is_dialect) for status, is_dialect in sorted(used)
    }


def _response_name(status: int, is_dialect: bool) -> str:
    return f"{'OpenAIError' if is_dialect else 'Problem'}{status}"


def _problem(status: int, schemas: _Schemas, is_dialect: bool) -> dict[str, Any]:
    response: dict[str, Any] = {"description": _STATUSES[status]}
    if status in _HEADERS:
        response["headers"] = _HEADERS[status]
    kind, model = ("application/json", ErrorAnswer) if is_dialect else (MEDIA_TYPE, Problem)
    response["content"] = {kind: {"schema": schemas.of(model)}}
    return response


def _of_path(name: str) -> str:
    return "Its name." if name == "name" else f"Id of the {name.removesuffix('_id').replace('_', ' ')}."
