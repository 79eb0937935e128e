"""Find a text in an index on Postgres as well, and drop what only jobs with a key of their own had"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.drop_column("jobs", "request_sha256")
    if op.get_bind().dialect.name == "postgresql":
        op.create_index("ix_jobs_text", "jobs", ["id", "name", "state", "kind", "queue"])


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.drop_index("ix_jobs_text", "jobs")
    op.add_column("jobs", sa.Column("request_sha256", sa.String(length=64), nullable=True))
