"""The built page: one HTML file for all addresses of the user interface, and its assets by exact name."""

import asyncio
import html
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response

from apt_jobs.errors import NotFound
from apt_jobs.web.api.openapi import openapi_document
from apt_jobs.web.guard import session_cookie
from apt_jobs.web.service import service_of

STATIC = Path(__file__).parent / "static"
_IMMUTABLE = {"cache-control": "public, max-age=31536000, immutable"}  # the names of assets contain their hash
_ALWAYS_ASK = {"cache-control": "no-cache"}
_NOT_BUILT = """<!doctype html><html lang="en"><title>apt_jobs</title>
<h1>The user interface is not built</h1>
<p>This is a checkout that was not installed. Run <code>make setup</code>, or <code>python hatch_build.py</code>.</p>
</html>"""


async def get_page(request: Request) -> Response:
    """Return the page of the user interface, which reads its address itself, with the path below which it is shown."""
    try:
        text = (STATIC / "index.html").read_text()
    except FileNotFoundError:
        return HTMLResponse(_NOT_BUILT, 503)
    return HTMLResponse(_below(text, request.scope.get("root_path", "")), headers=_ALWAYS_ASK)


async def get_favicon(_request: Request) -> Response:
    """Return the icon of the page."""
    return _file(STATIC, "favicon.svg", _ALWAYS_ASK)


async def get_asset(request: Request) -> Response:
    """Return a script or style of the page."""
    return _file(STATIC / "assets", request.path_params["name"], _IMMUTABLE)


async def get_openapi(request: Request) -> Response:
    """Return the OpenAPI document of this service, with the address at which it was asked for."""
    url, cookie = request.scope.get("root_path") or "/", session_cookie(service_of(request).settings)
    document = await asyncio.to_thread(openapi_document, request.app.routes, url=url, cookie=cookie)
    return JSONResponse(document)


async def get_docs(request: Request) -> Response:
    """Return the OpenAPI document as a page, without scripts."""
    return HTMLResponse(await asyncio.to_thread(_docs_page, openapi_document(request.app.routes)))


def _below(page: str, root_path: str) -> str:
    """Return the page with its assets, which the build names relative to it (`./`), below `root_path`."""
    head = (
        f'<head>\n    <meta name="root-path" content="{root_path}" />'  # the setting has no sign that needs an escape
    )
    return page.replace("<head>", head, 1).replace('="./', f'="{root_path}/')


def _file(folder: Path, name: str, headers: dict[str, str]) -> Response:
    """Return a file of the folder whose name is exactly `name`: no path is made from what came."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name == name and path.is_file():
            return FileResponse(path, headers=headers)
    raise NotFound(f"no file {name[:100]!r}")


def _docs_page(document: dict[str, Any]) -> str:
    parts = ["<!doctype html><html lang='en'><head><meta charset='utf-8'><title>apt_jobs: REST</title></head><body>"]
    parts.append("<h1>apt_jobs: REST</h1><p>The document for programs: <a href='openapi.json'>openapi.json</a></p>")
    for path, methods in sorted(document["paths"].items()):
        for method, operation in methods.items():
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>")
            parts.append(f"<p>{html.escape(operation['description'])}</p><ul>")
            for parameter in operation.get("parameters", []):
                words = f"{parameter['name']} ({parameter['in']}): {parameter.get('description') or ''}"
                parts.append(f"<li>{html.escape(words)}</li>")
            parts.append(f"</ul><p>Answers: {', '.join(sorted(operation['responses']))}</p>")
    parts.append("</body></html>")
    return "".join(parts)
