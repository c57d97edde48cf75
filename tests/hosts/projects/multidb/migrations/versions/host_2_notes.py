"""notes, in both databases"""

import sqlalchemy as sa
from alembic import op

revision = "host_2"
down_revision = "host_1"
branch_labels = None
depends_on = None


def upgrade(engine_name: str) -> None:
    op.create_table("notes", sa.Column("id", sa.Integer, primary_key=True), sa.Column("text", sa.Text, nullable=False))


def downgrade(engine_name: str) -> None:
    op.drop_table("notes")
