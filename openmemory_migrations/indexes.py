"""The vector index: what it should be, whether it is there, building it without blocking anybody.

It is built after the rows are there: ivfflat learns its lists from them, and an hnsw graph is built faster than kept.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy.exc import DBAPIError

from . import catalog, log
from .catalog import Extension, Index, Table
from .database import Database, as_migration_error, sqlstate
from .errors import MigrationError
from .settings import Settings
from .target import Target, quote

ROWS_A_LIST = 50  # with fewer ivfflat finds too little: recall@10 0.18 was reported for 200 rows in 100 lists
LEAST_SAMPLES = 10_000  # rows that ivfflat samples at least, src/ivfbuild.c
INDEX_DIMENSIONS, HALFVEC_DIMENSIONS = 2000, 4000  # pgvector's limits for an index on vector and on halfvec
OPERATORS = {"l2": "<->", "cosine": "<=>", "ip": "<#>"}
DEFAULTS = {"ivfflat": {"lists=100"}, "hnsw": {"m=16", "ef_construction=64"}}  # what reloptions leaves out
# SQLSTATE classes of a server that can't build this index: insufficient resources, limit exceeded, not supported.
# Anything else (a lock, a cancel, a lost connection) is an error of the run.
CANNOT_BUILD = ("53", "54", "0A")
# CONCURRENTLY waits for old transactions one by one; a short timeout would cancel it and leave an invalid index
LOCK_TIMEOUT = "1h"


@dataclass(frozen=True)
class Plan:
    """An index that can be built. `expression` and `options` are SQL, `query` is the ORDER BY that uses it."""

    method: str
    opclass: str
    key: str
    required: frozenset[str]  # options that an index found in place must have
    expression: str
    options: str
    memory_kb: int
    query: str
    probes: int  # for ivfflat, √lists as pgvector's README advises

    def matches(self, index: Index) -> bool:
        names = {option.partition("=")[0] for option in index.options}
        defaults = {option for option in DEFAULTS[self.method] if option.partition("=")[0] not in names}
        return (
            (index.method, index.opclass, index.partial) == (self.method, self.opclass, False)
            and _key(index.key) == self.key
            and self.required <= index.options | defaults
        )


@dataclass(frozen=True)
class NoIndex:
    """Why there is to be no index, and the next step if there is one."""

    reason: str
    hint: str | None = None


def plan(target: Target, settings: Settings, extension: Extension, dimensions: int | None, rows: int) -> Plan | NoIndex:
    """What to build for so many rows, or why nothing can be built. Pure.

    Unless configured, ivfflat gets rows / 1000 lists up to a million rows, √rows above (pgvector's README), and at
    least 50 rows a list.
    """
    if settings.index == "none":
        return NoIndex("OM_INDEX is none")
    if dimensions is None:
        return NoIndex(
            f"{quote(target.vector)} has no dimensions",
            "Set OM_VEC_DIM or OM_TIER, then run alembic downgrade base and alembic upgrade head.",
        )
    if settings.index == "hnsw" and extension.version < (0, 5):
        return NoIndex("hnsw came with pgvector 0.5.0", "ALTER EXTENSION vector UPDATE;")
    half = dimensions > INDEX_DIMENSIONS
    if dimensions > HALFVEC_DIMENSIONS:
        return NoIndex(f"no index of pgvector takes more than {HALFVEC_DIMENSIONS:,} dimensions")
    if half and extension.version < (0, 7):
        return NoIndex(
            f"more than {INDEX_DIMENSIONS:,} dimensions need halfvec, which came with pgvector 0.7.0",
            "ALTER EXTENSION vector UPDATE;",
        )
    item = 8 + (2 if half else 4) * dimensions
    if settings.index == "ivfflat":
        lists = settings.index_lists or min(_lists(rows), rows // ROWS_A_LIST)
        if not lists:
            return NoIndex(
                f"ivfflat needs {ROWS_A_LIST} rows to learn from, there are {rows:,}",
                "When there are more rows: alembic downgrade om_20240107_backfill, then alembic upgrade head."
                " Or set OM_INDEX=hnsw, which needs none.",
            )
        options = {"lists": lists}
        required = set(options) if settings.index_lists else set()
        memory = _ivfflat_memory(lists, dimensions, item)
    else:
        options = {"m": settings.index_m, "ef_construction": settings.index_ef_construction}
        required = set(options)
        memory = _hnsw_memory(rows, settings.index_m, item)
    ext, vector = quote(extension.schema), quote(target.vector)
    opclass = f"{'halfvec' if half else 'vector'}_{settings.index_metric}_ops"
    cast = f"::{ext}.halfvec({dimensions})" if half else ""
    return Plan(
        method=settings.index,
        opclass=opclass,
        key=f"{target.vector}::halfvec({dimensions})" if half else target.vector,
        required=frozenset(f"{name}={options[name]}" for name in required),
        expression=(f"({vector}{cast})" if half else vector) + f" {ext}.{opclass}",
        options=", ".join(f"{name} = {value}" for name, value in options.items()),
        memory_kb=math.ceil(memory / 1024),
        query=f"ORDER BY {vector}{cast} OPERATOR({ext}.{OPERATORS[settings.index_metric]}) $1{cast}",
        probes=math.isqrt(options.get("lists", 0)),
    )


def _lists(rows: int) -> int:
    return max(1, rows // 1000) if rows <= 1_000_000 else math.isqrt(rows)


def _ivfflat_memory(lists: int, dimensions: int, item: int) -> int:
    """Bytes that pgvector checks against maintenance_work_mem before it begins (src/ivfkmeans.c)."""
    samples = max(ROWS_A_LIST * lists, LEAST_SAMPLES)
    vectors = (samples + 2 * lists) * item + 4 * lists * dimensions
    bounds = 4 * samples * (lists + 2) + 8 * lists * lists + 8 * lists
    return vectors + bounds + 1024**2


def _hnsw_memory(rows: int, m: int, item: int) -> int:
    """Bytes of the graph in memory, about: the vector, 2 * m neighbours on the lowest layer, and the element itself."""
    return rows * (item + 2 * m * 24 + 200)


def _key(text: str) -> str:
    """An index key with the decoration taken off that pg_get_indexdef gives a cast: `((v)::s.halfvec(3))`."""
    found = re.fullmatch(r'\(*"?(.+?)"?\)*::(?:.+\.)?halfvec\((\d+)\)\)*', text)
    return f"{found[1]}::halfvec({found[2]})" if found else text


def ensure(db: Database, target: Target, settings: Settings, table: Table, wanted: Plan) -> None:
    """Leaves the wanted index in place, valid, once; or says in the log why it can't."""
    found = catalog.indexes(db, target.schema, target.index, target.mirrored_index)
    db.commit()
    for index in list(found.values()):
        if index.table_oid == table.oid and not index.valid and index.method in DEFAULTS:
            log.notice(f"index {quote(index.name)} is invalid, left by a build that was interrupted; dropping it")
            drop(db, index.name)
            del found[index.name]
    present = found.get(target.index)
    if present is None:
        if not _build(db, target, settings, wanted):
            return
    elif present.table_oid != table.oid:
        log.warning(
            f"no index: the name {quote(target.index)} is taken by an index of another table",
            hint=f"ALTER INDEX {quote(target.schema)}.{quote(target.index)} RENAME TO …; then alembic downgrade"
            " om_20240107_backfill and alembic upgrade head.",
        )
        return
    elif not wanted.matches(present):
        log.warning(
            f"index {quote(target.index)} exists with another definition and is left as it is",
            detail=f"It is {present.method} with {present.opclass} on {present.key}"
            f" ({', '.join(sorted(present.options)) or 'no options'}), wanted is {wanted.method} with {wanted.opclass}"
            f" on {wanted.key} ({wanted.options}).",
            hint="For the wanted one: alembic downgrade om_20240107_backfill, then alembic upgrade head.",
        )
    else:
        log.notice(f"index {quote(target.index)} exists already and is as wanted")
    duplicate = found.get(target.mirrored_index)
    if duplicate and duplicate.table_oid == table.oid and wanted.matches(duplicate):
        log.notice(f"index {quote(duplicate.name)} is a duplicate of {quote(target.index)}; dropping it")
        drop(db, duplicate.name)


def drop(db: Database, name: str) -> None:
    """DROP INDEX CONCURRENTLY; does nothing if it isn't there."""
    with db.autocommit(), _long_waits(db):
        db.run("DROP INDEX CONCURRENTLY IF EXISTS {schema}.{index}", index=quote(name))


def _build(db: Database, target: Target, settings: Settings, wanted: Plan) -> bool:
    memory_kb = _memory(db, settings, wanted)
    log.notice(
        f"building index {quote(target.index)} on {target}: {wanted.method} with {wanted.opclass}, {wanted.options}"
    )
    started = time.monotonic()
    try:
        with db.autocommit(), _long_waits(db), _setting(db, "maintenance_work_mem", f"{memory_kb}kB"):
            # no IF NOT EXISTS: it would keep an invalid index and say nothing
            db.run(
                "CREATE INDEX CONCURRENTLY {index} ON {table} USING {method} ({expression}) WITH ({options})",
                index=quote(target.index),
                method=wanted.method,
                expression=wanted.expression,
                options=wanted.options,
            )
    except DBAPIError as error:
        db.rollback()
        drop(db, target.index)
        problem = as_migration_error(error, f"index {quote(target.index)} on {target} can't be built")
        if not (sqlstate(error) or "").startswith(CANNOT_BUILD):
            raise problem from error
        log.notice(
            problem.message,
            detail=problem.detail,
            hint="Set OM_INDEX_MEMORY to more, or other OM_INDEX settings, then: alembic downgrade"
            " om_20240107_backfill, and alembic upgrade head. Searches work without it, by reading every row.",
        )
        return False
    built = catalog.indexes(db, target.schema, target.index).get(target.index)
    db.commit()
    if built is None or not built.valid:
        raise MigrationError(
            f"index {quote(target.index)} on {target} is not valid after its build",
            hint="Run the same command again: it drops the index and builds it anew.",
        )
    seconds = log.duration(time.monotonic() - started)
    log.notice(f"index {quote(target.index)} is built and valid: {built.size / 1024**2:,.1f} MiB in {seconds}")
    return True


def _memory(db: Database, settings: Settings, wanted: Plan) -> int:
    """maintenance_work_mem for the build, in kB: what is configured, or what it needs as far as the machine bears it.

    What the machine bears can't be asked; shared_buffers, customarily a quarter of its memory, is the measure.
    """
    if settings.index_memory:
        return settings.index_memory
    units = "SELECT setting::bigint * CASE unit WHEN '8kB' THEN 8 ELSE 1 END FROM pg_catalog.pg_settings WHERE name = "
    given = int(db.value(units + "'maintenance_work_mem'"))
    bearable = max(given, int(db.value(units + "'shared_buffers'")))
    db.commit()
    if wanted.memory_kb > bearable:
        log.notice(
            f"the index needs about {_size(wanted.memory_kb)} of memory to build, and gets {_size(bearable)}",
            hint=f"If the server can spare it: OM_INDEX_MEMORY={math.ceil(wanted.memory_kb / 1024)}MB.",
        )
    return max(given, min(wanted.memory_kb, bearable))


def _size(kilobytes: int) -> str:
    return f"{kilobytes / 1024:,.0f} MB"


@contextmanager
def _long_waits(db: Database) -> Iterator[None]:
    with _setting(db, "lock_timeout", LOCK_TIMEOUT), _setting(db, "statement_timeout", "0"):
        yield


@contextmanager
def _setting(db: Database, name: str, value: str) -> Iterator[None]:
    """Sets `name` for the session, since autocommit has no transaction to set it in, and puts it back."""
    before = db.value("SELECT current_setting(:name)", {"name": name})
    db.run("SELECT set_config(:name, :value, false)", {"name": name, "value": value})
    try:
        yield
    finally:
        if db.usable:
            db.run("SELECT set_config(:name, :value, false)", {"name": name, "value": before})
