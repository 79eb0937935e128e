"""Compute when a schedule is due: cron expressions in a time zone, as instants in UTC. Pure: the clock is the caller's.

Changes of daylight saving time are Debian cron's: a job at a time that does not exist runs right after the gap, one at
a time that exists twice runs once; jobs of every hour or minute follow the clock on the wall.
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

from apt_jobs.errors import InvalidInput

NAMED = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@nightly": "30 3 * * *",  # no zone changes its clock at half past three
    "@weekly": "0 0 * * 1",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
}
MAX_CHARS = 200
MAX_SHOWN_CHARS = 60


def due_after(cron: str, time_zone: str, moment: datetime) -> Iterator[datetime]:
    """Return the due times after `moment` (aware), in order, in UTC. It ends when there are no more within 50 years.

    Raises:
        InvalidInput: the expression or the zone is not known.
    """
    zone = _zone(time_zone)
    expression = _expression(cron)
    try:
        times: Iterator[datetime] = CronSim(expression, moment.astimezone(zone))
    except CronSimError as exc:
        raise InvalidInput(f"{_shown(cron)} is no cron expression ({_lower(exc)}); an example: 30 3 * * 1-5") from exc
    return _increasing(times, moment.astimezone(UTC))


def next_due(cron: str, time_zone: str, moment: datetime) -> datetime | None:
    """Return the first due time after `moment`; None: there is none within 50 years.

    Raises:
        InvalidInput: the expression or the zone is not known.
    """
    return next(due_after(cron, time_zone, moment), None)


def require_due(cron: str, time_zone: str, moment: datetime, count: int = 1) -> list[datetime]:
    """Return the next `count` due times.

    Raises:
        InvalidInput: the expression or the zone is not known, or the expression never comes due.
    """
    times = list(islice(due_after(cron, time_zone, moment), count))
    if not times:
        raise InvalidInput(f"{_shown(cron)} never comes due: there is no such day")
    return times


def _expression(cron: str) -> str:
    text = cron.strip()
    if text.startswith("@"):
        if text.lower() not in NAMED:
            raise InvalidInput(f"{_shown(cron)} is no known name; there are {', '.join(NAMED)}")
        return NAMED[text.lower()]
    fields = text.split()
    if len(fields) != 5 or len(text) > MAX_CHARS:
        raise InvalidInput(
            f"{_shown(cron)} has {len(fields)} fields in {len(text)} characters; a cron expression has 5 "
            f"(minute hour day month weekday) in at most {MAX_CHARS}, or is one of {', '.join(NAMED)}"
        )
    return text


def _zone(time_zone: str) -> ZoneInfo:
    try:
        return ZoneInfo(time_zone)
    except (ZoneInfoNotFoundError, ValueError, OSError) as exc:  # the last two: a path, a folder, a broken name
        raise InvalidInput(f"{_shown(time_zone)} is no IANA time zone; an example: Europe/Berlin") from exc


def _increasing(times: Iterator[datetime], after: datetime) -> Iterator[datetime]:
    """Without the repeats that two times make which a gap moves to the same instant."""
    last = after
    for time in times:
        instant = time.astimezone(UTC)
        if instant > last:
            last = instant
            yield instant


def _shown(text: str) -> str:
    return repr(text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + "...")


def _lower(exc: Exception) -> str:
    return str(exc)[:1].lower() + str(exc)[1:]
