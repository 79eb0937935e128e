"""`GET /metrics` as Prometheus reads it: what it says of queues, workers, requests and streams, and to whom."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text
from sqlalchemy import update

from apt_jobs.db.access import Role, create_key
from apt_jobs.db.clock import now_plus
from apt_jobs.db.jobs import insert_job
from apt_jobs.db.models import Job, WorkerRow
from apt_jobs.db.queues import configure_queue
from apt_jobs.db.steering import request_cancel, request_pause
from apt_jobs.db.workers import pause_worker, record_worker, set_drained
from apt_jobs.jobs.spec import TrainSpec, parse_spec
from apt_jobs.web.database_samples import MAX_QUEUES, OTHERS
from apt_jobs.workers.metrics import WorkerMetrics
from tests.integration.web.served import Served, until

pytestmark = pytest.mark.parametrize("served", ["direct"], indirect=True)
ROOT = Path(__file__).resolve().parents[3]
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    base = f"http://127.0.0.1:{served.settings.port}"
    with httpx.Client(base_url=base, trust_env=False, timeout=30) as client:
        yield client


def scrape(served: Served, http: httpx.Client) -> Samples:
    answer = http.get("/metrics", headers=served.headers)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found: Samples = {}
    for family in read_text(answer.text):
        assert family.documentation
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found, f"{key} is there twice"
            found[key] = sample.value
    return found


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


def record(served: Served, name: str, gpus: Sequence[dict[str, Any]] = ()) -> None:
    with served.database.write() as session:
        record_worker(
            session,
            name=name,
            kind="train",
            queues=["train"],
            hostname="here",
            pid=1,
            version="1",
            gpus=list(gpus),
            current_job_id=None,
        )


def test_queues_say_what_waits_runs_and_how_long(served: Served, http: httpx.Client) -> None:
    served.new_job()
    with served.database.write() as session:
        first = insert_job(session, TrainSpec(kind="train")).id
        insert_job(session, TrainSpec(kind="train"))
        later = insert_job(session, TrainSpec(kind="train", queue="later")).id
        session.execute(update(Job).where(Job.id == first).values(not_before_at=now_plus(-100)))
        session.execute(update(Job).where(Job.id == later).values(not_before_at=now_plus(100)))
        configure_queue(session, "later", max_running=None, paused=True)
    samples = scrape(served, http)
    assert samples[key("apt_jobs_jobs", queue="train", state="queued")] == 2
    assert samples[key("apt_jobs_jobs", queue="train", state="running")] == 1
    assert 100 <= samples[key("apt_jobs_queue_wait_seconds", queue="train")] < 200
    assert samples[key("apt_jobs_queue_wait_seconds", queue="later")] == 0
    assert samples[key("apt_jobs_queue_depth", queue="train")] == 2
    assert samples[key("apt_jobs_queue_paused", queue="train")] == 0
    assert samples[key("apt_jobs_queue_paused", queue="later")] == 1
    assert samples[key("apt_jobs_database_up")] == 1


def test_what_ends_is_counted_as_ended(served: Served, http: httpx.Client) -> None:
    with served.database.write() as session:
        for _ in range(3):
            request_cancel(session, insert_job(session, TrainSpec(kind="train")).id)
        request_pause(session, insert_job(session, TrainSpec(kind="train")).id)
    samples = scrape(served, http)
    assert samples[key("apt_jobs_ended_jobs", state="cancelled")] == 3
    assert samples[key("apt_jobs_ended_jobs", state="dead")] == 0
    assert samples[key("apt_jobs_jobs", queue="train", state="paused")] == 1


def test_live_events_and_their_lag_are_counted(served: Served, http: httpx.Client) -> None:
    job_id = served.new_job()
    with served.connected(f"/ws/jobs/{job_id}"):
        served.say_lines(job_id, 5)
        until(lambda: scrape(served, http)[key("apt_jobs_stream_events_total")] >= 5)
    samples = scrape(served, http)
    assert samples[key("apt_jobs_stream_lag_seconds_count")] >= 1
    assert 0 <= samples[key("apt_jobs_stream_lag_seconds_sum")] < 60


def test_gpus_are_shown_by_worker(served: Served, http: httpx.Client) -> None:
    gpu = {"index": 1, "name": "H200", "memory_total_bytes": 10, "memory_used_bytes": 4, "utilization_percent": 50}
    record(served, "a", gpus=[gpu, {"index": 2, "name": "unreadable: it is lost"}])
    samples = scrape(served, http)
    assert samples[key("apt_jobs_gpu_utilization_ratio", worker="a", gpu="1", model="H200")] == 0.5
    assert samples[key("apt_jobs_gpu_memory_used_bytes", worker="a", gpu="1", model="H200")] == 4
    assert len([name for name, _ in samples if name == "apt_jobs_gpu_memory_bytes"]) == 1


def test_workers_are_counted_by_what_they_may_do(served: Served, http: httpx.Client) -> None:
    for name in ("a", "b", "drained", "paused", "lost"):
        record(served, name)
    with served.database.write() as session:
        set_drained(session, "drained", drained=True)
        pause_worker(session, "paused", "no GPU", 60.0)
        session.execute(update(WorkerRow).where(WorkerRow.name == "lost").values(heartbeat_at=now_plus(-3_600)))
    samples = scrape(served, http)
    found = {
        state: samples[key("apt_jobs_workers", kind="train", state=state)]
        for state in ("ready", "draining", "paused", "lost")
    }
    assert found == {"ready": 2, "draining": 1, "paused": 1, "lost": 1}


def test_requests_are_counted_by_route_and_not_by_address(served: Served, http: httpx.Client) -> None:
    for number in range(3):
        http.get(f"/api/jobs/job_{number:020d}", headers=served.headers)
        http.get(f"/nowhere/{number}", headers=served.headers)
    http.get("/api/jobs")
    samples = scrape(served, http)
    counted = {
        labels: value
        for (name, labels), value in samples.items()
        if name == "apt_jobs_http_response_start_seconds_count"
    }
    assert counted[frozenset({"method": "GET", "route": "/api/jobs/{job_id}", "status": "404"}.items())] == 3
    assert counted[frozenset({"method": "GET", "route": "(none)", "status": "404"}.items())] == 3
    assert counted[frozenset({"method": "GET", "route": "(none)", "status": "401"}.items())] == 1


def test_unknown_methods_make_no_series_of_their_own(served: Served, http: httpx.Client) -> None:
    for number in range(3):
        http.request(f"FOO{number}", "/api/jobs", headers=served.headers)
    methods = {dict(labels).get("method") for _, labels in scrape(served, http)}
    assert methods <= {None, "GET", "(other)"}


def test_streams_are_counted_while_they_are_open(served: Served, http: httpx.Client) -> None:
    job_id = served.new_job()

    def watchers() -> float:
        return scrape(served, http)[key("apt_jobs_watchers")]

    with served.connected(f"/ws/jobs/{job_id}"), served.connected(f"/ws/jobs/{job_id}"):
        until(lambda: watchers() == 2)
        assert scrape(served, http)[key("apt_jobs_watched_jobs")] == 1
    until(lambda: watchers() == 0)


def test_many_queues_are_bounded(served: Served, http: httpx.Client) -> None:
    with served.database.write() as session:
        for number in range(MAX_QUEUES + 5):
            for _ in range(1 if number < 5 else 2):
                insert_job(session, parse_spec({"kind": "train", "queue": f"q{number}"}))
    samples = scrape(served, http)
    queues = {dict(labels)["queue"] for name, labels in samples if name == "apt_jobs_jobs"}
    assert len(queues) == MAX_QUEUES + 1
    assert samples[key("apt_jobs_jobs", queue=OTHERS, state="queued")] == 5


def test_openmetrics_is_served_to_who_asks_for_it(served: Served, http: httpx.Client) -> None:
    answer = http.get("/metrics", headers={**served.headers, "accept": "application/openmetrics-text;version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    families = read_openmetrics(answer.text)  # type: ignore[no-untyped-call]
    assert "apt_jobs_build_info" in {family.name for family in families}


def test_dashboard_alerts_and_documentation_name_what_is_scraped(served: Served, http: httpx.Client) -> None:
    served.new_job()
    record(served, "a")
    with served.database.write() as session:
        insert_job(session, TrainSpec(kind="train"))
    http.get("/healthz")
    worker = WorkerMetrics(served.database, 0)
    worker.serve("127.0.0.1", list)
    names = {"apt_jobs_http_response_start_seconds", "apt_jobs_stream_lag_seconds", "apt_jobs_claim_wait_seconds"}
    parts: set[str] = set()  # of histograms, which are documented as a whole
    for answer in (
        http.get("/metrics", headers=served.headers),
        httpx.get(f"http://127.0.0.1:{worker.port}/metrics", trust_env=False),
    ):
        for family in read_text(answer.text):  # also those without a sample yet
            if family.type == "histogram":
                parts |= {f"{family.name}_{part}" for part in ("bucket", "count", "sum", "created")}
            elif not family.name.endswith("_created"):
                names.add(f"{family.name}_total" if family.type == "counter" else family.name)
    worker.close()
    for file in ("examples/grafana_dashboard.json", "examples/prometheus_rules.yml", "docs/how-to/metrics.md"):
        named = set(re.findall(r"\bapt_jobs_[a-z_]+|\bprocess_[a-z_]+\b", (ROOT / file).read_text()))
        assert named - names - parts <= {"process_"}, file
    for expression in re.findall(r'"expr": "(.*)"', (ROOT / "examples/grafana_dashboard.json").read_text()):
        assert any(name in expression for name in names)
    documented = (ROOT / "docs/how-to/metrics.md").read_text()
    assert {name for name in names if name.startswith("apt_jobs_") and name not in documented} - parts <= set()


def test_without_a_key_nothing_is_said_and_a_viewer_may_scrape(served: Served, http: httpx.Client) -> None:
    assert http.get("/metrics").status_code == 401
    with served.database.write() as session:
        viewer = create_key(session, "prometheus", Role.VIEWER)
    assert http.get("/metrics", headers={"authorization": f"Bearer {viewer}"}).status_code == 200
