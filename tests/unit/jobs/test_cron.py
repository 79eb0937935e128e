"""Due times across zones and both changes of the clock, and what is no schedule at all."""

from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt_jobs.errors import InvalidInput
from apt_jobs.jobs.cron import NAMED, due_after, next_due, require_due

MONDAY = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)


def due(cron: str, zone: str, after: datetime, count: int) -> list[str]:
    return [f"{time:%d %H:%M}" for time in islice(due_after(cron, zone, after), count)]


def test_a_night_in_berlin_is_another_instant_in_summer() -> None:
    assert due("30 3 * * *", "Europe/Berlin", datetime(2026, 3, 27, tzinfo=UTC), 4) == [
        "27 02:30",
        "28 02:30",
        "29 01:30",
        "30 01:30",
    ]


def test_a_time_in_the_gap_of_spring_runs_once_right_after_it() -> None:
    # Berlin, 29 March 2026: 02:00 becomes 03:00
    assert due("30 2 * * *", "Europe/Berlin", datetime(2026, 3, 28, 12, tzinfo=UTC), 2) == ["29 01:00", "30 00:30"]


def test_a_time_that_autumn_repeats_runs_once() -> None:
    # Berlin, 25 October 2026: 03:00 becomes 02:00
    assert due("30 2 * * *", "Europe/Berlin", datetime(2026, 10, 24, 12, tzinfo=UTC), 2) == ["25 00:30", "26 01:30"]


def test_every_hour_stays_every_hour_through_both_changes() -> None:
    for change in (datetime(2026, 3, 28, 20, tzinfo=UTC), datetime(2026, 10, 24, 20, tzinfo=UTC)):
        times = list(islice(due_after("@hourly", "Europe/Berlin", change), 12))
        assert {later - earlier for earlier, later in pairwise(times)} == {timedelta(hours=1)}


@pytest.mark.parametrize("name", NAMED)
def test_names_come_due_in_capitals_too(name: str) -> None:
    assert require_due(name.upper(), "UTC", MONDAY) == require_due(NAMED[name], "UTC", MONDAY)


@given(
    st.sampled_from(["*/7 * * * *", "30 2 * * *", "0 0 1 * *", "15 1-3 * * *", "@nightly"]),
    st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu"]),
    st.datetimes(datetime(2025, 1, 1), datetime(2030, 1, 1)),
)
def test_due_times_only_grow_and_come_after_the_moment(cron: str, zone: str, moment: datetime) -> None:
    after = moment.replace(tzinfo=UTC)
    times = [after, *islice(due_after(cron, zone, after), 5)]
    assert all(earlier < later for earlier, later in pairwise(times))
    assert next_due(cron, zone, times[1]) == times[2]


@pytest.mark.parametrize(
    ("cron", "words"),
    [
        ("", "0 fields"),
        ("* " * 60, "60 fields"),
        ("* * * *", "4 fields"),
        ("0 0 0 * * *", "6 fields"),
        ("61 * * * *", "bad minute"),
        ("0 0 30 2 *", "bad day-of-month"),
        ("0 0 */40 * 1#5", "never comes due"),
        ("@fortnightly", "no known name"),
        ("0," * 300 + "0 * * * *", "609 characters"),
        ("0 0 * * \u0661", "bad day-of-week"),
    ],
)
def test_what_is_no_cron_expression_is_refused_by_name(cron: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        require_due(cron, "UTC", MONDAY)


@pytest.mark.parametrize("zone", ["", "Mars/Olympus", "../../etc/passwd", "/etc/passwd", "Europe", "UTC\0", "x" * 5000])
def test_an_unknown_zone_is_refused_by_name(zone: str) -> None:
    with pytest.raises(InvalidInput, match="is no IANA time zone"):
        require_due("@daily", zone, MONDAY)
