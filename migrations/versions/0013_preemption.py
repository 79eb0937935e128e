"""Note which jobs yield to others, to whom one yields now, and how often it did"""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("is_preemptible", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("jobs", sa.Column("preempted_by", sa.String(length=40), nullable=True))
    op.add_column("jobs", sa.Column("num_preemptions", sa.Integer(), nullable=False, server_default="0"))


def downgrade() -> None:
    op.drop_column("jobs", "num_preemptions")
    op.drop_column("jobs", "preempted_by")
    op.drop_column("jobs", "is_preemptible")
