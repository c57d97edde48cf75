"""openmemory backfill: the bytes into the vector column, in batches

Revision ID: om_20240107_backfill
Revises: om_20240107_pgvector

"""

from openmemory_migrations import ops

revision = "om_20240107_backfill"
down_revision = "om_20240107_pgvector"
branch_labels = None
depends_on = None


def upgrade(**kw: object) -> None:
    ops.upgrade_backfill()


def downgrade(**kw: object) -> None:
    ops.downgrade_backfill()
