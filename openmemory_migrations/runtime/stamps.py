"""Whether the env.py that called us will keep the stamp: our work we commit ourselves, the stamp is env.py's to commit.

Measured in every env.py style with Alembic 1.13.3 and 1.20.1: who owns the transaction shows in three private
attributes (docs/hosts.md has the table); whether it ends in a commit, only in what happens afterwards.
"""

from __future__ import annotations

import sys
from typing import Any

import sqlalchemy as sa
from alembic.runtime.migration import MigrationContext
from sqlalchemy.engine import Connection

from .. import log
from ..errors import MigrationError

WATCHED = "openmemory_migrations: stamp"  # in Connection.info while a step's stamp isn't committed
ADVICE = (
    "In env.py run context.run_migrations() inside `with context.begin_transaction():`, and execute nothing on the"
    " connection before context.configure(), or commit it first."
)


def watch(context: MigrationContext, connection: Connection) -> None:
    """Raises MigrationError where nobody will commit; logs a WARNING afterwards where nobody has."""
    owned_by_alembic = context._transaction is not None
    managed = getattr(connection, "_trans_context_manager", None) is not None
    autocommit = connection.connection.dbapi_connection.autocommit  # type: ignore[union-attr]
    if owned_by_alembic or managed or autocommit:
        return
    if not context._in_external_transaction:
        raise MigrationError(
            "env.py neither begins a transaction nor has Alembic begin one, so the stamp would be lost", hint=ADVICE
        )
    _warn_at_rollback(connection)


def _warn_at_rollback(connection: Connection) -> None:
    """Looks at how the transaction ends that was env.py's when the first step began; a failed run may roll back."""
    if connection.info.get(WATCHED):
        return
    connection.info[WATCHED] = True

    def committed(_: Any) -> None:
        connection.info.pop(WATCHED, None)

    def rolled_back(_: Any) -> None:
        # the first end is the one; later ones are of transactions that only read
        if connection.info.pop(WATCHED, None) and sys.exc_info()[0] is None:
            log.warning("the stamp is lost: env.py has rolled back and it is kept only by a commit", hint=ADVICE)

    sa.event.listen(connection, "commit", committed)
    sa.event.listen(connection, "rollback", rolled_back)
