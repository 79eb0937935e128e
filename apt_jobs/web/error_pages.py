"""Errors for people: a browser that follows a link gets a page that says what to do, a program gets JSON."""

import html
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.responses import HTMLResponse, Response

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<meta name="viewport" content="width=device-width"><title>apt_jobs: {title}</title></head>
<body><main><h1>{heading}</h1><p>{detail}</p><p>{remedy}</p></main></body></html>
"""
_LOG_IN = (
    "To log in, run <code>apt-jobs login-link</code> on the machine of the service, or ask whoever runs it for a "
    "link, and open that link in this browser. A link works once."
)
_HEADINGS = {401: "You are not logged in", 403: "This is not allowed", 404: "There is nothing at this address"}


def wants_page(headers: Headers) -> bool:
    """Return whether a browser asks, on behalf of somebody who reads."""
    accepted = headers.get("accept", "").lower()
    return "text/html" in accepted and "application/problem+json" not in accepted


def error_page(status: int, title: str, detail: str, root_path: str, headers: Mapping[str, str]) -> Response:
    """Return an error as a page without scripts."""
    home = f'<a href="{html.escape(root_path)}/">Go to the list of jobs</a>'
    text = _PAGE.format(
        title=html.escape(title),
        heading=html.escape(_HEADINGS.get(status, title)),
        detail=html.escape(detail),
        remedy=_LOG_IN if status == 401 else home,
    )
    return HTMLResponse(text, status, headers=dict(headers))
