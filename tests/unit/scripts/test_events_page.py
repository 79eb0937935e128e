"""docs/reference/events.md says what the types say."""

from dataclasses import fields

from apt_jobs.events.kinds import EVENT_TYPES
from scripts.events_page import document


def test_every_event_has_a_section_with_every_field() -> None:
    page = document()
    for cls in EVENT_TYPES:
        section = page.partition(f"## `{cls.kind}`")[2].partition("\n## ")[0]
        assert all(f"| `{field.name}` |" in section for field in fields(cls))
