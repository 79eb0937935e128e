"""TCP ports for servers of tests, of which several may start at once in several processes."""

import socket


def unused_port() -> int:
    """A port of loopback that nobody listens on. The kernel hands out another one to each who asks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
