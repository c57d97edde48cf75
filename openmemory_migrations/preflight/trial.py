"""How long a backfill will take: some rows are read and converted for real, into a temporary copy of the table.

The copy has the columns and indexes of the table and is gone with its transaction, which is rolled back. A temporary
table is spared WAL and the wait for the disk at a commit, so a run takes longer than the trial says: 1.5 to 2 times as
long where that was measured, with 40,000 rows of 1,536 and 60,000 of 256 dimensions on a quiet machine.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from ..backfill.reader import BATCH_BYTES, FORTH, LOCKED_FILENODE, Scan, by_tid, pages_of
from ..backfill.stage import Stage
from ..db import catalog, locks
from ..db.catalog import Extension
from ..db.context import VectorContext
from ..db.database import WHATEVER, Database
from ..encoding import codec, native
from ..encoding.stored import STORED
from ..encoding.sync_trigger import CONVERT
from ..sql import SQL, blocks, joined, quote
from ..steps.expand import vector_type

BLOCKS = blocks("preflight")

COPY = "openmemory_migrations_copy"
BATCHES = 3
SERVER_ROWS = 1000  # the function in the database needs as long for so many as the client for three batches

# LIKE leaves identity, defaults and generated columns behind: what is generated is copied as what it is now
CREATE = (
    "CREATE TEMPORARY TABLE {copy_name} (LIKE {table} INCLUDING STORAGE)",
    "ALTER TABLE {copy} {drop}ADD COLUMN {vector} {type}",
)
SLOWER = 2  # times as long as the trial, at the most that was measured


@dataclass(frozen=True)
class Trial:
    """Rows that were converted, and the seconds for reading and for writing them."""

    rows: int
    reading: float
    writing: float

    @property
    def rows_per_s(self) -> float:
        """A run reads while it writes, but what both do on the same few cores takes turns (measured)."""
        return self.rows / max(self.reading + self.writing, 1e-6)


def run(ctx: VectorContext, dimensions: int, engine: str) -> Trial:
    """Leaves nothing behind. Where no row can be converted the trial has none either."""
    batch = STORED.batch(BATCH_BYTES, dimensions, ctx.settings.backfill_batch)
    try:
        copy = _copy(ctx, dimensions, BATCHES * batch, engine)
        if engine != "client":
            return _server(copy, ctx.extension, dimensions, engine)
        return _client(copy, ctx.extension, dimensions, batch)
    finally:
        ctx.db.rollback()


def _copy(ctx: VectorContext, dimensions: int, rows: int, engine: str) -> Database:
    """Inside a transaction that it begins: the same connection, with the filled copy in the table's place."""
    db = ctx.db
    column = ctx.table.columns.get(ctx.target.vector)
    copy = db.at({"table": quote("pg_temp", COPY)})
    db.outlive_timeouts(WHATEVER)
    db.borrow()
    locks.set_timeout(db, f"{ctx.settings.lock_timeout_ms}ms")
    for statement in CREATE:
        db.run(
            statement,
            copy_name=quote(COPY),
            copy=copy.names["table"],
            drop=db.sql("DROP COLUMN {vector}, " if column is not None else ""),
            type=vector_type(ctx.extension, dimensions),
        )
    for columns, unique in list(db.rows(BLOCKS.indexes, {"table": ctx.table.oid})):
        db.run(
            "CREATE {unique}INDEX ON {copy} ({columns})",
            unique=SQL("UNIQUE " if unique else ""),
            copy=copy.names["table"],
            columns=SQL(columns),
        )
    db.run(
        BLOCKS.fill,
        copy=copy.names["table"],
        columns=joined(", ", (quote(name) for name in ctx.table.columns if name != ctx.target.vector)),
        pending=quote(ctx.target.vector) if column is not None and column.ours else SQL("NULL"),
        of_length=db.sql(STORED.of(dimensions)),
        rows=SERVER_ROWS if engine == "server" else rows,
    )
    return copy


def _client(copy: Database, extension: Extension, dimensions: int, batch: int) -> Trial:
    vector_oid = catalog.vector_oid(copy)
    filenode = copy.value(LOCKED_FILENODE, {"table": copy.names["table"]})
    timeout = copy.value("SELECT current_setting('lock_timeout')")
    copy.set_local(by_tid("trying how fast it goes", timeout))
    stage = Stage(copy, extension.names(), FORTH)
    scan = Scan(dimensions, batch, 0, pages_of(copy))
    rows, reading, writing = 0, 0.0, 0.0
    while scan.more:
        began = time.perf_counter()
        found = scan.read(copy)
        scan.advance(found.rows_read, found.last_tid)
        payload = codec.encode(found.good, vector_oid, filenode)
        read = time.perf_counter()
        if len(found.good):
            stage.write(payload)
            stage.committed()  # nothing is, but the next batch finds it made
        rows += len(found.good)
        reading += read - began
        writing += time.perf_counter() - read
    return Trial(rows, reading, writing)


def _server(copy: Database, extension: Extension, dimensions: int, engine: str) -> Trial:
    if engine == "native":
        native.JOIN.make(copy, extension)
        value = copy.sql(native.value(dimensions), **extension.names())
        unfit = copy.sql(native.unfit(dimensions), **extension.names())
    else:
        CONVERT.make(copy, extension)
        value, unfit = copy.sql("{convert}({source}, {size})", size=dimensions), SQL("false")
    began = time.perf_counter()
    rows = copy.run("UPDATE {table} SET {vector} = {value} WHERE NOT ({unfit})", value=value, unfit=unfit).rowcount
    return Trial(rows, 0.0, time.perf_counter() - began)
