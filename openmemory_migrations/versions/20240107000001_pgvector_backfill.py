"""pgvector backfill: v to v_vector"""

from openmemory_migrations import ops

revision = "om_20240107_backfill"
down_revision = "om_20240107_pgvector"
branch_labels = None
depends_on = None


def upgrade(**kw: object) -> None:
    ops.upgrade_backfill()


def downgrade(**kw: object) -> None:
    ops.downgrade_backfill()
