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
from ..target import literal, quote

OLD = 5  # seconds that a transaction has been open
SHOWN = 5

# with a snapshot or a write that CONCURRENTLY waits for, or a lock on the table; a run of ours gives way by itself
TRANSACTIONS = """
SELECT pid, application_name, usename, state, xact_start FROM pg_catalog.pg_stat_activity AS a
WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
  AND application_name NOT LIKE :ours
  AND (backend_xid IS NOT NULL OR backend_xmin IS NOT NULL
       OR EXISTS (SELECT FROM pg_catalog.pg_locks l WHERE l.pid = a.pid AND l.relation = ANY (:tables)))
  AND xact_start < clock_timestamp() - CAST(:seconds AS integer) * interval '1 second'
ORDER BY xact_start LIMIT {most}
"""
PREPARED = """
SELECT gid, owner, prepared FROM pg_catalog.pg_prepared_xacts WHERE database = current_database() ORDER BY prepared
"""
VACUUMS = """
SELECT p.pid, p.phase, CAST(CAST(p.relid AS regclass) AS text) FROM pg_catalog.pg_stat_progress_vacuum p
WHERE p.relid = ANY (:tables) AND p.datname = current_database() ORDER BY 1
"""
# the sums of pg_stat_database are for everybody to see; 16 brought a second reserve, which isn't ours either
CONNECTIONS = """
SELECT CAST(current_setting('max_connections') AS integer),
       CAST((SELECT sum(numbackends) FROM pg_catalog.pg_stat_database) AS integer),
       CAST((SELECT sum(CAST(setting AS integer)) FROM pg_catalog.pg_settings
             WHERE name IN ('superuser_reserved_connections', 'reserved_connections')) AS integer),
       r.rolsuper, r.rolconnlimit,
       CAST((SELECT count(*) FROM pg_catalog.pg_stat_activity a WHERE a.usesysid = r.oid) AS integer),
       d.datconnlimit, pg_catalog.pg_stat_get_db_numbackends(d.oid)
FROM pg_catalog.pg_roles r, pg_catalog.pg_database d
WHERE r.rolname = current_user AND d.datname = current_database()
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
    for pid, name, role, state, since in db.rows(TRANSACTIONS, old, most=str(SHOWN)):
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
    for pid, phase, name in db.rows(VACUUMS, {"tables": tables}):
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
    most, used, reserved, superuser, of_role, role_used, of_database, database_used = db.rows(CONNECTIONS)[0]
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
