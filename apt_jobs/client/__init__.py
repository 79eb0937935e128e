"""The Python client of the REST and WebSocket interfaces: `Client`, and `AsyncClient` for asyncio."""

from apt_jobs.client.answers import JobAnswer
from apt_jobs.client.async_client import AsyncClient, AsyncJob
from apt_jobs.client.client import Client, Job

__all__ = ["AsyncClient", "AsyncJob", "Client", "Job", "JobAnswer"]
