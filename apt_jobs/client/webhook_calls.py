"""What both clients do with webhooks."""

from collections.abc import Mapping, Sequence
from typing import Any

from apt_jobs.client import calls
from apt_jobs.client.async_transport import AsyncTransport
from apt_jobs.client.transport import Transport


class WebhookCalls(Transport):
    """The part of `Client` that is about webhooks. All of it needs the role admin."""

    def webhooks(self) -> list[dict[str, Any]]:
        """Get all webhooks, oldest first."""
        return self._send(calls.list_of_all("webhooks"))

    def webhook(self, webhook_id: str) -> dict[str, Any]:
        """Get one webhook."""
        return self._send(calls.get_webhook(webhook_id))

    def create_webhook(
        self, name: str, url: str, events: Sequence[str], *, idempotency_key: str | None = None, **options: Any
    ) -> dict[str, Any]:
        """Add a webhook; options are those of `POST /api/webhooks`. The answer alone has the key of its signatures.

        Example:
            hook = client.create_webhook("failures", "https://receiver.example/hooks", ["job.failed", "job.dead"])
            print(hook["secret"])
        """
        body = {"name": name, "url": url, "events": list(events), **options}
        return self._send(calls.create_webhook(body, idempotency_key))

    def update_webhook(self, webhook_id: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Change fields of a webhook; `{"enabled": False}` disables it."""
        return self._send(calls.update_webhook(webhook_id, changes))

    def delete_webhook(self, webhook_id: str) -> None:
        """Delete a webhook, with its log and what waits to be sent."""
        self._send(calls.delete_webhook(webhook_id))

    def test_webhook(self, webhook_id: str) -> dict[str, Any]:
        """Have a `webhook.test` event sent; returns its delivery, which waits."""
        return self._send(calls.test_webhook(webhook_id))

    def webhook_deliveries(
        self, webhook_id: str, *, state: str | None = None, after: str | None = None, limit: int = 50
    ) -> list[dict[str, Any]]:
        """Get one page of the log of a webhook, newest first."""
        return self._send(calls.list_webhook_deliveries(webhook_id, state, after, limit))

    def replay_webhook_delivery(self, webhook_id: str, delivery_id: str) -> dict[str, Any]:
        """Send a message of the log again, with its id."""
        return self._send(calls.replay_webhook_delivery(webhook_id, delivery_id))


class AsyncWebhookCalls(AsyncTransport):
    """The part of `AsyncClient` that is about webhooks. All of it needs the role admin."""

    async def webhooks(self) -> list[dict[str, Any]]:
        """Get all webhooks, oldest first."""
        return await self._send(calls.list_of_all("webhooks"))

    async def webhook(self, webhook_id: str) -> dict[str, Any]:
        """Get one webhook."""
        return await self._send(calls.get_webhook(webhook_id))

    async def create_webhook(
        self, name: str, url: str, events: Sequence[str], *, idempotency_key: str | None = None, **options: Any
    ) -> dict[str, Any]:
        """Add a webhook; options are those of `POST /api/webhooks`. The answer alone has the key of its signatures."""
        body = {"name": name, "url": url, "events": list(events), **options}
        return await self._send(calls.create_webhook(body, idempotency_key))

    async def update_webhook(self, webhook_id: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Change fields of a webhook; `{"enabled": False}` disables it."""
        return await self._send(calls.update_webhook(webhook_id, changes))

    async def delete_webhook(self, webhook_id: str) -> None:
        """Delete a webhook, with its log and what waits to be sent."""
        await self._send(calls.delete_webhook(webhook_id))

    async def test_webhook(self, webhook_id: str) -> dict[str, Any]:
        """Have a `webhook.test` event sent; returns its delivery, which waits."""
        return await self._send(calls.test_webhook(webhook_id))

    async def webhook_deliveries(
        self, webhook_id: str, *, state: str | None = None, after: str | None = None, limit: int = 50
    ) -> list[dict[str, Any]]:
        """Get one page of the log of a webhook, newest first."""
        return await self._send(calls.list_webhook_deliveries(webhook_id, state, after, limit))

    async def replay_webhook_delivery(self, webhook_id: str, delivery_id: str) -> dict[str, Any]:
        """Send a message of the log again, with its id."""
        return await self._send(calls.replay_webhook_delivery(webhook_id, delivery_id))
