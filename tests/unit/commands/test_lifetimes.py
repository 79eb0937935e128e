"""When a key ends, as it is written on the command line."""

from datetime import UTC, datetime, timedelta

import pytest
import typer

from apt_jobs.commands.lifetimes import parse_expiry


@pytest.mark.parametrize(
    ("text", "lifetime"),
    [
        ("90m", timedelta(minutes=90)),
        ("12h", timedelta(hours=12)),
        (" 30D ", timedelta(days=30)),
        ("4 w", timedelta(weeks=4)),
    ],
)
def test_a_lifetime_counts_from_now(text: str, lifetime: timedelta) -> None:
    assert abs(parse_expiry(text) - datetime.now(UTC) - lifetime) < timedelta(minutes=1)


def test_a_date_is_taken_in_utc() -> None:
    assert parse_expiry("2999-01-31") == datetime(2999, 1, 31, tzinfo=UTC)
    assert parse_expiry("2999-01-31T12:00:00+02:00") == datetime(2999, 1, 31, 10, tzinfo=UTC)


@pytest.mark.parametrize("text", ["", "0d", "-1d", "1y", "soon", "2020-01-01", "999999999d", "1.5d", "30 days"])
def test_what_is_no_time_to_come_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_expiry(text)
