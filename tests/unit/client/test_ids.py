"""Ids in addresses, for every method of both clients: whatever an id is, no other address is reached."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any
from urllib.parse import unquote

import httpx
import pytest

from apt_jobs.client import AsyncClient, Client
from apt_jobs.errors import InvalidInput, NotFound

URL, KEY = "http://127.0.0.1:9", "apt_k_s"
METHODS: dict[str, Callable[[Any, str], Any]] = {
    "get": lambda client, name: client.get(name),
    "cancel": lambda client, name: client.cancel(name),
    "pause": lambda client, name: client.pause(name),
    "resume": lambda client, name: client.resume(name),
    "retry": lambda client, name: client.retry(name),
    "delete": lambda client, name: client.delete(name),
    "wait": lambda client, name: client.wait(name),
    "events": lambda client, name: client.events(name),
    "stored_events": lambda client, name: client.stored_events(name),
    "log_lines": lambda client, name: client.log_lines(name),
    "metrics": lambda client, name: client.metrics(name),
    "export": lambda client, name: client.export(name, "csv", "-"),
    "download": lambda client, name: client.download(name, "-"),
    "delete_checkpoint": lambda client, name: client.delete_checkpoint(name),
    "schedule": lambda client, name: client.schedule(name),
    "steer_schedule": lambda client, name: client.steer_schedule(name, "run"),
    "delete_schedule": lambda client, name: client.delete_schedule(name),
    "steer_worker": lambda client, name: client.steer_worker(name, "drain"),
    "configure_queue": lambda client, name: client.configure_queue(name),
    "preview_dataset": lambda client, name: client.preview_dataset(name),
    "delete_dataset": lambda client, name: client.delete_dataset(name),
    "clone": lambda client, name: client.clone(name),
    "update": lambda client, name: client.update(name, notes="a note"),
    "sweep": lambda client, name: client.sweep(name),
    "steer_sweep": lambda client, name: client.steer_sweep(name, "cancel"),
    "wait_for_sweep": lambda client, name: client.wait_for_sweep(name),
    "webhook": lambda client, name: client.webhook(name),
    "update_webhook": lambda client, name: client.update_webhook(name, {"enabled": True}),
    "delete_webhook": lambda client, name: client.delete_webhook(name),
    "test_webhook": lambda client, name: client.test_webhook(name),
    "webhook_deliveries": lambda client, name: client.webhook_deliveries(name),
    "replay_webhook_delivery": lambda client, name: client.replay_webhook_delivery(name, "msg_1"),
    "set_secret": lambda client, name: client.set_secret(name, "a value"),
    "delete_secret": lambda client, name: client.delete_secret(name),
}
IDS = {"job_id", "checkpoint_id", "schedule_id", "sweep_id", "webhook_id", "name"}
NO_IDS = [
    "",
    ".",
    "..",
    "../keys",
    "a/../keys",
    "/",
    "//",
    "a//b",
    "..\\keys",
    "a\x00",
    "a\n",
    "\x7f",
    "\ud800",
    "x" * 301,
]
ODD_IDS = [
    "%2e%2e",
    "%2e%2e%2fkeys",
    "?x",
    "a?role=admin",
    "#",
    "a#b",
    "a b",
    "a;b",
    "\u00fc",
    "\u2215keys",
    "a%00",
    "...",
    "@",
]


class Sent(Exception):
    """A request would have been sent."""


def paths_of(client: Any) -> list[str]:
    """Record the paths that would be sent, as they stand on the wire."""
    paths: list[str] = []

    def send(request: httpx.Request) -> httpx.Response:
        paths.append(request.url.raw_path.decode())
        raise Sent

    async def send_async(request: httpx.Request) -> httpx.Response:
        return send(request)

    handler = send_async if isinstance(client, AsyncClient) else send
    client._http._transport = httpx.MockTransport(handler)
    return paths


def call(client: Any, method: str, name: str) -> None:
    """Call a method of either client, to its end."""
    done = METHODS[method](client, name)
    if isinstance(done, Iterator):
        next(done)
    elif isinstance(done, AsyncIterator):
        asyncio.run(anext(done))  # type: ignore[arg-type]  # a coroutine, which the type of `anext` hides
    elif inspect.isawaitable(done):
        asyncio.run(done)  # type: ignore[arg-type]  # a coroutine


@pytest.fixture(params=[Client, AsyncClient])
def client(request: pytest.FixtureRequest) -> Any:
    return request.param(URL, KEY)


@pytest.mark.parametrize("method", METHODS)
def test_what_can_be_no_id_is_not_found_and_not_sent(client: Any, method: str) -> None:
    paths = paths_of(client)
    for name in NO_IDS:
        with pytest.raises(NotFound, match="an id is"):
            call(client, method, name)
    assert paths == []


@pytest.mark.parametrize("method", [method for method in METHODS if method != "events"])
def test_an_odd_id_is_one_segment_of_the_path(client: Any, method: str) -> None:
    paths = paths_of(client)
    for name in ["plain", *ODD_IDS]:
        with pytest.raises(Sent):
            call(client, method, name)
    expected, expected_query = paths[0].split("/"), paths[0].partition("?")[2]
    for name, path in zip(ODD_IDS, paths[1:], strict=True):
        segments = [unquote(part) for part in path.split("/")]
        assert segments == [part.replace("plain", name, 1) for part in expected]
        assert path.partition("?")[2] == expected_query


def test_a_worker_s_name_may_have_a_slash(client: Any) -> None:
    paths = paths_of(client)
    with pytest.raises(Sent):
        call(client, "steer_worker", "train/host")
    assert paths == ["/api/workers/train%2Fhost/drain"]
    with pytest.raises(NotFound):
        call(client, "get", "job/x")


def test_every_method_with_an_id_is_tried() -> None:
    takes_an_id = {
        name
        for name, method in inspect.getmembers(Client, inspect.isfunction)
        if not name.startswith("_") and IDS & set(inspect.signature(method).parameters)
    }
    in_a_parameter = {"create_webhook", "checkpoints", "iter_checkpoints", "upload_dataset", "upload_dataset_file"}
    assert takes_an_id - in_a_parameter == set(METHODS)


@pytest.mark.parametrize(
    "job", [{"kind": {1}}, {"x": float("nan")}, {"x": float("inf")}, {"x": "\ud800"}, {"x": b"bytes"}], ids=str
)
def test_a_job_without_a_form_in_json_is_refused(job: dict[str, Any]) -> None:
    with Client(URL, KEY) as client, pytest.raises(InvalidInput, match="no form in JSON"):
        client.submit(job)


@pytest.mark.parametrize("key", ["a\nb", "\u00fc", "x" * 256])
def test_an_idempotency_key_that_cannot_be_sent_is_refused(key: str) -> None:
    with Client(URL, KEY) as client, pytest.raises(InvalidInput, match="idempotency key"):
        client.submit({"kind": "train"}, key)


@pytest.mark.parametrize("filters", [{"text": "\ud800"}, {"text": "x" * 100_000}])
def test_a_filter_that_cannot_be_sent_is_refused(filters: dict[str, str]) -> None:
    with Client(URL, KEY) as client, pytest.raises(InvalidInput, match="parameter"):
        client.list_jobs(**filters)


def test_both_clients_have_the_same_methods_with_the_same_parameters() -> None:
    def shape(cls: type) -> dict[str, list[str]]:
        methods = inspect.getmembers(cls, inspect.isfunction)
        return {name: list(inspect.signature(method).parameters) for name, method in methods if name[0] != "_"}

    assert shape(Client) == shape(AsyncClient)
