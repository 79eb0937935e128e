"""Promise 21: what a webhook is to be sent arrives, however often the web process is killed while it delivers."""

import random
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import httpx
from sqlalchemy import func, select

from apt_jobs.db.engine import Database
from apt_jobs.db.models import Job
from apt_jobs.db.webhook_models import Delivery
from tests.faults.forked import Forker
from tests.faults.record import campaign, count
from tests.faults.service import service, until
from tests.faults.test_submissions import is_up, rest
from tests.integration.web.receiver import Answer, Receiver

NUM_JOBS = 12  # that end together in a round
NUM_ROUNDS = count(1, 50)
SETTINGS = {
    "APT_JOBS_WEBHOOK_ALLOW_TARGETS": '["127.0.0.1"]',
    "APT_JOBS_WEBHOOK_TIMEOUT_S": "1.5",  # a try that was lost is repeated after twice that
    "APT_JOBS_WEBHOOK_RETRY_WAIT_S": "0.2",
}


def test_what_is_to_be_sent_arrives_whatever_dies(tmp_path: Path, process_test_url: str, forker: Forker) -> None:
    receiver = Receiver()
    accepted: set[str] = set()  # ids of messages that were answered with a success
    receiver.respond = slowly(accepted)
    try:
        with (
            campaign(21, "kill -9 of web while it delivers") as found,
            service(tmp_path / "s", process_test_url, forker) as running,
        ):
            found.on(running.database.dialect)
            chance = random.Random(found.seed)
            running.start_web(**SETTINGS)
            with rest(running) as client:
                hook = {"name": "x", "url": receiver.url, "events": ["job.cancelled"]}
                receiver.secret = client.post("/api/webhooks", json=hook).raise_for_status().json()["secret"]
                for number in range(NUM_ROUNDS):
                    ids = [running.submit() for _ in range(NUM_JOBS)]
                    cancel = threading.Thread(target=cancel_once, args=(client, ids))
                    cancel.start()
                    if number % 2 == 0:
                        until(lambda number=number: len(set(receiver.ids())) > number * NUM_JOBS)  # type: ignore[misc]  # mypy cannot infer a lambda with a default
                    else:
                        time.sleep(chance.uniform(0.0, 1.0))
                    began = time.monotonic()
                    running.restart("web")
                    cancel.join()
                    found.fault("kill")
                    until(lambda: is_up(client))
                    until(lambda ids=ids: cancel_once(client, ids))  # type: ignore[misc]  # mypy cannot infer a lambda with a default
                    until(lambda: not num_waiting(running.database))
                    found.recovered(time.monotonic() - began)
                    found.trials += NUM_JOBS
            found.violations += violations(running.database, receiver, accepted)
    finally:
        receiver.close()


def slowly(accepted: set[str]) -> Answer:
    """Answer late, so that a kill meets a try, and to every fifth message with an error."""

    def respond(request: BaseHTTPRequestHandler, _receiver: Receiver) -> None:
        time.sleep(0.05)
        status = random.choice([204, 204, 204, 204, 500])
        request.send_response(status)
        request.send_header("content-length", "0")
        request.end_headers()
        if status == 204:
            accepted.add(request.headers["webhook-id"])

    return respond


def cancel_once(client: httpx.Client, ids: list[str]) -> bool:
    try:
        return client.post("/api/jobs/cancel", json={"ids": ids}).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def num_waiting(database: Database) -> int:
    with database.read() as session:
        return session.scalar(select(func.count()).select_from(Delivery).where(Delivery.state == "waiting")) or 0


def violations(database: Database, receiver: Receiver, accepted: set[str]) -> list[str]:
    """Every way in which what arrived is not what happened."""
    with database.read() as session:
        ended = set(session.scalars(select(Job.id).where(Job.state == "cancelled")))
        open_jobs = session.scalars(select(Job.id).where(Job.state != "cancelled")).all()
        rows = {row.id: row for row in session.scalars(select(Delivery))}
    arrived = [message["data"]["job_id"] for message in receiver.messages]
    ids_of_job = Counter(job_id for job_id, _ in set(zip(arrived, receiver.ids(), strict=True)))
    num_lost_tries = len(receiver.ids()) - sum(row.num_tries for row in rows.values())
    found = [f"{job_id}: its end did not arrive" for job_id in sorted(ended - set(arrived))]
    found += [f"{job_id}: an end arrived that did not happen" for job_id in sorted(set(arrived) - ended)]
    found += [f"{job_id}: {number} messages instead of one" for job_id, number in ids_of_job.items() if number != 1]
    found += [f"{row.id}: {row.state}" for row in rows.values() if row.state != "delivered"]
    found += [f"{delivery_id}: was not accepted" for delivery_id in sorted(rows.keys() - accepted)]
    found += [f"{job_id}: was not cancelled" for job_id in open_jobs]
    if num_lost_tries > 0:
        found.append(f"{num_lost_tries} messages arrived that no row counts")
    return found
