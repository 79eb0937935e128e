"""The clients of the stream benchmark, as cheap as Python allows; arguments: URL KEY CLIENTS LAST MANNER.

Raw sockets and epoll, which only look for the last event in the bytes that come. `probes` also note how long each event
took from its publication; a `crowd` reads only each 20 ms and when nobody else on its core wants to run, so that it
leaves the machine to publisher, Redis and probes; `silent` ones read nothing until their standard input ends. Prints
`ready`, then one JSON line: when each client had the last event, and the delays.
"""

import base64
import json
import os
import re
import selectors
import socket
import sys
import time
from urllib.parse import urlsplit

CROWD_PAUSE_S = 0.02
STAMP = re.compile(rb'sent_us[\\":]+(\d+)')
DEADLINE_S = 150.0
BUFFER = bytearray(1 << 20)  # for all clients: to allocate so much for each read costs ten times the read


class LoadClient:
    """One raw WebSocket."""

    def __init__(self, url: str, key: str, last: bytes, *, is_probe: bool) -> None:
        parts = urlsplit(url)
        self.socket = socket.create_connection((parts.hostname or "", parts.port or 0))
        self.last, self.is_probe, self.tail = last, is_probe, b""
        self.delays_us: list[int] = []
        path = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
        handshake = (
            f"GET {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Authorization: Bearer {key}\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}\r\n\r\n"
        )
        self.socket.sendall(handshake.encode())
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += self.socket.recv(65536)
        assert b" 101 " in answer.split(b"\r\n")[0] + b" ", answer[:200]
        self._wait_for_hello(url, answer.partition(b"\r\n\r\n")[2])
        self.socket.setblocking(False)

    def _wait_for_hello(self, url: str, received: bytes) -> None:
        """Ours and socket.io greet; only then is a client in the fan-out."""
        if "socket.io" in url:
            self._until(b'"sid"', received)
            self._send(b"40")
            self._until(b"40{", b"")
        elif "/ws/jobs/" in url:
            self._until(b'"layers"', received)

    def _until(self, word: bytes, received: bytes) -> None:
        while word not in received:
            received += self.socket.recv(65536)

    def _send(self, text: bytes) -> None:
        """One masked text frame; a mask of zeros leaves the text as it is."""
        self.socket.sendall(bytes([0x81, 0x80 | len(text)]) + bytes(4) + text)

    def read(self) -> bool:
        """Return whether the last event is there."""
        size = self.socket.recv_into(BUFFER)
        if size == 0:
            raise ConnectionError(f"the server closed the socket, after {self.tail!r}")
        if self.is_probe:
            now_us = time.time_ns() // 1000
            self.delays_us += [now_us - int(stamp) for stamp in STAMP.findall(BUFFER, 0, size)]
        begin, end = BUFFER[: min(size, len(self.last))], BUFFER[max(size - len(self.last), 0) : size]
        found = BUFFER.find(self.last, 0, size) >= 0 or self.last in self.tail + begin
        self.tail = (self.tail + end)[-len(self.last) :]
        return found


def main(url: str, key: str, num_clients: int, last: bytes, manner: str) -> None:
    clients = [LoadClient(url, key, last, is_probe=manner == "probes") for _ in range(num_clients)]
    selector = selectors.EpollSelector()
    for client in clients:
        selector.register(client.socket, selectors.EVENT_READ, client)
    if manner == "crowd":
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    print("ready", flush=True)
    ended_us: list[int] = []
    began_s = time.monotonic()
    if manner == "silent":
        sys.stdin.read()
        num_clients = 0
    while len(ended_us) < num_clients:
        if manner == "crowd":
            time.sleep(CROWD_PAUSE_S)
        ready = selector.select(1.0)
        assert time.monotonic() < began_s + DEADLINE_S, f"{len(ended_us)} of {num_clients} clients got everything"
        for key_, _ in ready:
            client = key_.data
            if client.read():
                ended_us.append(time.time_ns() // 1000)
                selector.unregister(client.socket)
    delays = [delay for client in clients for delay in client.delays_us]
    print(json.dumps({"ended_us": ended_us, "delays_us": delays}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4].encode(), sys.argv[5])
