"""Instants as columns: sortable, aware, the same in both dialects' eyes."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Dialect, select
from sqlalchemy.dialects import postgresql, sqlite

from apt_jobs.db.clock import UtcDateTime, now_plus
from apt_jobs.db.engine import Database

SQLITE: Dialect = sqlite.dialect()
POSTGRES: Dialect = postgresql.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy leaves it untyped
INSTANTS = st.datetimes(min_value=datetime(1, 1, 2), max_value=datetime(9999, 12, 30), timezones=st.just(UTC))


@given(INSTANTS, INSTANTS)
def test_sqlite_text_sorts_as_the_instants_do(first: datetime, second: datetime) -> None:
    one, other = (UtcDateTime().process_bind_param(moment, SQLITE) for moment in (first, second))
    assert len(one) == len(other) == 23
    assert one == other or (one < other) == (first < second)


@given(INSTANTS)
def test_an_instant_comes_back_in_milliseconds(moment: datetime) -> None:
    stored = UtcDateTime().process_bind_param(moment, SQLITE)
    back = UtcDateTime().process_result_value(stored, SQLITE)
    assert back is not None
    assert timedelta(0) <= moment - back < timedelta(milliseconds=1)


@pytest.mark.parametrize("dialect", [SQLITE, POSTGRES])
def test_an_instant_without_a_time_zone_is_refused(dialect: Dialect) -> None:
    with pytest.raises(ValueError, match="no time zone"):
        UtcDateTime().process_bind_param(datetime(2026, 1, 1), dialect)


def test_other_time_zones_become_utc() -> None:
    moment = datetime(2026, 1, 1, 7, tzinfo=timezone(timedelta(hours=8)))
    assert UtcDateTime().process_bind_param(moment, SQLITE) == "2025-12-31 23:00:00.000"
    assert UtcDateTime().process_bind_param(moment, POSTGRES) == datetime(2025, 12, 31, 23, tzinfo=UTC)
    assert UtcDateTime().process_result_value(moment, POSTGRES) == moment
    assert UtcDateTime().process_bind_param(None, SQLITE) is None
    assert UtcDateTime().process_result_value(None, POSTGRES) is None


def test_the_clock_is_the_databases_own_in_each_dialect() -> None:
    assert "clock_timestamp()" in str(now_plus(5).compile(dialect=POSTGRES))
    assert "strftime('%Y-%m-%d %H:%M:%f', 'now'" in str(now_plus(5).compile(dialect=SQLITE))


@pytest.mark.parametrize("seconds", [0, 0.25, -0.25, 90, -3600, 1e-7, 86_400 * 365])
def test_now_plus_is_so_far_from_now(sqlite_database: Database, seconds: float) -> None:
    with sqlite_database.read() as session:
        before = datetime.now(UTC)
        moment = session.scalar(select(now_plus(seconds)))
        after = datetime.now(UTC)
    assert moment is not None
    slack = timedelta(milliseconds=2)
    assert before - slack <= moment - timedelta(seconds=seconds) <= after + slack
