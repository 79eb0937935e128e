"""What attempts ran with, as their rows note it."""

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from apt_jobs.db.models import Attempt
from apt_jobs.jobs.attempt_facts import AttemptFacts


def record_facts(session: Session, job_id: str, attempt: int, facts: AttemptFacts) -> None:
    """Note what an attempt runs with. It is its own row alone, so no lease is asked for."""
    session.execute(
        update(Attempt)
        .where(Attempt.job_id == job_id, Attempt.attempt == attempt)
        .values(facts=facts.model_dump(mode="json"))
        .execution_options(synchronize_session=False)
    )


def last_facts(session: Session, job_id: str) -> AttemptFacts | None:
    """Return what the last attempt of a job that noted it ran with."""
    query = select(Attempt.facts).where(Attempt.job_id == job_id).order_by(Attempt.attempt.desc())
    found = next((facts for facts in session.scalars(query) if facts), None)
    return None if found is None else AttemptFacts.model_validate(found)
