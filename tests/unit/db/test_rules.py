"""Small rules of the database layer that need no database."""

from apt_jobs.db.access import Role


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
