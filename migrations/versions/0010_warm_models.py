"""Say which models a generation worker has in memory"""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("workers", sa.Column("warm_models", sa.JSON(), nullable=True))


def downgrade() -> None:
    op.drop_column("workers", "warm_models")
