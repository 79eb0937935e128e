"""`apt-jobs webhooks`: who is sent word of what, and what came of it."""

import sys
import time
from typing import Annotated, Any

import typer

from apt_jobs.commands.terminal import AsJson, echo, open_client, print_json, print_table
from apt_jobs.errors import InvalidInput

app = typer.Typer(no_args_is_help=True, help="Webhooks and alerts: who is sent word of what happens.")
WebhookId = Annotated[str, typer.Argument(help="As `apt-jobs webhooks ls` shows it.")]
Events = Annotated[list[str], typer.Option("--event", "-e", help="As job.failed; may be given several times.")]
Filter = Annotated[str | None, typer.Option("--filter", help="Only of jobs that it matches, as of `apt-jobs ps`.")]
QueueAbove = Annotated[int | None, typer.Option(help="Jobs in a queue beyond which queue.too_long is sent.")]
MAX_URL_CHARS = 2_000
TEST_WITHIN_S = 60.0
POLL_S = 0.2


@app.command("ls")
def list_all(as_json: AsJson = False) -> None:
    """List the webhooks."""
    with open_client() as client:
        rows = client.webhooks()
    if as_json:
        print_json(rows)
        return
    table = [[row["id"], row["name"], _state(row), str(row["num_waiting"]), ",".join(row["events"])] for row in rows]
    print_table(["id", "name", "state", "waiting", "events"], table)


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="What you call it.")],
    url: Annotated[str, typer.Argument(help="https://..., or - to read the URL of a chat or mailbox from stdin.")],
    event: Events,
    filter_text: Filter = None,
    queue_above: QueueAbove = None,
    as_json: AsJson = False,
) -> None:
    """Add a webhook and print the key of its signatures, which nothing shows again.

    With `-`, the URL is one of apprise (slack://..., mailtos://...). It holds a password, which no command line shows.
    """
    options: dict[str, Any] = {"filter": filter_text, "queue_above": queue_above}
    if url == "-":
        url, options["kind"] = _secret_url(), "apprise"
    with open_client() as client:
        row = client.create_webhook(name, url, event, **options)
    if as_json:
        print_json(row)
        return
    echo(f"{row['id']} is sent {', '.join(row['events'])}")
    if row["secret"] is not None:
        echo(f"key of its signatures, shown once: {row['secret']}")


@app.command()
def inspect(webhook_id: WebhookId) -> None:
    """Print all about one webhook, as JSON."""
    with open_client() as client:
        print_json(client.webhook(webhook_id))


@app.command()
def enable(webhook_id: WebhookId) -> None:
    """Send again. What happened meanwhile is not sent."""
    with open_client() as client:
        client.update_webhook(webhook_id, {"enabled": True})
    echo(f"{webhook_id} is enabled")


@app.command()
def disable(webhook_id: WebhookId) -> None:
    """Send nothing, and keep nothing to be sent."""
    with open_client() as client:
        client.update_webhook(webhook_id, {"enabled": False})
    echo(f"{webhook_id} is disabled")


@app.command()
def test(webhook_id: WebhookId) -> None:
    """Send a test and wait for what comes of its first try."""
    with open_client() as client:
        delivery = client.test_webhook(webhook_id)
        deadline = time.monotonic() + TEST_WITHIN_S
        while delivery["duration_ms"] is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
            rows = client.webhook_deliveries(webhook_id, limit=200)
            delivery = next((row for row in rows if row["id"] == delivery["id"]), delivery)
    if delivery["state"] != "delivered":
        echo(f"{delivery['id']} was not delivered: {delivery['error'] or 'no try was made yet'}")
        raise typer.Exit(1)
    echo(f"{delivery['id']} was delivered in {delivery['duration_ms']} ms")


@app.command()
def deliveries(
    webhook_id: WebhookId,
    state: Annotated[str | None, typer.Option(help="waiting, delivered or failed")] = None,
    limit: Annotated[int, typer.Option(min=1, max=200, help="Most rows.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List what was sent, newest first."""
    with open_client() as client:
        rows = client.webhook_deliveries(webhook_id, state=state, limit=limit)
    if as_json:
        print_json(rows)
        return
    columns = ["id", "event", "state", "tries", "created", "last failure"]
    table = [
        [row["id"], row["event"], row["state"], str(row["num_tries"]), row["created_at"], row["error"] or ""]
        for row in rows
    ]
    print_table(columns, table)


@app.command()
def replay(webhook_id: WebhookId, delivery_id: str) -> None:
    """Send a message of the log again, with its id."""
    with open_client() as client:
        client.replay_webhook_delivery(webhook_id, delivery_id)
    echo(f"{delivery_id} is sent again")


@app.command()
def delete(webhook_id: WebhookId) -> None:
    """Delete a webhook, with its log and what waits to be sent."""
    with open_client() as client:
        client.delete_webhook(webhook_id)
    echo(f"{webhook_id} is deleted")


def _secret_url() -> str:
    if sys.stdin.isatty():
        url: str = typer.prompt("URL of the chat or mailbox", hide_input=True)
    else:
        url = sys.stdin.read(MAX_URL_CHARS + 3).strip()
    if not url:
        raise InvalidInput("standard input is empty; pipe the URL in, as: apt-jobs webhooks create chat - < file")
    return url


def _state(row: dict[str, Any]) -> str:
    if not row["enabled"]:
        return "disabled"
    return "failing" if row["failing_since_at"] else "enabled"
