"""pgvector: extension, column v_vector, sync trigger"""

from openmemory_migrations import ops

revision = "om_20240107_pgvector"
down_revision = None
branch_labels = None
depends_on = None


def upgrade(**kw: object) -> None:
    ops.upgrade_expand()


def downgrade(**kw: object) -> None:
    ops.downgrade_expand()
