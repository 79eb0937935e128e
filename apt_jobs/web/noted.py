"""Note each request: the ASGI middleware that the metrics and the access log are made of."""

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Noted:
    """ASGI middleware that learns of each HTTP request how it was answered, and how soon."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s = time.perf_counter()
        status = 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self.note_status(scope, status, time.perf_counter() - began_s)
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            self.note_end(scope, status, time.perf_counter() - began_s)

    def note_status(self, scope: Scope, status: int, elapsed_s: float) -> None:
        """Note the status before it is sent."""

    def note_end(self, scope: Scope, status: int, elapsed_s: float) -> None:
        """Note that the request is over. Status 0: it had no answer."""
