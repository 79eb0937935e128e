"""Series at several levels on real databases: what is read at low resolution equals a slow pass over all steps."""

import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select, update

from apt_jobs.db import steering
from apt_jobs.db.engine import Database
from apt_jobs.db.events import append_events, events_after
from apt_jobs.db.jobs import finish
from apt_jobs.db.models import EventChunk, EventRow, Job, SeriesLevel, SeriesSegment
from apt_jobs.db.series import read as series_read
from apt_jobs.db.series import store as series_store
from apt_jobs.db.series.histories import gradient_export, gradient_overview
from apt_jobs.db.series.migrate import move_old_series
from apt_jobs.db.series.read import read_buckets
from apt_jobs.db.series.summaries import Summary
from apt_jobs.db.series.table import HistoryTable
from apt_jobs.events.codec import encode_payload
from apt_jobs.events.kinds import AnomaliesFound, Event, GradientsRecorded, LayerAnomaly, LayersNamed, Validated
from apt_jobs.jobs.states import JobState
from tests.integration.db.steps import LEASE_S, running, started, store, trained
from tests.integration.db.test_histories import next_attempt

BROKEN = [float("nan"), float("inf"), 0.0]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Levels of 2, 4, 8... steps instead of 16, 256, 4,096: many of them in short histories."""
    for module in (series_store, series_read):
        monkeypatch.setattr(module, "FACTOR", 2)
        monkeypatch.setattr(module, "BLOCK_STEPS", 4)


@dataclass
class Told:
    """What was stored, and what of it counts."""

    counts: list[tuple[int, tuple[float, ...]]] = field(default_factory=list)

    def forget_after(self, step: int) -> None:
        self.counts = [(at, norms) for at, norms in self.counts if at <= step]


@st.composite
def stories(draw: st.DrawFn) -> list[tuple[str, int, int]]:
    """Batches of steps; before each nothing, a roll-back or a resumed attempt, so many steps back."""
    what = st.sampled_from(["go on", "go on", "go on", "roll back", "resume"])
    return draw(st.lists(st.tuples(what, st.integers(0, 30), st.integers(1, 25)), min_size=1, max_size=8))


@given(stories(), st.data())
@settings(
    max_examples=40,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_a_read_from_afar_equals_a_slow_one(
    database: Database, small_blocks: None, story: list[tuple[str, int, int]], data: st.DataObject
) -> None:
    job, told, step = running(database, max_attempts=99), Told(), 0
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    store(database, job, started(), LayersNamed(("a", "b")))
    for what, back, num_steps in story:
        if what != "go on":
            step = max(step - back, 0)
            told.forget_after(step)
        if what == "resume":
            with database.write() as session:  # attempts without a new checkpoint would end the job
                session.execute(update(Job).where(Job.id == job.id).values(num_job_faults_without_checkpoint=0))
            job = next_attempt(database, job)
            store(database, job, started(resumed_from_step=step))
        batch: list[Event] = []
        for _ in range(num_steps):
            step += 1
            norms = _norms(random), _norms(random)
            batch.append(GradientsRecorded(step, norms, (1,) if norms[1] == 0 else ()))
            told.counts.append((step, norms))
        store(database, job, *batch)
    low = data.draw(st.integers(0, step))
    high = data.draw(st.integers(low, step + 3))
    most = data.draw(st.integers(1, 40))
    wanted = [(at, norms) for at, norms in told.counts if low <= at <= high]
    with database.read() as session:
        found = read_buckets(session, job.id, "gradient", most, 2, low, high)
    table = [step for block in HistoryTable(database, job.id).blocks() for step in block.steps_N]
    assert table == [at for at, _ in told.counts]
    assert found.num_buckets <= most
    assert found.num_steps == len(wanted)
    if len(wanted) <= most:
        assert (found.num_steps_B == 1).all()
    begin = 0
    for bucket in range(found.num_buckets):
        end = begin + int(found.num_steps_B[bucket])
        _check_bucket(found, bucket, wanted[begin:end])
        begin = end


def _norms(random: np.random.Generator) -> float:
    return float(random.choice(BROKEN)) if random.random() < 0.1 else float(np.float32(10 ** random.uniform(-12, 25)))


def _check_bucket(found: Summary, bucket: int, steps: list[tuple[int, tuple[float, ...]]]) -> None:
    assert (found.first_steps_B[bucket], found.last_steps_B[bucket]) == (steps[0][0], steps[-1][0])
    for layer in (0, 1):
        norms = np.array([norms[layer] for _, norms in steps], np.float64)
        finite = norms[np.isfinite(norms)]
        assert found.num_nonfinite_BL[bucket, layer] == len(norms) - len(finite)
        assert found.num_anomalous_BL[bucket, layer] == (0 if layer == 0 else int((norms == 0).sum()))
        if len(finite) == 0:
            assert np.isnan(found.min_BL[bucket, layer])
            continue
        assert found.min_BL[bucket, layer] == finite.min()
        assert found.max_BL[bucket, layer] == finite.max()
        if len(norms) > 1:
            assert found.mean_BL[bucket, layer] == pytest.approx(finite.mean(), rel=1e-5)
            assert found.std_BL[bucket, layer] == pytest.approx(finite.std(), rel=1e-4, abs=1e-6 * finite.max())


def test_what_is_read_does_not_grow_with_the_job(database: Database) -> None:
    job = running(database)
    store(database, job, started(), LayersNamed(("a",)))
    for begin in range(1, 9_001, 3_000):
        store(database, job, *[GradientsRecorded(step, (float(step),), ()) for step in range(begin, begin + 3_000)])
    with database.read() as session:
        rows = session.execute(select(SeriesLevel.level, func.count()).group_by(SeriesLevel.level)).all()
        levels = {row[0]: row[1] for row in rows}
        points = gradient_overview(session, job.id, 20).points
    assert levels == {1: 35, 2: 2}
    assert points.num_buckets == 20
    assert (points.first_steps_B[0], points.last_steps_B[-1], points.num_steps) == (1, 9_000, 9_000)
    assert points.mean_BL[:, 0] == pytest.approx((points.first_steps_B + points.last_steps_B) / 2)


def test_anomalies_that_were_rolled_back_do_not_count(database: Database) -> None:
    job = running(database)
    bad = AnomaliesFound(3, (LayerAnomaly("a", "exploding", 9.0),))
    norms = [GradientsRecorded(step, (1.0,), ()) for step in (1, 2, 3)]
    store(database, job, LayersNamed(("a",)), *norms, bad, trained(3), Validated(3, 0, 9.0, is_best=True))
    store(database, job, GradientsRecorded(2, (2.0,), (), num_rollbacks=1), trained(2))
    with database.read() as session:
        export = gradient_export(session, job.id, 10)
        validations = read_buckets(session, job.id, "validation", 10)
    assert [entry["step"] for entry in export["gradient_timeline"]] == [1, 2]
    assert (export["anomaly_summary"], validations.num_steps) == ({}, 0)


def test_a_reader_beside_a_writer_always_sees_whole_batches(database: Database) -> None:
    job = running(database)
    store(database, job, LayersNamed(("a",)))
    done = threading.Event()

    def write() -> None:
        for begin in range(1, 2_001, 50):
            store(database, job, *[GradientsRecorded(step, (1.0,), ()) for step in range(begin, begin + 50)])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = [0]
    while not done.is_set():
        with database.read() as session:
            seen.append(read_buckets(session, job.id, "gradient", 7, 1).num_steps)
    writer.join()
    assert seen == sorted(seen)
    assert all(count % 50 == 0 for count in seen)


def test_deleting_a_job_leaves_nothing_of_its_series(database: Database) -> None:
    job = running(database)
    store(database, job, LayersNamed(("a",)), *[GradientsRecorded(step, (1.0,), ()) for step in range(1, 301)])
    with database.write() as session:
        finish(session, job.id, 1, JobState.SUCCEEDED)
    with database.write() as session:
        steering.delete_job(session, job.id)
    with database.read() as session:
        for table in (EventRow, EventChunk, SeriesSegment, SeriesLevel):
            assert session.scalar(select(func.count()).select_from(table)) == 0


def test_histories_of_an_older_version_get_their_levels(database: Database) -> None:
    job = running(database)
    events: list[Event] = [LayersNamed(("a",))]
    for step in range(1, 601):
        events += [trained(step), GradientsRecorded(step, (step / 8,), ())]
    events.append(Validated(600, 0, 2.0, is_best=True))
    store_as_before(database, job, events)
    with database.read() as session:
        before = events_after(session, job.id, 0, 5_000)
    assert move_old_series(database) == 1
    assert move_old_series(database) == 0
    with database.read() as session:
        assert events_after(session, job.id, 0, 5_000) == before
        assert gradient_export(session, job.id, 10)["total_steps"] == 600
        assert read_buckets(session, job.id, "validation", 10).mean_BL.tolist() == [[2.0]]
        assert session.scalar(select(func.count()).select_from(SeriesLevel)) == 4


def store_as_before(database: Database, job: Job, events: list[Event]) -> None:
    """As versions without series did: a row of the log for each event."""
    with database.write() as session:
        seq = session.scalar(select(Job.last_seq).where(Job.id == job.id)) or 0
        for number, event in enumerate(events, start=seq + 1):
            session.add(
                EventRow(
                    job_id=job.id,
                    seq=number,
                    attempt=job.attempt,
                    kind=event.kind,
                    step=getattr(event, "step", None),
                    at=datetime(2026, 1, 1, 0, 0, number % 60, 5000, UTC),
                    payload=encode_payload(event),
                )
            )
        session.execute(update(Job).where(Job.id == job.id).values(last_seq=seq + len(events)))


def test_the_log_shows_columns_and_rows_in_one_order(database: Database) -> None:
    job = running(database)
    events: list[Event] = []
    for step in range(1, 41):
        broken = GradientsRecorded(step, (0.1, float("nan")), (1,))
        events += [trained(step), broken, Validated(step, 0, 1.0, is_best=False)]
    at = [(datetime(2026, 1, 2, tzinfo=UTC), event) for event in events]
    with database.write() as session:
        append_events(session, job.id, 1, at, LEASE_S)
    with database.read() as session:
        everything = events_after(session, job.id, 2, 1_000)
        pages = [event for after in range(2, 122, 7) for event in events_after(session, job.id, after, 7)]
        gradients = events_after(session, job.id, 30, 5, ["gradient"])
        mixed = events_after(session, job.id, 30, 5, ["validation", "metric"])
    assert [event.payload for event in everything] == [encode_payload(event) for event in events]
    assert [event.seq for event in everything] == list(range(3, 123))
    assert pages == everything
    assert [event.seq for event in gradients] == [31, 34, 37, 40, 43]
    assert [event.seq for event in mixed] == [32, 33, 35, 36, 38]
