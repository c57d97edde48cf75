"""Puts the vector index in place without blocking anybody, and takes it away.

It is built after the rows are there: ivfflat learns its lists from them, and an hnsw graph is built faster than kept.
"""

from __future__ import annotations

import math
import time

from sqlalchemy.exc import DBAPIError

from . import building_progress, catalog, citus, locks, log
from .catalog import Index
from .database import PATIENT_LOCK_TIMEOUT, Database
from .errors import INDEX_ANEW, MigrationError
from .indexes import DEFAULTS, Plan
from .settings import Settings
from .sqlerrors import LOCK_NOT_AVAILABLE, PASSING, as_migration_error, sqlstate
from .target import Target, quote

# SQLSTATE classes of a server that can't build this index: insufficient resources, limit exceeded, not supported.
# Anything else (a lock, a cancel, a lost connection) is an error of the run.
CANNOT_BUILD = ("53", "54", "0A")
CLEAN_UP_TIMEOUT = "5s"
RACED = "XX000"  # "tuple concurrently updated": the build whose index was to be dropped has just come to its end


class CannotBuild(MigrationError):
    """There can be no such index here, and nothing was changed; finalize goes on without it."""


class TooMuch(CannotBuild):
    """For what the server has: a build that PostgreSQL or pgvector has refused."""


def say(problem: CannotBuild) -> None:
    """A NOTICE where the server refuses, as the SQL promises that finalize mirrors."""
    level = log.notice if isinstance(problem, TooMuch) else log.warning
    level(problem.message, detail=problem.detail, hint=problem.hint)


def drop_invalid(db: Database, target: Target, table_oid: int, lock_timeout: str = PATIENT_LOCK_TIMEOUT) -> None:
    """Takes away what an interrupted build has left: it costs every write and serves no search."""
    why = "is invalid, left by a build that was interrupted"
    drop_ours(db, target, table_oid, why, lock_timeout, valid=False)


def drop_ours(
    db: Database,
    target: Target,
    table_oid: int,
    why: str,
    lock_timeout: str = PATIENT_LOCK_TIMEOUT,
    *,
    valid: bool = True,
) -> bool:
    """Takes away what the target's two names stand for, valid or not; says whether there was anything.

    The server may still be at its build, for a client that is no more, and the two would deadlock: tried again.
    """
    dropped = False
    for pause in locks.pauses():
        with db.transaction():
            found = catalog.indexes(db, target.schema, target.index, target.mirrored_index)
        left = [
            i for i in found.values() if i.table_oid == table_oid and i.method in DEFAULTS and (valid or not i.valid)
        ]
        try:
            for index in left:
                log.notice(f"index {quote(index.name)} {why}; dropping it")
                drop(db, index.name, lock_timeout)
                dropped = True
            return dropped
        except DBAPIError as error:
            problem = as_migration_error(error, f"index {quote(index.name)} can't be dropped")
            waited = sqlstate(error) == LOCK_NOT_AVAILABLE and not db.pooled
            if waited or sqlstate(error) not in (*PASSING, RACED) or lock_timeout != PATIENT_LOCK_TIMEOUT:
                raise problem from error
        log.notice(f"{problem.message}, again in {pause:.1f} s")
        db.stop.sleep(pause)
    raise problem


def ensure(db: Database, target: Target, settings: Settings, table_oid: int, wanted: Plan) -> None:
    """Leaves the wanted index in place, valid, once. Raises CannotBuild where there can be none."""
    with db.transaction():
        present = catalog.indexes(db, target.schema, target.index).get(target.index)
        taken = catalog.relation_exists(db, target.schema, target.index)
    require_place(target, table_oid, present, taken, wanted)
    if present is None:
        _build(db, target, settings, table_oid, wanted)
    else:
        log.notice(f"index {quote(target.index)} exists already and is as wanted")
    if duplicate := duplicate_of(db, target, table_oid, wanted):
        drop(db, duplicate)


def require_place(target: Target, table_oid: int, present: Index | None, taken: bool, wanted: Plan) -> None:
    """Raises CannotBuild where something else is there under the name of the index."""
    require_name(target, table_oid, present, taken)
    if present is not None and not wanted.matches(present):
        difference = wanted.difference(present)
        raise CannotBuild(
            f"index {quote(target.index)} exists with another definition and is left as it is",
            detail=f"{difference[0].upper()}{difference[1:]}.",
            hint=f"For the wanted one{'' if present.method in DEFAULTS else ' rename that, then'}: {INDEX_ANEW}.",
        )


def require_name(target: Target, table_oid: int, present: Index | None, taken: bool) -> None:
    """Raises CannotBuild where the name is that of something beside this table."""
    if taken and (present is None or present.table_oid != table_oid):
        raise CannotBuild(
            f"no index: the name {quote(target.index)} is taken by"
            f" {'an index of another table' if present else 'something that is no index'}",
            hint=f"Rename that, then: {INDEX_ANEW}.",
        )


