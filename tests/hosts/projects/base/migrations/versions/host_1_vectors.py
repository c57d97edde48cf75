"""the table that OpenMemory writes"""

import sqlalchemy as sa
from alembic import op

revision = "host_1"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "openmemory_vectors",
        sa.Column("id", sa.Uuid, primary_key=True),
        sa.Column("sector", sa.Text, primary_key=True),
        sa.Column("user_id", sa.Text),
        sa.Column("v", sa.LargeBinary),
        sa.Column("dim", sa.Integer, nullable=False),
    )
    op.create_index("openmemory_vectors_user_idx", "openmemory_vectors", ["user_id"])


def downgrade() -> None:
    op.drop_table("openmemory_vectors")
