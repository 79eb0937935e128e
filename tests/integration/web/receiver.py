"""A real receiver of webhooks, which answers as a test wants, checks signatures and counts what came."""

import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import orjson
from standardwebhooks.webhooks import Webhook

Answer = Callable[[BaseHTTPRequestHandler, "Receiver"], None]


class Receiver:
    """An HTTP server on loopback. `secret` checks what comes; `status` is answered, or what `respond` does."""

    def __init__(self) -> None:
        self.secret: str | None = None
        self.status = 204
        self.respond: Answer | None = None
        self.headers: list[dict[str, str]] = []
        self.messages: list[dict[str, Any]] = []
        self.ended = threading.Event()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                receiver.receive(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/hook?team=a"

    def receive(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers["content-length"]))
        headers = {name.lower(): value for name, value in request.headers.items()}
        if self.secret is not None:
            Webhook(self.secret).verify(body, headers)  # an error breaks the connection off, and the test
        self.headers.append(headers)
        self.messages.append(orjson.loads(body))
        if self.respond is not None:
            self.respond(request, self)
            return
        request.send_response(self.status)
        request.send_header("content-length", "0")
        request.end_headers()

    def ids(self) -> list[str]:
        return [headers.get("webhook-id", "") for headers in self.headers]

    def types(self) -> list[str]:
        return [message["type"] for message in self.messages]

    def close(self) -> None:
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def hang(_request: BaseHTTPRequestHandler, receiver: Receiver) -> None:
    """Answer nothing until the test is over."""
    receiver.ended.wait(120)


def drip(request: BaseHTTPRequestHandler, receiver: Receiver) -> None:
    """Answer 200 with a body that never ends, byte by byte."""
    request.send_response(200)
    request.end_headers()
    try:
        while not receiver.ended.is_set():
            request.wfile.write(b"x" * 400)
            time.sleep(0.01)
    except OSError:
        pass


def redirect(request: BaseHTTPRequestHandler, receiver: Receiver) -> None:
    """Lead to the receiver itself."""
    request.send_response(307)
    request.send_header("location", receiver.url)
    request.send_header("content-length", "0")
    request.end_headers()
