"""What is going on beside a migration, at this moment: who holds it up, and whether there is a connection for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..db import catalog, partitions
from ..db.catalog import Table
from ..db.context import Context
from ..db.database import APPLICATION_NAME, Database
from ..finding import Finding
from ..index import build_progress
from ..settings import Settings
from ..sql import blocks, literal, quote

BLOCKS = blocks("preflight")

OLD = 5  # seconds that a transaction has been open
SHOWN = 5

PREPARED = """
SELECT gid, owner, prepared FROM pg_catalog.pg_prepared_xacts WHERE database = current_database() ORDER BY prepared
"""


@dataclass(frozen=True)
class Connections:
    """`free` as this role may have them, the one that asks included; `needed` by a run, while it is at its most."""

    free: int
    needed: int


def in_the_way(ctx: Context, table: Table | None) -> Iterator[Finding]:
    """Sessions and prepared transactions that a step would wait for, as far as this role sees them."""
    db = ctx.db
    if not catalog.sees_others(db):
        role = quote(db.value("SELECT current_user"))
        yield Finding(
            "notice",
            "activity-hidden",
            f"role {role} may not see what the sessions of other roles are doing",
            "Whether their transactions are old can't be told.",
            f"GRANT pg_read_all_stats TO {role};",
        )
    tables = [part.oid for part in partitions.parts(db, table.oid)] if table else []
    old = {"seconds": OLD, "ours": APPLICATION_NAME + "%", "tables": tables}
    for pid, name, role, state, since in db.rows(BLOCKS.transactions, old, most=SHOWN):
        yield Finding(
            "warning",
            "old-transaction",
            f'process {pid} ("{name}", role {role}, {state}) has had a transaction open since'
            f" {since:%Y-%m-%d %H:%M:%S %Z}",
            "The steps, and CREATE INDEX CONCURRENTLY, wait for its end; VACUUM can't clean up behind the backfill.",
            f"SELECT pg_terminate_backend({pid}); unless it ends by itself.",
        )
    for gid, owner, since in db.rows(PREPARED):
        yield Finding(
            "warning",
            "prepared-transaction",
            f"transaction {literal(gid)} of role {quote(owner)} has been prepared since {since:%Y-%m-%d %H:%M:%S %Z}",
            "CREATE INDEX CONCURRENTLY waits for it for ever, and a restart doesn't end it.",
            f"ROLLBACK PREPARED {literal(gid)}; or COMMIT PREPARED {literal(gid)};",
        )
    if table is None:
        return
    if holders := db.holders(table.oid):
        yield Finding(
            "notice",
            "locks",
            f"{ctx.target} is in use, and adding a column waits until no transaction has read or written it",
            f"Locks are held by {'; '.join(holders)}.",
            "Nothing to do if they are short: it is tried 30 times. Else raise OM_LOCK_TIMEOUT_MS in a quiet hour.",
        )
    for pid, phase, name in db.rows(BLOCKS.vacuums, {"tables": tables}):
        yield Finding(
            "notice",
            "vacuum",
            f"process {pid} vacuums {name} ({phase})",
            "It gives way to the steps unless it was started by hand or against wraparound.",
        )
    if phase := build_progress.phase(db.connection, tables):
        yield Finding(
            "warning",
            "index-build",
            f"an index on {ctx.target} is being built: {phase}",
            "Two at a time wait for each other; the column can't be added meanwhile.",
            "Run this again when it is done.",
        )


def connections(db: Database, settings: Settings) -> Connections:
    most, used, reserved, superuser, of_role, role_used, of_database, database_used = db.rows(BLOCKS.connections)[0]
    free = [most - used - (0 if superuser else reserved)]
    if not superuser:
        free += [limit - now for limit, now in ((of_role, role_used), (of_database, database_used)) if limit >= 0]
    # three beside the one at work; further workers don't come through a pooler
    needed = 4 if db.pooled else 4 + 2 * (settings.backfill_workers - 1)
    return Connections(min(free) + 1, needed)


def too_few(found: Connections) -> Iterator[Finding]:
    if found.free < found.needed:
        yield Finding(
            "warning",
            "connections",
            f"{max(0, found.free):,} connections are free, a run opens up to {found.needed:,}",
            "Of max_connections, and of the CONNECTION LIMIT of role and database; reserved ones are not this role's.",
            "Set OM_BACKFILL_WORKERS=1, close what is idle, or raise the limit; three are the least.",
        )


def through_pooler(db: Database) -> Iterator[Finding]:
    if db.pooled:
        yield Finding(
            "notice",
            "pooler",
            "a pooler such as PgBouncer is in between",
            "CREATE INDEX CONCURRENTLY runs with the timeouts and memory of the role, and the backfill reads and writes"
            " in turn.",
            "Connect directly for the migration if you can.",
        )
