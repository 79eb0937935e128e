"""Small rules of the database layer that need no database."""

from apt_jobs.db.access import Role
from apt_jobs.db.transitions import RETRY_PAUSE_MAX_S, retry_pause_s


def test_the_pause_between_attempts_doubles_up_to_a_bound() -> None:
    assert [retry_pause_s(number) for number in (0, 1, 2, 3)] == [5.0, 5.0, 10.0, 20.0]
    assert retry_pause_s(10_000) == RETRY_PAUSE_MAX_S


def test_a_role_includes_those_before_it() -> None:
    included = [(role, other) for role in Role for other in Role if role.includes(other)]
    assert included == [
        (Role.VIEWER, Role.VIEWER),
        (Role.SUBMITTER, Role.VIEWER),
        (Role.SUBMITTER, Role.SUBMITTER),
        (Role.ADMIN, Role.VIEWER),
        (Role.ADMIN, Role.SUBMITTER),
        (Role.ADMIN, Role.ADMIN),
    ]
