"""The port on which a worker is scraped: claims, waits, ends, events, tokens and GPUs, on both databases."""

import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pynvml
import pytest
from prometheus_client.parser import text_string_to_metric_families as read_text

from apt_jobs.db import jobs
from apt_jobs.db.engine import Database
from apt_jobs.db.jobs import Claimed
from apt_jobs.errors import AlreadyRunning
from apt_jobs.jobs.states import JobState
from apt_jobs.workers.metrics import WorkerMetrics
from tests.integration.db.steps import LEASE_S, started, store, submit, trained


@pytest.fixture
def worker(database: Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[WorkerMetrics, str]]:
    """A worker with one GPU that is too hot and measures no power."""

    def unsupported(*_: object) -> Any:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    answers = {
        "HandleByIndex": 0,
        "MemoryInfo": SimpleNamespace(total=2, used=1),
        "Temperature": 91,
        "TemperatureThreshold": 90,
        "TotalEccErrors": 3,
        "RemappedRows": (0, 0, 0, 0),
        "CurrentClocksThrottleReasons": pynvml.nvmlClocksThrottleReasonHwSlowdown,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, f"nvmlDeviceGet{name}", lambda *_, answer=answer: answer)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetPowerUsage", unsupported)
    metrics = WorkerMetrics(database, 0)  # any free port
    metrics.serve("127.0.0.1", lambda: [{"index": 0}])
    yield metrics, f"http://127.0.0.1:{metrics.port}/metrics"
    metrics.close()


def scrape(url: str) -> dict[tuple[str, ...], float]:
    text = httpx.get(url, trust_env=False, timeout=30).text
    found = {}
    for family in read_text(text):
        assert family.documentation
        for sample in family.samples:
            found[(sample.name, *(value for name, value in sorted(sample.labels.items()) if name != "le"))] = (
                sample.value
            )
    return found


def claim(database: Database) -> Claimed:
    with database.write() as session:
        claimed = jobs.claim_next(session, "train", "worker-a", LEASE_S)
    assert claimed is not None
    return claimed


def test_claims_events_and_ends_are_counted(database: Database, worker: tuple[WorkerMetrics, str]) -> None:
    metrics, url = worker
    submit(database)
    claimed = claim(database)
    metrics.note_claimed([claimed])
    store(database, claimed.job, started(), trained(1), trained(2))
    samples = scrape(url)
    assert samples["apt_jobs_claims_total", "train"] == 1
    assert samples["apt_jobs_claim_wait_seconds_count", "train"] == 1
    assert samples["apt_jobs_running_attempts", "train"] == 1
    assert samples["apt_jobs_events_stored_total", "train"] == 3
    assert samples["apt_jobs_training_tokens_per_second", "train"] > 0
    store(database, claimed.job, trained(3))
    with database.write() as session:
        jobs.finish(session, claimed.job.id, 1, JobState.SUCCEEDED, result={"usage": {"completion_tokens": 7}})
    metrics.note_served([claimed])
    samples = scrape(url)
    assert samples["apt_jobs_events_stored_total", "train"] == 5  # the last one and the end
    assert samples["apt_jobs_generated_tokens_total", "train"] == 7
    assert samples["apt_jobs_attempts_ended_total", "succeeded", "train"] == 1
    assert ("apt_jobs_running_attempts", "train") not in samples


def test_gpus_say_what_they_measure(worker: tuple[WorkerMetrics, str]) -> None:
    samples = scrape(worker[1])
    assert samples["apt_jobs_gpu_temperature_celsius", "0"] == 91
    assert samples["apt_jobs_gpu_uncorrected_ecc_errors", "0"] == 3
    assert samples["apt_jobs_gpu_throttled", "0"] == 1
    assert ("apt_jobs_gpu_power_watts", "0") not in samples


def test_a_lost_database_costs_no_scrape(database: Database, worker: tuple[WorkerMetrics, str]) -> None:
    metrics, url = worker
    submit(database)
    claimed = claim(database)
    metrics.note_claimed([claimed])
    metrics._database = Database("postgresql://nobody@127.0.0.1:1/none")
    metrics.note_served([claimed])
    assert scrape(url)["apt_jobs_attempts_ended_total", "unknown", "train"] == 1


def test_a_port_in_use_is_a_clear_error(database: Database, worker: tuple[WorkerMetrics, str]) -> None:
    with pytest.raises(AlreadyRunning, match="choose another --metrics-port"):
        WorkerMetrics(database, worker[0].port).serve("127.0.0.1", list)


def test_who_says_nothing_holds_up_no_other_scrape_for_long(sqlite_database: Database) -> None:
    metrics = WorkerMetrics(sqlite_database, 0)
    metrics.serve("127.0.0.1", list)
    with socket.create_connection(("127.0.0.1", metrics.port)):
        assert scrape(f"http://127.0.0.1:{metrics.port}/metrics")
    metrics.close()
