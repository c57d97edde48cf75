"""Who hears of every row that a backfill changes: triggers of the table, replicas, subscribers, slots."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..finding import Finding
from ..settings import Settings
from ..sql import blocks, literal, quote
from . import partitions
from .context import TableContext
from .database import Database

BLOCKS = blocks("db")


@dataclass(frozen=True)
class Replication:
    replicas: int
    synchronous: str  # synchronous_standby_names


def replication(db: Database) -> Replication:
    return Replication(
        replicas=db.value("SELECT count(*) FROM pg_catalog.pg_stat_replication"),
        synchronous=db.value("SELECT current_setting('synchronous_standby_names')"),
    )


def of_the_server(db: Database, found: Replication, settings: Settings) -> Iterator[Finding]:
    if found.replicas and settings.backfill_max_lag is None:
        yield Finding(
            "notice",
            "replicas",
            f"{found.replicas:,} replicas have to replay all that the backfill writes",
            hint="OM_BACKFILL_MAX_LAG=10 makes it wait while one lags by more than 10 s.",
        )
    if settings.backfill_max_lag is not None and not found.replicas:
        yield Finding(
            "warning", "no-replica", "OM_BACKFILL_MAX_LAG is set, but no replica is connected: nothing to wait for"
        )
    if found.synchronous:
        yield Finding(
            "notice" if found.replicas else "warning",
            "synchronous-standby",
            f"synchronous_standby_names is {literal(found.synchronous)}: each commit waits for a standby",
            "A batch is a commit." if found.replicas else "None is connected: a commit waits until there is one.",
            "Fewer commits: BACKFILL_BATCH=20000."
            if found.replicas
            else "ALTER SYSTEM RESET synchronous_standby_names;",
        )
    for name, kept in db.rows(BLOCKS.slots):
        yield Finding(
            "warning",
            "inactive-slot",
            f"replication slot {quote(name)} is inactive and keeps {kept} of WAL, and all that the backfill writes",
            "The disk may fill up.",
            f"SELECT pg_drop_replication_slot({literal(name)}); if nobody will come back for it.",
        )


def of_the_table(ctx: TableContext, type_name: str) -> Iterator[Finding]:
    """`type_name` is that of the column to be, as a subscriber should have it."""
    db, target = ctx.db, ctx.target
    tables = {"tables": [part.oid for part in partitions.parts(db, ctx.table.oid)]}
    for on, name in db.rows(BLOCKS.triggers, {**tables, "ours": target.sync, "vector": target.vector}):
        yield Finding(
            "warning",
            "trigger",
            f"trigger {quote(name)} on {on} fires for each row that the backfill converts",
            hint=f"If it need not see them: ALTER TABLE {on} DISABLE TRIGGER {quote(name)}; and afterwards ENABLE.",
        )
    if target.vector not in ctx.table.columns:
        line = f"CREATE EXTENSION IF NOT EXISTS vector; {_add(db, target.vector, type_name)}"
        yield from publications(ctx, target.vector, line)


def of_bytes(ctx: TableContext, column: str) -> Iterator[Finding]:
    """Of a column of bytes that is to be added again."""
    yield from publications(ctx, column, _add(ctx.db, column, "bytea"))


def publications(ctx: TableContext, column: str, line: str) -> Iterator[Finding]:
    """Whose subscribers lack a column that is to be, with the line for those."""
    tables = [part.oid for part in partitions.parts(ctx.db, ctx.table.oid)]
    for (name,) in ctx.db.rows(BLOCKS.publications, {"tables": tables}):
        yield Finding(
            "warning",
            "publication",
            f"publication {quote(name)} sends {ctx.target} to its subscribers",
            f"One without a column {quote(column)} stops with an error as soon as the first row is converted.",
            f"On each subscriber first: {line}",
        )


def _add(db: Database, column: str, type_name: str) -> str:
    return f"ALTER TABLE {db.names['table']} ADD COLUMN {quote(column)} {type_name};"
