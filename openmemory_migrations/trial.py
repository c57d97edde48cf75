"""How long a backfill will take: some rows are read and converted for real, into a temporary copy of the table.

The copy has the columns and indexes of the table and is gone with its transaction, which is rolled back. A temporary
table is spared WAL and the wait for the disk at a commit, the larger part at small dimensions: as much WAL as so many
rows take is written as messages that nobody decodes, since their transaction is rolled back too.

Measured against whole backfills of 40,000 rows of 1,536 and 60,000 of 256 dimensions: 1.0 to 1.2 times too fast on a
quiet machine; on one where ten other processes shared its two cores 0.4 to 1.7 times as fast as the run was.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from . import catalog, codec, locks, synctrigger
from .catalog import Extension, Table
from .database import APPLICATION_NAME, Database
from .expand import vector_type
from .growth import growth
from .reading import BATCH_BYTES, FILENODE, PLAN, Scan, pages_of
from .settings import Settings
from .target import Target, quote
from .writing import Stage

COPY = "openmemory_migrations_copy"
CONVERT = "pg_temp.openmemory_bytea_to_vector"
BATCHES = 3
SERVER_ROWS = 1000  # the function in the database needs as long for so many as the client for three batches

# LIKE leaves identity, defaults and generated columns behind: what is generated is copied as what it is now
CREATE = (
    "CREATE TEMPORARY TABLE {copy_name} (LIKE {table} INCLUDING STORAGE INCLUDING INDEXES)",
    "ALTER TABLE {copy} {drop}ADD COLUMN {vector} {type}",
)
FILL = """
INSERT INTO {copy} ({columns}) SELECT {columns} FROM {table}
WHERE {pending} IS NULL AND octet_length({source}) = {octets} LIMIT {rows}
"""
MESSAGE = "pg_catalog.pg_logical_emit_message"
LOG = f"SELECT count({MESSAGE}(true, :name, repeat('x', 8000))) FROM generate_series(1, :number)"
ALLOWED = """
SELECT bool_and(has_function_privilege(oid, 'EXECUTE')) FROM pg_catalog.pg_proc
WHERE proname = 'pg_logical_emit_message'
"""
FLUSH = f"SELECT {MESSAGE}(true, :name, '')"


@dataclass(frozen=True)
class Trial:
    """Rows that were converted, and seconds: for reading, for writing, and for WAL, None where that isn't allowed."""

    rows: int
    reading: float
    writing: float
    logging: float | None = None

    @property
    def rows_per_s(self) -> float:
        """A run reads while it writes, but what both do on the same few cores takes turns (measured)."""
        return self.rows / max(self.reading + self.writing + (self.logging or 0), 1e-6)


def run(
    db: Database, target: Target, settings: Settings, table: Table, extension: Extension, dimensions: int, engine: str
) -> Trial:
    """Leaves nothing behind. Where no row can be converted the trial has none either."""
    batch = max(1, min(settings.backfill_batch, BATCH_BYTES // (4 * dimensions)))
    try:
        copy = _copy(db, target, settings, table, extension, dimensions, BATCHES * batch, engine)
        if engine == "server":
            found = _server(copy, extension, dimensions)
        else:
            found = _client(copy, extension, dimensions, batch)
    finally:
        db.rollback()
    logging = _logging(db, growth(engine, dimensions, found.rows).wal)
    return Trial(found.rows, found.reading, found.writing, logging)


def _copy(
    db: Database,
    target: Target,
    settings: Settings,
    table: Table,
    extension: Extension,
    dimensions: int,
    rows: int,
    engine: str,
) -> Database:
    """Inside a transaction that it begins: the same connection, with the filled copy in the table's place."""
    column = table.columns.get(target.vector)
    copy = db.at({"table": f"pg_temp.{quote(COPY)}", "convert": CONVERT})
    db.run("SET LOCAL row_security = off")
    db.run("SET LOCAL statement_timeout = 0")
    db.borrow()
    locks.set_timeout(db, f"{settings.lock_timeout_ms}ms")
    for statement in CREATE:
        db.run(
            statement,
            copy_name=quote(COPY),
            copy=copy.names["table"],
            drop=db.sql("DROP COLUMN {vector}, ") if column is not None else "",
            type=vector_type(extension, dimensions),
        )
    db.run(
        FILL,
        copy=copy.names["table"],
        columns=", ".join(quote(name) for name in table.columns if name != target.vector),
        pending=quote(target.vector) if column is not None and column.ours else "NULL",
        octets=str(4 * dimensions),
        rows=str(SERVER_ROWS if engine == "server" else rows),
    )
    return copy


def _client(copy: Database, extension: Extension, dimensions: int, batch: int) -> Trial:
    vector_oid = catalog.vector_oid(copy)
    filenode = copy.value(FILENODE, {"table": copy.names["table"]})
    timeout = copy.value("SELECT current_setting('lock_timeout')")
    copy.run(PLAN, {"name": f"{APPLICATION_NAME} trying how fast it goes", "lock_timeout": timeout})
    stage = Stage(copy, extension.names())
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


def _server(copy: Database, extension: Extension, dimensions: int) -> Trial:
    synctrigger.create_convert(copy, **extension.names())
    began = time.perf_counter()
    rows = copy.run("UPDATE {table} SET {vector} = {convert}({source}, {size})", size=str(dimensions)).rowcount
    return Trial(rows, 0.0, time.perf_counter() - began)


def _logging(db: Database, octets: int) -> float | None:
    """Seconds for so much WAL, with the wait for the disk: that of a small message, whose transaction is committed."""
    with db.transaction():
        if not db.value(ALLOWED):
            return None
    name = {"name": APPLICATION_NAME}
    began = time.perf_counter()
    for _ in range(BATCHES):
        db.run(LOG, {**name, "number": -(-octets // BATCHES // 8000)})
        db.rollback()
        db.run(FLUSH, name)
        db.commit()
    return time.perf_counter() - began
