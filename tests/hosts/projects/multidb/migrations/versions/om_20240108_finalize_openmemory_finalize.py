"""openmemory finalize: checks, index, advice

Revision ID: om_20240108_finalize
Revises: om_20240107_backfill

"""

from openmemory_migrations import ops

revision = "om_20240108_finalize"
down_revision = "om_20240107_backfill"
branch_labels = None
depends_on = None


def upgrade(**kw: object) -> None:
    if kw.get("engine_name") == "engine1":
        ops.upgrade_finalize()


def downgrade(**kw: object) -> None:
    if kw.get("engine_name") == "engine1":
        ops.downgrade_finalize()
