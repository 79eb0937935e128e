"""How long something made on the command line lives: `12h`, `30d`, or a date."""

import re
from datetime import UTC, datetime, timedelta

import typer

_LIFETIME = re.compile(r"(\d{1,6})\s*(m|h|d|w)")
_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def parse_expiry(text: str) -> datetime:
    """Return the instant that `text` names, in UTC.

    Raises:
        typer.BadParameter: it is none, or is over.
    """
    now = datetime.now(UTC)
    if (found := _LIFETIME.fullmatch(text.strip().lower())) is not None:
        expires_at = now + timedelta(**{_UNITS[found[2]]: int(found[1])})
    else:
        try:
            expires_at = datetime.fromisoformat(text.strip())
        except ValueError:
            raise typer.BadParameter(f"{text!r} is no time; write 12h, 30d, 4w, or a date as 2027-01-31") from None
        expires_at = expires_at.astimezone(UTC) if expires_at.tzinfo else expires_at.replace(tzinfo=UTC)
    if expires_at <= now:
        raise typer.BadParameter(f"{text!r} is over already; a key has to live for a while")
    return expires_at
