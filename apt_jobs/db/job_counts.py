"""How many jobs each queue has in each state, without counting them.

Triggers of the table `jobs` write what changes, in the same transaction, whoever changes it: the sum cannot drift. They
only add rows, so that two transactions never wait for each other; `fold_counts` adds the rows up now and then.
"""

from collections.abc import Collection

from sqlalchemy import BigInteger, Connection, Identity, Integer, String, delete, func, insert, select, text
from sqlalchemy.orm import Mapped, Session, mapped_column

from apt_jobs.db.models import Base, Job
from apt_jobs.jobs.states import JobState

MAX_FOLDED = 10_000  # rows at a time
FOLD_FROM = 500  # rows: fewer are read as quickly as they are
_TRIGGERS = ("job_counts_of_insert", "job_counts_of_update", "job_counts_of_delete")
_ADD = "INSERT INTO job_counts (queue, state, num) VALUES ({row}.queue, {row}.state, {num});"
_MOVED = "OLD.queue <> NEW.queue OR OLD.state <> NEW.state"


class JobCount(Base):
    """A part of the number of jobs of a queue in a state; all rows of both add up to it."""

    __tablename__ = "job_counts"

    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), Identity(), primary_key=True)
    queue: Mapped[str] = mapped_column(String(100))
    state: Mapped[str] = mapped_column(String(20))
    num: Mapped[int] = mapped_column(BigInteger)


def job_counts(session: Session) -> dict[str, dict[str, int]]:
    """Return the number of jobs by queue and state, those that have none left out."""
    total = func.sum(JobCount.num)
    query = select(JobCount.queue, JobCount.state, total).group_by(JobCount.queue, JobCount.state).having(total > 0)
    counts: dict[str, dict[str, int]] = {}
    for queue, state, number in session.execute(query):
        counts.setdefault(queue, {})[state] = int(number)
    return counts


def num_in_states(session: Session, states: Collection[JobState]) -> int:
    """Return how many jobs are in one of these states, of all queues."""
    return int(session.scalar(select(func.sum(JobCount.num)).where(JobCount.state.in_(states))) or 0)


def needs_fold(session: Session) -> bool:
    """Return whether there are so many rows that `fold_counts` is worth a transaction."""
    some = select(JobCount.id).limit(FOLD_FROM).subquery()
    return (session.scalar(select(func.count()).select_from(some)) or 0) >= FOLD_FROM


def fold_counts(session: Session) -> int:
    """Replace up to `MAX_FOLDED` rows by their sums; returns how many. Any process may call it at any time."""
    old = select(JobCount.id).order_by(JobCount.id).limit(MAX_FOLDED).with_for_update(skip_locked=True)
    rows = session.execute(
        delete(JobCount)
        .where(JobCount.id.in_(old.scalar_subquery()))
        .returning(JobCount.queue, JobCount.state, JobCount.num)
        .execution_options(synchronize_session=False)
    ).all()
    sums: dict[tuple[str, str], int] = {}
    for queue, state, num in rows:
        sums[queue, state] = sums.get((queue, state), 0) + num
    found = [{"queue": queue, "state": state, "num": num} for (queue, state), num in sums.items() if num]
    if found:
        session.execute(insert(JobCount), found)
    return len(rows)


def install_job_counts(connection: Connection) -> None:
    """Add the triggers where they are missing, and count all jobs: a rebuilt table of SQLite has lost them.

    A part of the transaction that migrates.
    """
    if _num_triggers(connection) == len(_TRIGGERS):
        return
    is_sqlite = connection.dialect.name == "sqlite"
    for statement in _sqlite_triggers() if is_sqlite else _postgres_triggers():
        connection.execute(text(statement))
    connection.execute(delete(JobCount))
    counted = select(Job.queue, Job.state, func.count()).group_by(Job.queue, Job.state)
    connection.execute(insert(JobCount).from_select(["queue", "state", "num"], counted))


def _num_triggers(connection: Connection) -> int:
    names = ", ".join(f"'{name}'" for name in _TRIGGERS)
    if connection.dialect.name == "sqlite":
        query = f"SELECT count(*) FROM sqlite_master WHERE type = 'trigger' AND name IN ({names})"  # noqa: S608  # ours
    else:
        query = f"SELECT count(*) FROM pg_trigger WHERE tgrelid = 'jobs'::regclass AND tgname IN ({names})"  # noqa: S608
    return connection.scalar(text(query)) or 0


def _sqlite_triggers() -> list[str]:
    added, removed = _ADD.format(row="NEW", num=1), _ADD.format(row="OLD", num=-1)
    on_insert, on_update, on_delete = _TRIGGERS
    return [
        *(f"DROP TRIGGER IF EXISTS {name}" for name in _TRIGGERS),
        f"CREATE TRIGGER {on_insert} AFTER INSERT ON jobs BEGIN {added} END",
        f"CREATE TRIGGER {on_update} AFTER UPDATE OF queue, state ON jobs WHEN {_MOVED} BEGIN {removed} {added} END",
        f"CREATE TRIGGER {on_delete} AFTER DELETE ON jobs BEGIN {removed} END",
    ]


def _postgres_triggers() -> list[str]:
    added, removed = _ADD.format(row="NEW", num=1), _ADD.format(row="OLD", num=-1)
    on_insert, on_update, on_delete = _TRIGGERS
    call = "FOR EACH ROW {when} EXECUTE FUNCTION count_jobs()"
    return [
        "LOCK TABLE jobs IN SHARE ROW EXCLUSIVE MODE",  # nobody changes a job between the triggers and the count
        f"""
        CREATE OR REPLACE FUNCTION count_jobs() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
          IF TG_OP <> 'INSERT' THEN {removed} END IF;
          IF TG_OP <> 'DELETE' THEN {added} END IF;
          RETURN NULL;
        END $$
        """,
        *(f"DROP TRIGGER IF EXISTS {name} ON jobs" for name in _TRIGGERS),
        f"CREATE TRIGGER {on_insert} AFTER INSERT ON jobs {call.format(when='')}",
        f"CREATE TRIGGER {on_update} AFTER UPDATE OF queue, state ON jobs {call.format(when=f'WHEN ({_MOVED})')}",
        f"CREATE TRIGGER {on_delete} AFTER DELETE ON jobs {call.format(when='')}",
    ]
