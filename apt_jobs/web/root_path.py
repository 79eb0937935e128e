"""The path below which a proxy shows the service, as ASGI's `root_path`.

The outermost layer. Requests arrive with the prefix or, from a proxy that strips it and from this machine, without it;
behind this layer `path` always begins with `root_path`. What an answer redirects to gets the prefix here, once for all.
"""

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class RootPath:
    """ASGI middleware. `root_path` is `/apt`, say, or empty."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app, self._root_path = app, root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        root = self._root_path
        if scope["type"] == "http" and root and scope["path"] == root:
            await RedirectResponse(f"{root}/", 308)(scope, receive, send)
            return
        inside = not root or scope["path"].startswith(f"{root}/")
        scope = {**scope, "root_path": root, "path": scope["path"] if inside else root + scope["path"]}
        await self._app(scope, receive, self._with_usable_location(scope, send))

    def _with_usable_location(self, scope: Scope, send: Send) -> Send:
        host = Headers(scope=scope).get("host", "")

        async def wrapped(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=[*message.get("headers", ())])
                if (location := headers.get("location")) is not None:
                    headers["location"] = self._usable(location, host)
                    message = {**message, "headers": headers.raw}
            await send(message)

        return wrapped

    def _usable(self, location: str, host: str) -> str:
        """Without scheme and host, which a proxy may have replaced, and below the root path."""
        for scheme in ("http", "https"):
            if host and location.startswith(f"{scheme}://{host}/"):
                location = "/" + location.removeprefix(f"{scheme}://{host}").lstrip("/")  # `//x` is another host
        if not location.startswith("/") or location.startswith(("//", f"{self._root_path}/")):
            return location
        return self._root_path + location
