"""${message}"""

from openmemory_migrations import ops

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade(**kw: object) -> None:
    ${upgrades if upgrades else "raise NotImplementedError"}


def downgrade(**kw: object) -> None:
    ${downgrades if downgrades else "raise NotImplementedError"}
