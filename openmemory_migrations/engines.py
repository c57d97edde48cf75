"""Which engine converts: the client, the server by its own code (native), or the server by the trigger's function."""

from __future__ import annotations

from . import citus, native
from .catalog import Extension, Table
from .database import Database
from .errors import MigrationError
from .settings import Settings
from .target import Target


def choose(db: Database, target: Target, settings: Settings, table: Table, extension: Extension | None) -> str:
    """As configured, else the client, on a distributed table the server; in a transaction. Raises MigrationError where
    the configured one can't work."""
    wanted = settings.backfill_engine
    if citus.shards(db, table.oid):
        if wanted not in (None, "server"):
            raise MigrationError(
                f"{target} is distributed by Citus, and OM_BACKFILL_ENGINE={wanted} works on ordinary tables only",
                detail="Where rows are, their vectors have to be made: on each node.",
                hint="Leave OM_BACKFILL_ENGINE unset, or set it to server.",
            )
        return "server"
    if wanted == "native" and (refused := native.refusal(db, extension)):
        raise MigrationError(
            f"OM_BACKFILL_ENGINE=native can't be had: {refused}",
            hint="Leave OM_BACKFILL_ENGINE unset, which converts on the client.",
        )
    return wanted or "client"
