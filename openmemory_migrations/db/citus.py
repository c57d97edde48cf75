"""What is different on Citus: which tables it distributes, and where sizes and a build's progress are to be seen.

Everything else is how the steps behave anywhere. docs/scale.md says what of this has been run, and on what. Its
functions for all shards open connections of their own: they are asked here, never told to write.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from .. import log
from ..errors import MigrationError
from ..sql import blocks
from .database import Database

BLOCKS = blocks("db")

INSTALLED = "SELECT EXISTS (SELECT FROM pg_catalog.pg_extension WHERE extname = 'citus')"


def shards(db: Database, table_oid: int) -> int | None:
    """How many shards Citus has spread the table over, 1 for a reference table, which every node has whole.

    None where the table is an ordinary one, or there is no Citus. Raises MigrationError on a worker.
    """
    if not db.value(INSTALLED):
        return None
    row = db.run(BLOCKS.distribution, {"oid": table_oid}).one_or_none()
    if row is None:
        return None
    if not db.value("SELECT citus_is_coordinator()"):
        raise MigrationError(
            "this is a worker of Citus, which can't change a distributed table",
            hint="Connect to the coordinator and run the same command again.",
        )
    return max(1, int(row[0]))


def rows_a_shard(db: Database, table_oid: int, rows: int) -> int:
    """How many rows an index covers: Citus builds one for each shard, with the same options."""
    found = shards(db, table_oid)
    if found is None:
        return rows
    log.notice(
        f"Citus builds the index once for each of {found:,} shards, with the memory that its nodes have for it",
        hint="maintenance_work_mem of the nodes: ALTER DATABASE … SET maintenance_work_mem = …, on the coordinator.",
    )
    return rows // found


def pages(db: Database, table_oid: int) -> int:
    """Of the largest shard: a range of places names rows in each."""
    return int(db.value(BLOCKS.pages_of_shards, {"oid": table_oid}))


def index_size(db: Database, table_oid: int) -> int | None:
    """Bytes of the vector indexes on all shards, or None where the table isn't distributed."""
    return int(db.value(BLOCKS.index_size, {"oid": table_oid})) if shards(db, table_oid) else None


def build_progress(connection: Connection) -> str | None:
    """What the nodes say of the builds that they are at; None without Citus, or where none is at one."""
    if not connection.scalar(sa.text(INSTALLED)):
        return None
    found: str | None = connection.scalar(sa.text(BLOCKS.building))
    return found
