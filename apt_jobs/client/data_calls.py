"""What a client brings to the service for jobs: data sets, secrets and packed code. A part of `Client`."""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from apt_jobs.client import calls
from apt_jobs.client.packing import pack_folder
from apt_jobs.client.transport import Transport
from apt_jobs.client.upload_plan import next_step, upload_steps
from apt_jobs.errors import AptJobsError, NotFound
from apt_jobs.jobs.code import DEFAULT_MAX_BYTES


class DataCalls(Transport):
    """The methods of `Client` for data sets and code, and for what is kept."""

    def prune(self, policy: Mapping[str, Any] | None = None, *, dry_run: bool = True) -> dict[str, Any]:
        """Remove what a policy says, in one run, or say what would go. Needs the role admin.

        Args:
            policy: As `POST /api/retention` takes it; None: the service's own.
            dry_run: Remove nothing.

        Example:
            print(client.prune({"days": 90})["num_jobs"])
        """
        return self._send(calls.prune(policy, dry_run))

    def datasets(self) -> list[dict[str, Any]]:
        """Get the data sets, the built-in one first."""
        return self._send(calls.list_of_all("datasets"))

    def upload_dataset(
        self, name: str, content: bytes | IO[bytes], *, format: str = "text", column: str = "text"
    ) -> dict[str, Any]:
        """Add a data set, from bytes or an open file. `format` and `column` are those of `POST /api/datasets`."""
        answer = self._json(
            "POST", "/api/datasets", params=calls.upload_parameters(name, format, column), content=content
        )
        return dict(answer)

    def upload_dataset_file(
        self,
        name: str,
        file: str | os.PathLike[str],
        *,
        format: str = "text",
        column: str = "text",
        on_progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, Any]:
        """Add a data set from a file, in parts: an upload that broke off, of whatever process, goes on where it was.

        Args:
            name: What jobs will call it.
            file: The file.
            format: As `POST /api/datasets` has it.
            column: The same.
            on_progress: Called with the bytes that have arrived, and all of them.

        Raises:
            InvalidInput: the file cannot be read, or is not of the format.
            Conflict: there is such a data set.
        """
        steps = upload_steps(Path(file), name, format, column, on_progress)
        answer: dict[str, Any] | AptJobsError | None = None
        while True:
            step = next_step(steps, answer)
            if isinstance(step, dict):
                return step
            answer = None
            if isinstance(step, float):
                time.sleep(step)
                continue
            try:
                answer = self._send(step)
            except AptJobsError as exc:
                answer = exc

    def preview_dataset(self, name: str, *, rows: int = 5, model: str | None = None) -> dict[str, Any]:
        """Get the first rows of a data set, and their tokens by the tokenizer of `model`."""
        return self._send(calls.preview_dataset(name, rows, model))

    def delete_dataset(self, name: str) -> None:
        """Delete a data set."""
        self._send(calls.delete_dataset(name))

    def secrets(self) -> list[dict[str, Any]]:
        """Get the names of the secrets that jobs may ask for; nobody gets their values."""
        return self._send(calls.list_of_all("secrets"))

    def set_secret(self, name: str, value: str) -> dict[str, Any]:
        """Store a value, which jobs with `"secrets": [name]` get as an environment variable. Needs the role admin."""
        return self._send(calls.set_secret(name, value))

    def delete_secret(self, name: str) -> None:
        """Remove a secret; jobs that run keep it."""
        self._send(calls.delete_secret(name))

    def upload_code(self, folder: str | os.PathLike[str], max_bytes: int = DEFAULT_MAX_BYTES) -> dict[str, Any]:
        """Pack a folder and upload it, unless the service has it: what git tracks and what it does not ignore.

        Args:
            folder: The code, from which a job's command runs.
            max_bytes: More than so many are not packed.

        Returns:
            What the service knows of it; a job brings it as `"code": {"sha256": ...}`.

        Raises:
            InvalidInput: the folder holds what cannot be packed; the message names the file.
            Denied: the operator does not allow it.

        Example:
            code = client.upload_code(".")
            command = ["python", "train.py"]
            client.submit({"kind": "train", "code": {"sha256": code["sha256"]}, "argv": command, "launcher": "none"})
        """
        with pack_folder(Path(folder), max_bytes) as packed:
            try:
                return self.code(packed.sha256)
            except NotFound:
                path = calls.code_path(packed.sha256)
                return dict(self._json("PUT", path, content=packed.file, timeout=calls.UPLOAD_TIMEOUT_S))

    def code(self, sha256: str) -> dict[str, Any]:
        """Get what is known of packed code: its size, commit and branch, and the diff to that commit.

        Raises:
            NotFound: it was never uploaded, or was removed since no job names it.
        """
        return self._send(calls.get_code(sha256))
