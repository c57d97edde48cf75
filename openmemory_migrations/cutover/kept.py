"""A table beside the migrated one that keeps the bytes which no vector can hold, by primary key, for the way back.

It is filled twice by the same statement: before the switch, which may take a while, and in its transaction, which then
has only what has changed since.
"""

from __future__ import annotations

from collections.abc import Iterator

from .. import catalog, locks
from ..catalog import Table
from ..database import Database
from ..reading import UNIT, pages_of
from ..settings import Settings
from ..target import Target, literal, quote

COMMENT = "openmemory_migrations: bytes that no vector can hold, of "
# beside the columns of the key: the bytes, and what xmin the row had when they were copied
BYTES, VERSION = "openmemory_bytes", "openmemory_xmin"
LEFT = "{source} IS NOT NULL AND {vector} IS NULL"

CREATE = "CREATE TABLE {kept} AS SELECT {keys}, {source} AS {bytes}, xmin AS {version} FROM {table} WITH NO DATA"
# default privileges may give roles this table whom policies keep from rows of the other
HIDE = "ALTER TABLE {kept} ENABLE ROW LEVEL SECURITY"
COPY = (
    "INSERT INTO {kept} AS k ({keys}, {bytes}, {version}) SELECT {keys}, {source}, xmin FROM {table} WHERE "
    + LEFT
    + " ON CONFLICT ({keys}) DO UPDATE SET {bytes} = excluded.{bytes}, {version} = excluded.{version}"
    " WHERE k.{version} IS DISTINCT FROM excluded.{version}"
)
CLEAN = "DELETE FROM {kept} AS k WHERE NOT EXISTS (SELECT FROM {table} AS t WHERE {same} AND " + LEFT + ")"
PUT_BACK = """
UPDATE {table} AS t SET {source} = k.{bytes} FROM {kept} AS k
WHERE k.ctid >= '({page},0)' AND k.ctid < '({end},0)' AND {same} AND t.{vector} IS NULL AND t.{source} IS NULL
"""


def count_left(db: Database) -> int:
    """Rows that a vector can't be made of, or not yet: with an index on them, in no time."""
    db.run("SET LOCAL enable_seqscan = off")
    return int(db.value("SELECT count(*) FROM {table} WHERE " + LEFT))


def fill(db: Database, target: Target, table: Table) -> None:
    """Makes the table if need be, and has it hold what the rows without a vector hold now."""
    names = _names(target, table)
    if not exists(db, target):
        db.run(CREATE, **names)
        db.run("ALTER TABLE {kept} ADD PRIMARY KEY ({keys})", **names)
        db.run(HIDE)
        db.run("COMMENT ON TABLE {kept} IS {text}", text=literal(f"{COMMENT}{target}"))
    db.run(COPY, **names)
    db.run(CLEAN, **names)


def put_back(db: Database, target: Target, table: Table, settings: Settings) -> int:
    """Gives rows that have neither vector nor bytes the bytes that were kept; returns how many."""
    if not exists(db, target):
        return 0
    rows = 0
    names = _names(target, table)
    for first in _pages(db):

        def some(first: int = first) -> int:
            return int(db.run(PUT_BACK, page=str(first), end=str(first + UNIT), **names).rowcount)

        rows += locks.retried(db, settings.lock_timeout_ms, table.oid, f"putting bytes of {target} back", some)
    return rows


def exists(db: Database, target: Target) -> bool:
    """Whether there is such a table of ours."""
    return bool(
        db.value(
            "SELECT starts_with(pg_catalog.obj_description(pg_catalog.to_regclass(:name), 'pg_class'), :comment)",
            {"name": db.names["kept"], "comment": COMMENT},
        )
    )


def taken(db: Database, target: Target) -> bool:
    """Whether something that isn't ours has its name."""
    return catalog.relation_exists(db, target.schema, target.kept) and not exists(db, target)


def drop(db: Database, target: Target) -> None:
    if exists(db, target):
        db.run("DROP TABLE {kept}")


def _pages(db: Database) -> Iterator[int]:
    with db.transaction():
        pages = pages_of(db.at({"table": db.names["kept"]}))
    yield from range(0, pages, UNIT)


def _names(target: Target, table: Table) -> dict[str, str]:
    keys = [quote(name) for name in table.key]
    return {
        "keys": ", ".join(keys),
        "same": " AND ".join(f"t.{key} = k.{key}" for key in keys),
        "version": quote(VERSION),
        "bytes": quote(BYTES),
    }


__all__ = ["count_left", "drop", "exists", "fill", "put_back", "taken"]
