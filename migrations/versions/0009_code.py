"""Remember which packed code a job brings"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("code_sha256", sa.String(length=64), nullable=True))
    op.create_index("ix_jobs_code_sha256", "jobs", ["code_sha256"])


def downgrade() -> None:
    op.drop_index("ix_jobs_code_sha256", "jobs")
    op.drop_column("jobs", "code_sha256")
