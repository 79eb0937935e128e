"""Which secrets a job may name, and how text is shown without them."""

import re
from collections.abc import Iterable

MIN_SECRET_CHARS, MAX_SECRET_CHARS = 8, 16_384
MAX_SECRETS_OF_JOB = 32
MASK = "***"


class Masker:
    """Replaces values in text. Of a value of several lines, each line that is long enough is one."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        """Keep the values, the longest first: one may be a part of another."""
        words = {line.strip() for value in values for line in (value, *value.splitlines())}
        hidden = sorted((word for word in words if len(word) >= MIN_SECRET_CHARS), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, hidden))) if hidden else None

    def mask(self, text: str) -> str:
        """Return the text with every value replaced."""
        return text if self._pattern is None else self._pattern.sub(MASK, text)
