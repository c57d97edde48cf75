"""Which engine converts: the server by its own code (native), the client, or the server by the trigger's function."""

from __future__ import annotations

from dataclasses import dataclass

from ..db import citus
from ..db.catalog import Extension
from ..db.context import TableContext
from ..encoding import native
from ..errors import MigrationError
from ..sql import quote

DOES = {"native": "the server's own code converts", "client": "the client converts", "server": "the server converts"}


@dataclass(frozen=True)
class Chosen:
    """`why` is None where it was configured."""

    name: str
    why: str | None = None

    def __str__(self) -> str:
        return f"{DOES[self.name]} (OM_BACKFILL_ENGINE={self.name})" + (f": {self.why}" if self.why else "")


def choose(ctx: TableContext, extension: Extension | None) -> Chosen:
    """As configured, else the server's own code where it can be had, else the client; on a distributed table the
    server. In a transaction. Raises MigrationError where the configured one can't work."""
    wanted = ctx.settings.backfill_engine
    if citus.shards(ctx.db, ctx.table.oid):
        if wanted not in (None, "server"):
            raise MigrationError(
                f"{ctx.target} is distributed by Citus, and OM_BACKFILL_ENGINE={wanted} works on ordinary tables only",
                detail="Where rows are, their vectors have to be made: on each node.",
                hint="Leave OM_BACKFILL_ENGINE unset, or set it to server.",
            )
        return Chosen("server", None if wanted else "the table is distributed by Citus")
    if wanted in ("client", "server"):
        return Chosen(wanted)
    refused = native.refusal(ctx.db, extension)
    if not wanted:
        role = quote(ctx.db.value("SELECT current_user"))
        return Chosen("client", refused) if refused else Chosen("native", f"role {role} is a superuser")
    if refused:
        raise MigrationError(
            f"OM_BACKFILL_ENGINE=native can't be had: {refused}",
            hint="Leave OM_BACKFILL_ENGINE unset, which converts on the client.",
        )
    return Chosen("native")


def require_temporary(ctx: TableContext, chosen: Chosen) -> None:
    """Raises MigrationError where this role can't make what the engine needs for a run; in a transaction."""
    db = ctx.db
    if chosen.name == "native" or citus.shards(db, ctx.table.oid):
        return
    if not db.value("SELECT has_database_privilege(current_database(), 'TEMPORARY')"):
        role, name = quote(db.value("SELECT current_user")), quote(db.value("SELECT current_database()"))
        raise MigrationError(
            f"role {role} may not create temporary tables in database {name}",
            detail="The backfill writes through one, or has its function among them.",
            hint=f"GRANT TEMPORARY ON DATABASE {name} TO {role};",
        )