def duplicate_of(db: Database, target: Target, table_oid: int, wanted: Plan) -> str | None:
    """The index under the second mirrored name, where it is the same as that under the first; says so."""
    if target.mirrored_index == target.index:
        return None
    with db.transaction():
        found = catalog.indexes(db, target.schema, target.mirrored_index).get(target.mirrored_index)
    if found is None or found.table_oid != table_oid or not wanted.matches(found):
        return None
    log.notice(f"index {quote(found.name)} is a duplicate of {quote(target.index)}; dropping it")
    return found.name


def drop(db: Database, name: str, lock_timeout: str = PATIENT_LOCK_TIMEOUT) -> None:
    """DROP INDEX CONCURRENTLY; does nothing if it isn't there."""
    with db.transaction():
        holders = db.holders(seconds=1)
    if holders and lock_timeout == PATIENT_LOCK_TIMEOUT:
        what = f"dropping index {quote(name)}: has to wait until transactions that have locked the table are over"
        log.notice(what, detail="; ".join(holders) + ".")
    with db.autocommit(lock_timeout=lock_timeout):
        db.run("DROP INDEX CONCURRENTLY IF EXISTS {schema}.{index}", index=quote(name))


def _build(db: Database, target: Target, settings: Settings, table_oid: int, wanted: Plan) -> None:
    memory_kb = memory_for(db, settings, wanted)
    log.notice(
        f"building index {quote(target.index)} on {target}: {wanted.method} with {wanted.opclass}, {wanted.options}"
    )
    started = time.monotonic()
    try:
        with (
            building_progress.shown(db, table_oid, f"index {quote(target.index)}"),
            db.autocommit(maintenance_work_mem=f"{memory_kb}kB"),
        ):
            # no IF NOT EXISTS: it would keep an invalid index and say nothing
            db.run(
                "CREATE INDEX CONCURRENTLY {index} ON {table} USING {method} ({expression}) WITH ({options})",
                index=quote(target.index),
                method=wanted.method,
                expression=wanted.expression,
                options=wanted.options,
            )
    except BaseException as error:
        if not db.usable:
            raise
        db.rollback()
        _clean_up(db, target, table_oid)
        if not isinstance(error, DBAPIError):
            raise
        problem = as_migration_error(error, f"index {quote(target.index)} on {target} can't be built")
        if not (sqlstate(error) or "").startswith(CANNOT_BUILD):
            raise problem from error
        raise TooMuch(
            problem.message,
            detail=problem.detail,
            hint=f"Set OM_INDEX_MEMORY to more, or other OM_INDEX settings, then: {INDEX_ANEW}."
            " Searches work without it, by reading every row.",
        ) from error
    with db.transaction():
        built = catalog.indexes(db, target.schema, target.index).get(target.index)
        on_shards = citus.index_size(db, table_oid)
    if built is None or not built.valid:
        raise MigrationError(
            f"index {quote(target.index)} on {target} is not valid after its build",
            hint="Run the same command again: it drops the index and builds it anew.",
        )
    seconds = log.duration(time.monotonic() - started)
    log.notice(
        f"index {quote(target.index)} is built and valid: {(on_shards or built.size) / 1024**2:,.1f} MiB in {seconds}"
    )


def _clean_up(db: Database, target: Target, table_oid: int) -> None:
    """After a build that failed or was stopped: not at the price of waiting for whoever has read the table."""
    try:
        drop_invalid(db, target, table_oid, CLEAN_UP_TIMEOUT)
    except (MigrationError, DBAPIError) as error:
        problem = as_migration_error(error, "cleaning up") if isinstance(error, DBAPIError) else error
        log.warning(problem.message, detail="The next run drops it.")


def memory_for(db: Database, settings: Settings, wanted: Plan) -> int:
    """maintenance_work_mem for the build, in kB: what is configured, or what it needs as far as the machine bears it.

    What the machine bears can't be asked; shared_buffers, customarily a quarter of its memory, is the measure.
    """
    if settings.index_memory:
        return settings.index_memory
    with db.transaction():
        given, bearable = memory(db)
    if wanted.memory_kb > bearable:
        message, hint = too_little(wanted, bearable)
        log.notice(message, hint=hint)
    return max(given, min(wanted.memory_kb, bearable))


def memory(db: Database) -> tuple[int, int]:
    """maintenance_work_mem, and the most that a build gets unless OM_INDEX_MEMORY says more, in kB."""
    units = "SELECT setting::bigint * CASE unit WHEN '8kB' THEN 8 ELSE 1 END FROM pg_catalog.pg_settings WHERE name = "
    given = int(db.value(units + "'maintenance_work_mem'"))
    return given, max(given, int(db.value(units + "'shared_buffers'")))


def too_little(wanted: Plan, memory_kb: int) -> tuple[str, str]:
    """What to say, and the hint, where a build gets less than it needs."""
    return (
        f"the index needs about {_size(wanted.memory_kb)} of memory to build, and gets {_size(memory_kb)}",
        f"If the server can spare it: OM_INDEX_MEMORY={math.ceil(wanted.memory_kb / 1024)}MB.",
    )


def _size(kilobytes: int) -> str:
    return f"{kilobytes / 1024:,.0f} MB"
