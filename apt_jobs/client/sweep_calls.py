"""What both clients do with sweeps."""

import asyncio
import time
from collections.abc import Mapping
from typing import Any, Literal

from apt_jobs.client import calls
from apt_jobs.client.async_transport import AsyncTransport
from apt_jobs.client.transport import Transport

POLL_S = 2.0
SweepAction = Literal["cancel", "pause", "resume"]


class SweepCalls(Transport):
    """The part of `Client` that is about sweeps."""

    def create_sweep(self, sweep: Mapping[str, Any], idempotency_key: str | None = None) -> dict[str, Any]:
        """Submit a sweep with all of its jobs, as `POST /api/sweeps` takes it.

        Example:
            rates = {"training.learning_rate": {"values": [1e-3, 3e-3]}}
            sweep = client.create_sweep({"spec": {"kind": "train"}, "parameters": rates, "metric": "val_loss"})
            print(client.wait_for_sweep(sweep["id"])["best"])
        """
        return self._send(calls.create_sweep(sweep, idempotency_key))

    def sweep(self, sweep_id: str) -> dict[str, Any]:
        """Get one sweep: its progress, its table, the best setting."""
        return self._send(calls.get_sweep(sweep_id))

    def sweeps(self, after: str | None = None, limit: int = 50) -> list[dict[str, Any]]:
        """Get one page of sweeps, newest first."""
        return self._send(calls.list_sweeps(after, limit))

    def steer_sweep(self, sweep_id: str, action: SweepAction) -> dict[str, Any]:
        """Cancel, pause or resume all jobs of a sweep."""
        return self._send(calls.steer_sweep(sweep_id, action))

    def wait_for_sweep(self, sweep_id: str, timeout_s: float | None = None) -> dict[str, Any]:
        """Ask for a sweep every two seconds until all of its jobs have ended.

        Raises:
            TimeoutError: they have not in time.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not calls.is_over(sweep := self.sweep(sweep_id)):
            if deadline is not None and time.monotonic() + POLL_S > deadline:
                raise TimeoutError(calls.not_over(sweep, timeout_s))
            time.sleep(POLL_S)
        return sweep


class AsyncSweepCalls(AsyncTransport):
    """The part of `AsyncClient` that is about sweeps."""

    async def create_sweep(self, sweep: Mapping[str, Any], idempotency_key: str | None = None) -> dict[str, Any]:
        """Submit a sweep with all of its jobs, as `POST /api/sweeps` takes it."""
        return await self._send(calls.create_sweep(sweep, idempotency_key))

    async def sweep(self, sweep_id: str) -> dict[str, Any]:
        """Get one sweep: its progress, its table, the best setting."""
        return await self._send(calls.get_sweep(sweep_id))

    async def sweeps(self, after: str | None = None, limit: int = 50) -> list[dict[str, Any]]:
        """Get one page of sweeps, newest first."""
        return await self._send(calls.list_sweeps(after, limit))

    async def steer_sweep(self, sweep_id: str, action: SweepAction) -> dict[str, Any]:
        """Cancel, pause or resume all jobs of a sweep."""
        return await self._send(calls.steer_sweep(sweep_id, action))

    async def wait_for_sweep(self, sweep_id: str, timeout_s: float | None = None) -> dict[str, Any]:
        """Ask for a sweep every two seconds until all of its jobs have ended.

        Raises:
            TimeoutError: they have not in time.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not calls.is_over(sweep := await self.sweep(sweep_id)):
            if deadline is not None and time.monotonic() + POLL_S > deadline:
                raise TimeoutError(calls.not_over(sweep, timeout_s))
            await asyncio.sleep(POLL_S)
        return sweep
