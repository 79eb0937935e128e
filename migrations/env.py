"""Alembic's entry: migrations run on the connection that `apt_jobs.db.upgrade` hands over."""

from alembic import context

from apt_jobs.db.models import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,
    compare_type=True,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
