"""Where a migration stands, seen in one snapshot and read-only: for the commands that report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from . import catalog, checks, dimensions, partitions
from .catalog import Index, Table
from .database import APPLICATION_NAME, Database
from .environment import VERSION_TABLE
from .indexes import DEFAULTS
from .leftovers import COUNT, by_reading
from .settings import Settings
from .target import Target, literal, quote

LOOK_INTO = 10_000  # pending rows that are read to tell NaN from what is still to be converted

RUNS = """
SELECT pid, application_name, CAST(date_trunc('second', backend_start) AS text) FROM pg_catalog.pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND application_name LIKE :ours
ORDER BY backend_start, pid
"""
BUILDS = """
SELECT phase, blocks_done, blocks_total, tuples_done, tuples_total FROM pg_catalog.pg_stat_progress_create_index
WHERE datname = current_database() AND relid = ANY (:tables)
"""
DETECTED = """
SELECT bool_or(data_type LIKE 'vector%'), bool_or(udt_name = 'vector') FROM information_schema.columns
WHERE table_schema = :schema AND table_name = :table AND column_name = :column
"""


@dataclass(frozen=True)
class Rows:
    """`pending` can be converted, as far as one can tell without reading more than 10,000 values; `skipped` can't."""

    total: int
    converted: int
    pending: int
    skipped: Mapping[str, int]
    without_source: int  # v is NULL


@dataclass(frozen=True)
class State:
    """`revisions` are those stamped in our own version table, None where there is no such table: a host's chain."""

    target: Target
    revisions: list[str] | None
    column: str | None  # its type
    dimensions: int | None
    ours: bool
    trigger: bool
    rows: Rows | None  # None before there is a column
    indexes: list[Index] = field(default_factory=list)
    build: str | None = None
    runs: list[tuple[int, str, str]] = field(default_factory=list)  # process, what it says, since when
    source_is_vector: bool = False
    found_by_application: bool = False

    @property
    def index(self) -> Index | None:
        return next((index for index in self.indexes if index.name == self.target.index), None)


def look(db: Database, target: Target, settings: Settings) -> State:
    """Raises MigrationError where the table is not one that can be migrated."""
    with db.transaction(snapshot=True):
        table = checks.require_table(db, target)
        column = table.columns.get(target.vector)
        tables = [part.oid for part in partitions.parts(db, table.oid)]
        detected = db.rows(DETECTED, {"schema": target.schema, "table": target.table, "column": target.vector})[0]
        indexes = catalog.indexes(db, target.schema, target.index, target.mirrored_index)
        return State(
            target=target,
            revisions=_revisions(db, settings),
            column=column.type if column else None,
            dimensions=column.dimensions if column else None,
            ours=bool(column and column.ours),
            trigger=catalog.trigger_enabled(db, table.oid, target.sync),
            rows=_rows(db, target, table) if column and column.ours else None,
            indexes=[i for i in indexes.values() if i.table_oid == table.oid and i.method in DEFAULTS],
            build=_build(db, tables),
            runs=[tuple(row) for row in db.rows(RUNS, {"ours": APPLICATION_NAME + "%"})],
            source_is_vector=table.columns[target.source].is_vector,
            found_by_application=bool(detected[0]),
        )


def detection(target: Target) -> str:
    """What an application should ask to find the column."""
    where = {"table_schema": target.schema, "table_name": target.table, "column_name": target.vector}
    return "SELECT udt_name FROM information_schema.columns WHERE " + " AND ".join(
        f"{column} = {literal(name)}" for column, name in where.items()
    )


def _revisions(db: Database, settings: Settings) -> list[str] | None:
    if not catalog.relation_exists(db, settings.pg_schema, VERSION_TABLE):
        return None
    table = f"{quote(settings.pg_schema)}.{quote(VERSION_TABLE)}"
    return sorted(row[0] for row in db.rows("SELECT version_num FROM {versions}", versions=table))


def _rows(db: Database, target: Target, table: Table) -> Rows:
    fixed = table.columns[target.vector].dimensions
    total, converted, without = db.rows(
        "SELECT count(*), count({vector}), count(*) FILTER (WHERE {source} IS NULL) FROM {table}"
    )[0]
    skipped: dict[str, int] = {}
    pending = 0
    for octets, rows, _ in db.rows(COUNT, differs="false"):
        if octets is None:
            continue
        reason = dimensions.problem(octets, fixed)
        if reason is None and rows <= LOOK_INTO:
            found = by_reading(db, table, octets // 4)
            pending += found.good
            if found.bad:
                skipped["NaN or infinite values"] = skipped.get("NaN or infinite values", 0) + found.bad
        elif reason is None:
            pending += rows
        else:
            skipped[reason] = skipped.get(reason, 0) + rows
    return Rows(total, converted, pending, skipped, without)


def _build(db: Database, tables: list[int]) -> str | None:
    rows: list[Any] = list(db.rows(BUILDS, {"tables": tables}))
    if not rows:
        return None
    phase, *counts = rows[0]
    shares = [f"{100 * done // total} %" for done, total in zip(counts[::2], counts[1::2], strict=True) if total]
    return f"{phase}, {shares[0]}" if shares else str(phase)
