"""One try of one delivery: signed and posted to a checked address, or sent through apprise.

Nothing of the answer is trusted: redirects are not followed, the body is cut before it is read, and all of it together
has one deadline.
"""

import asyncio
import functools
import socket
import ssl
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import httpx
from standardwebhooks.webhooks import Webhook as Signer

from apt_jobs import __version__
from apt_jobs.db.webhooks import Try, TryResult
from apt_jobs.errors import InvalidInput
from apt_jobs.operations.webhooks import hidden_value, require_apprise
from apt_jobs.settings import Settings
from apt_jobs.web.webhook_text import alert_text
from apt_jobs.webhook_targets import Address, Target, TargetRules, parse_address, parse_target

MAX_ANSWER_BYTES = 1_000  # of a body that the log keeps
MAX_ADDRESSES = 3  # of a name that are tried
CONNECT_TIMEOUT_S = 5.0
MAX_THREADS = 16  # look-ups of names, and alerts


class WebhookSender:
    """What the tries of one process share. Names are looked up, and alerts sent, in threads of its own."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._rules = settings, TargetRules.parse(settings.webhook_allow_targets)
        self._threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="webhook")
        # No connection is kept: one that was checked for a name must not serve another name of the same address.
        self._http = httpx.AsyncClient(
            verify=ssl.create_default_context(),
            trust_env=False,
            follow_redirects=False,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            timeout=httpx.Timeout(settings.webhook_timeout_s, connect=CONNECT_TIMEOUT_S),
        )

    async def close(self) -> None:
        """Close what is open; threads end by themselves."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self._http.aclose()

    async def send(self, attempt: Try) -> TryResult:
        """Make one try. Whatever goes wrong with the target is in the result.

        Raises:
            Unavailable: this process lacks the key of the secrets, which is no fault of the target.
        """
        began = time.monotonic()
        status, answer, error = None, None, None
        try:
            async with asyncio.timeout(self._settings.webhook_timeout_s):
                if attempt.webhook.kind == "apprise":
                    await self._alert(attempt)
                else:
                    status, answer = await self._post(attempt)
                    error = _why_failed(status)
        except TimeoutError:
            error = f"no whole answer within {self._settings.webhook_timeout_s:g} s"
        except InvalidInput as exc:
            error = str(exc)
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ssl.SSLError) as exc:
            error = f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__
        return TryResult(status, round((time.monotonic() - began) * 1_000), error, answer)

    async def _post(self, attempt: Try) -> tuple[int, str]:
        delivery = attempt.delivery
        target = parse_target(attempt.webhook.url or "")
        now = datetime.now(UTC)
        secret = await asyncio.to_thread(hidden_value, self._settings, attempt.webhook)
        headers = {
            "host": httpx.URL(target.url).netloc.decode("ascii"),
            "content-type": "application/json",
            "accept-encoding": "identity",
            "user-agent": f"apt-jobs/{__version__}",
            "webhook-id": delivery.id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": Signer(secret).sign(delivery.id, now, delivery.body),
        }
        addresses = (await self._addresses(target))[:MAX_ADDRESSES]
        for address in addresses[:-1]:
            try:
                return await self._post_to(address, target, headers, delivery.body)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                continue  # nothing was sent
        return await self._post_to(addresses[-1], target, headers, delivery.body)

    async def _post_to(self, address: Address, target: Target, headers: dict[str, str], body: str) -> tuple[int, str]:
        url = httpx.URL(target.url).copy_with(host=str(address))
        certified = {"sni_hostname": target.host}  # whose certificate is asked for and checked
        request = self._http.build_request("POST", url, headers=headers, content=body.encode(), extensions=certified)
        answer = await self._http.send(request, stream=True)
        try:
            raw = b""
            async for part in answer.aiter_raw(MAX_ANSWER_BYTES):
                raw += part
                if len(raw) >= MAX_ANSWER_BYTES:
                    break
        finally:
            await answer.aclose()
        return answer.status_code, raw[:MAX_ANSWER_BYTES].decode("utf-8", "replace")

    async def _addresses(self, target: Target) -> Sequence[Address]:
        """Return the addresses of a target, all of which may be sent to.

        Raises:
            InvalidInput: it has none, or one of them is refused.
        """
        look_up = functools.partial(socket.getaddrinfo, target.host, target.port, type=socket.SOCK_STREAM)
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._threads, look_up)
        except (socket.gaierror, UnicodeError) as exc:
            raise InvalidInput(f"the name {target.host} is not known: {exc}") from exc
        addresses = [parse_address(str(entry[4][0]).partition("%")[0]) for entry in found]
        for address in addresses:
            why = "no address" if address is None else self._rules.why_refused(target.host, address)
            if why is not None:
                raise InvalidInput(
                    f"{target.host} is at {address}, which is {why}; APT_JOBS_WEBHOOK_ALLOW_TARGETS allows targets"
                )
        if not addresses:
            raise InvalidInput(f"the name {target.host} has no address")
        return list(dict.fromkeys(address for address in addresses if address is not None))

    async def _alert(self, attempt: Try) -> None:
        url = await asyncio.to_thread(hidden_value, self._settings, attempt.webhook)
        title, text = alert_text(attempt.delivery.body, self._settings.browser_url)
        send = functools.partial(_notify, self._settings, url, title, text)
        await asyncio.get_running_loop().run_in_executor(self._threads, send)


def _notify(settings: Settings, url: str, title: str, text: str) -> None:
    require_apprise(settings, url)  # the operator may have changed what is allowed
    import apprise

    target = apprise.Apprise.instantiate(url, suppress_exceptions=True)
    if target is None or not target.notify(title=title, body=text):
        raise InvalidInput("apprise did not send it; the log of the web process says why")


def _why_failed(status: int) -> str | None:
    if 200 <= status < 300:
        return None
    if 300 <= status < 400:
        return f"it answered {status}; redirects are not followed: give the address that it leads to"
    return f"it answered {status}"
