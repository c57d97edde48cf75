"""openmemory expand: extension, vector column, sync trigger

Revision ID: om_20240107_pgvector
Revises: host_2

"""

from openmemory_migrations import ops

revision = "om_20240107_pgvector"
down_revision = "host_2"
branch_labels = None
depends_on = None


def upgrade(**kw: object) -> None:
    ops.upgrade_expand()


def downgrade(**kw: object) -> None:
    ops.downgrade_expand()
