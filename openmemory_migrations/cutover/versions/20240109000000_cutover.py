"""cutover: v_vector becomes v, or v goes; a lineage of its own"""

from openmemory_migrations import ops

revision = "om_20240109_cutover"
down_revision = None
branch_labels = None
depends_on = None


def upgrade(**kw: object) -> None:
    ops.upgrade_cutover()


def downgrade(**kw: object) -> None:
    ops.downgrade_cutover()
