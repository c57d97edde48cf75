"""Puts the vector index in place without blocking anybody, and takes it away.

It is built after the rows are there: ivfflat learns its lists from them, and an hnsw graph is built faster than kept.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

from sqlalchemy.exc import DBAPIError

from .. import log
from ..db import catalog, citus, locks, tries
from ..db.context import Context, VectorContext
from ..db.database import PATIENT_LOCK_TIMEOUT, Database
from ..db.keys import SHOWN_KEYS, keys_where
from ..db.sqlerrors import DENIED, LOCK_NOT_AVAILABLE, PASSING, UNDEFINED_TABLE, as_migration_error, sqlstate
from ..errors import INDEX_ANEW, MigrationError
from ..finding import Finding
from ..settings import Settings
from ..sql import SQL, Fragment, blocks, literal, quote
from ..target import Target
from . import build_progress, choice
from .choice import HALF_MOST, INDEX_DIMENSIONS, NoIndex, Plan, scarce

BLOCKS = blocks("index")

# SQLSTATE classes of what ends a run and not an index: a lost connection, a lock, a deadlock, a cancel, and a table
# that is no longer there or no longer the same. Whatever else CREATE INDEX answers is a reason why there can be none
OF_THE_RUN = ("08", "25", "40", "55", "57", UNDEFINED_TABLE)
# parallel workers share memory that the system may have little of, as in a container: "…segment "/PostgreSQL.1234"…"
SHARED_MEMORY = "/PostgreSQL."
# halves have five bits for the exponent: from here on they are infinite, which pgvector refuses
HALF_OVERFLOW = 65_520
CLEAN_UP_TIMEOUT = "5s"
RACED = "XX000"  # "tuple concurrently updated": the build whose index was to be dropped has just come to its end


class CannotBuild(MigrationError):
    """There can be no such index here, and nothing was changed; finalize goes on without it."""


def say(problem: CannotBuild) -> None:
    log.warning(problem.message, detail=problem.detail, hint=problem.hint)


def say_present(target: Target) -> None:
    log.notice(f"index {quote(target.index)} exists already and is as wanted")


def none(target: Target, why: NoIndex) -> CannotBuild:
    return CannotBuild(f"no index on {quote(target.vector)} of {target}: {why.reason}", hint=why.hint)


def say_none(target: Target, why: NoIndex) -> None:
    """A WARNING where the settings ask for one."""
    problem = none(target, why)
    (log.warning if why.wanted else log.notice)(problem.message, hint=problem.hint)


def count_vectors(db: Database) -> int:
    """What an index is planned for, in the transaction that is open."""
    return int(db.value("SELECT count(*) FROM {table} WHERE {vector} IS NOT NULL"))


def plan(ctx: VectorContext, rows: int) -> Plan | NoIndex:
    """What to build for so many rows of the whole table, with the memory that there is."""
    db, target = ctx.db, ctx.target
    size = ctx.table.columns[target.vector].dimensions
    with db.transaction():
        rows = citus.rows_a_shard(db, ctx.table.oid, rows)
        found = choice.plan(target, ctx.settings, ctx.extension, size, rows, most_memory(db, ctx.settings))
        if isinstance(found, NoIndex):
            # one that is there needs no memory any more
            whole = choice.plan(target, ctx.settings, ctx.extension, size, rows)
            there = catalog.own_indexes(db, target, ctx.table.oid).get(target.index)
            if there and there.valid and isinstance(whole, Plan) and whole.matches(there):
                return replace(whole, lists=whole.outgrown(there) or whole.lists)
    return found


def drop_invalid(ctx: Context, table_oid: int, lock_timeout: str = PATIENT_LOCK_TIMEOUT) -> None:
    """Takes away what an interrupted build has left: it costs every write and serves no search."""
    why = "is invalid, left by a build that was interrupted"
    drop_ours(ctx, table_oid, why, lock_timeout, valid=False)


def drop_ours(
    ctx: Context,
    table_oid: int,
    why: str,
    lock_timeout: str = PATIENT_LOCK_TIMEOUT,
    *,
    valid: bool = True,
) -> bool:
    """Takes away what the target's two names stand for, valid or not; says whether there was anything.

    The server may still be at its build, for a client that is no more, and the two would deadlock: tried again.
    """
    db, target = ctx.db, ctx.target
    dropped = False
    for _, pause in tries.attempts():
        with db.transaction():
            found = catalog.own_indexes(db, target, table_oid)
        left = [index for index in found.values() if valid or not index.valid]
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
        if pause is not None:
            log.notice(f"{problem.message}, again in {pause:.1f} s")
            db.stop.sleep(pause)
    raise problem


def ensure(ctx: Context, table_oid: int, wanted: Plan) -> None:
    """Leaves the wanted index in place, valid, once. Raises CannotBuild where there can be none."""
    if present(ctx, table_oid, wanted):
        say_present(ctx.target)
    else:
        _build(ctx, table_oid, wanted)
    if duplicate := duplicate_of(ctx, table_oid, wanted):
        drop(ctx.db, duplicate)


def present(ctx: Context, table_oid: int, wanted: Plan) -> bool:
    """Whether it is there as wanted, valid or not. Raises CannotBuild where something else is in its place."""
    db, target = ctx.db, ctx.target
    with db.transaction():
        require_name(ctx, table_oid)
        found = catalog.own_indexes(db, target, table_oid).get(target.index)
    if found and not wanted.matches(found):
        difference = wanted.difference(found)
        raise CannotBuild(
            f"index {quote(target.index)} exists with another definition and is left as it is",
            detail=f"{difference[0].upper()}{difference[1:]}.",
            hint=f"For the wanted one: {INDEX_ANEW}.",
        )
    return found is not None


def name_taken(ctx: Context, table_oid: int) -> list[Finding]:
    """Whether the name of the index is that of something else: what keeps it from being built, or nothing."""
    return Finding.of_rows(ctx.db.rows(BLOCKS.name_taken, **names(ctx.target, table_oid)))


def require_name(ctx: Context, table_oid: int) -> None:
    """Raises CannotBuild where the name of the index is that of something else."""
    for found in name_taken(ctx, table_oid):
        raise CannotBuild(found.message, detail=found.detail, hint=found.hint)


def duplicate_of(ctx: Context, table_oid: int, wanted: Plan) -> str | None:
    """The index under the second mirrored name, where it is the same as that under the first; says so."""
    with ctx.db.transaction():
        asked = {**names(ctx.target, table_oid), "any_options": not wanted.required}
        name: str | None = ctx.db.value(BLOCKS.duplicate, **asked)
    if name is not None:
        log.notice(f"index {quote(name)} is a duplicate of {quote(ctx.target.index)}; dropping it")
    return name


def names(target: Target, table: Fragment) -> dict[str, Fragment]:
    """For the questions about indexes that are there; `table` is its oid, as a number or in SQL."""
    return {
        **catalog.own_names(target, target.index, target.mirrored_index),
        "of_table": table,
        "index_name": literal(target.index),
        "index_shown": literal(quote(target.index)),
        "mirrored_name": literal(target.mirrored_index),
        "index_anew": literal(INDEX_ANEW),
    }


def drop(db: Database, name: str, lock_timeout: str = PATIENT_LOCK_TIMEOUT) -> None:
    """DROP INDEX CONCURRENTLY; does nothing if it isn't there."""
    with db.transaction():
        holders = db.holders(seconds=1)
    if holders and lock_timeout == PATIENT_LOCK_TIMEOUT:
        what = f"dropping index {quote(name)}: has to wait until transactions that have locked the table are over"
        log.notice(what, detail="; ".join(holders) + ".")
    with db.autocommit(lock_timeout=lock_timeout):
        db.run("DROP INDEX CONCURRENTLY IF EXISTS {schema}.{index}", index=quote(name))


def _build(ctx: Context, table_oid: int, wanted: Plan) -> None:
    db, target = ctx.db, ctx.target
    memory_kb = memory_for(db, ctx.settings, wanted)
    if wanted.half:
        _require_halves(ctx)
    log.notice(
        f"building index {quote(target.index)} on {target}: {wanted.method} with {wanted.opclass}, {wanted.options}"
    )
    started = time.monotonic()
    own = {"maintenance_work_mem": f"{memory_kb}kB"}
    try:
        _create(ctx, table_oid, wanted, own)
    except CannotBuild as problem:
        if SHARED_MEMORY not in problem.message:
            raise
        log.notice(f"{problem.message}; building it again without parallel workers")
        _create(ctx, table_oid, wanted, {**own, "max_parallel_maintenance_workers": "0"})
    with db.transaction():
        built = catalog.indexes(db, target.schema, target.index).get(target.index)
        on_shards = citus.index_size(db, table_oid)
    if built is None or not built.valid:
        raise MigrationError(
            f"index {quote(target.index)} on {target} is not valid after its build",
            hint="Run the same command again: it drops the index and builds it anew.",
        )
    mark(ctx, table_oid)
    seconds = log.duration(time.monotonic() - started)
    log.notice(
        f"index {quote(target.index)} is built and valid: {(on_shards or built.size) / 1024**2:,.1f} MiB in {seconds}"
    )


def _create(ctx: Context, table_oid: int, wanted: Plan, own: Mapping[str, str]) -> None:
    """Raises CannotBuild for whatever the server answers that isn't of this run; then nothing is left of it."""
    db, target = ctx.db, ctx.target
    try:
        with build_progress.shown(db, table_oid, f"index {quote(target.index)}"), db.autocommit(**own):
            # no IF NOT EXISTS: it would keep an invalid index and say nothing
            create(db, wanted, target.index, how="CONCURRENTLY ")
    except BaseException as error:
        if not db.usable:
            raise
        db.rollback()
        _clean_up(ctx, table_oid)
        if not isinstance(error, DBAPIError):
            raise
        problem = as_migration_error(error, f"index {quote(target.index)} on {target} can't be built")
        if of_the_run(error):
            raise problem from error
        raise CannotBuild(
            problem.message,
            detail=problem.detail,
            hint=(
                f"GRANT CREATE ON SCHEMA {quote(target.schema)} TO {quote(_role(db))};"
                if sqlstate(error) == DENIED
                else f"Set OM_INDEX_MEMORY, or other OM_INDEX settings, then: {INDEX_ANEW}."
            )
            + " Searches work without it, by reading every row.",
        ) from error


def _role(db: Database) -> str:
    with db.transaction():
        return str(db.value("SELECT current_user"))


def create(db: Database, wanted: Plan, name: str, *, how: str = "", only: str = "") -> None:
    db.run(
        "CREATE INDEX {how}{index} ON {only}{table} USING {method} ({expression}) WITH ({options})",
        how=SQL(how),
        index=quote(name),
        only=SQL(only),
        method=SQL(wanted.method),
        expression=wanted.expression,
        options=wanted.options,
    )


def mark(ctx: Context, table_oid: int) -> None:
    """By which it is known to be ours when the table has got another name."""
    db, target = ctx.db, ctx.target
    names = {"index": quote(target.index), "comment": literal(target.index_comment)}
    what = f"marking index {quote(target.index)}"

    def change() -> None:
        db.run("COMMENT ON INDEX {schema}.{index} IS {comment}", **names)

    locks.retried(db, ctx.settings.lock_timeout_ms, table_oid, what, change)


def of_the_run(error: DBAPIError) -> bool:
    """Whether it ends the run: another one may well build what this one couldn't."""
    state = sqlstate(error)
    return state is None or error.connection_invalidated or state.startswith(OF_THE_RUN)


def _require_halves(ctx: Context) -> None:
    """Raises CannotBuild where a row holds what a half can't: the build would end at it."""
    db, target = ctx.db, ctx.target
    with db.transaction(snapshot=True):
        table = catalog.table(db, target.schema, target.table)
        names: dict[str, Fragment] = {"limit": HALF_OVERFLOW, **catalog.require_extension(db).names()}
        such = BLOCKS.overflows_half
        rows = db.value("SELECT count(*) FROM {table} WHERE " + such, **names)
        few = ", ".join(keys_where(db, table, such, (), SHOWN_KEYS, **names)) if rows and table else ""
    if rows:
        raise CannotBuild(
            f"no index on the cast of {quote(target.vector)} of {target} to halfvec: {rows:,} rows hold values beyond"
            f" ±{HALF_MOST:,}",
            detail=f"Such as {few}.",
            hint=f"Mend those rows, then: {INDEX_ANEW}. Up to {INDEX_DIMENSIONS:,} dimensions OM_INDEX_HALFVEC=off does"
            " without the cast.",
        )


def _clean_up(ctx: Context, table_oid: int) -> None:
    """After a build that failed or was stopped: not at the price of waiting for whoever has read the table."""
    try:
        why = "is invalid, as its build has not come to its end"
        drop_ours(ctx, table_oid, why, CLEAN_UP_TIMEOUT, valid=False)
    except (MigrationError, DBAPIError) as error:
        problem = as_migration_error(error, "cleaning up") if isinstance(error, DBAPIError) else error
        log.warning(problem.message, detail="The next run drops it.")


def memory_for(db: Database, settings: Settings, wanted: Plan) -> int:
    """maintenance_work_mem for the build, in kB: what is configured, or what it needs as far as there is so much."""
    with db.transaction():
        given, most = _memory(db, settings)
    if found := scarce(wanted, most):
        log.warning(found[0], hint=found[1])
    return max(given, min(wanted.memory_kb, most))


def most_memory(db: Database, settings: Settings) -> int:
    """The most that a build gets, in kB."""
    return _memory(db, settings)[1]


def _memory(db: Database, settings: Settings) -> tuple[int, int]:
    """maintenance_work_mem, and the most that a build gets, in kB. Behind a pooler a session has what its role has."""
    ((given, most),) = db.rows(BLOCKS.memory)
    if db.pooled:
        return given, given
    if settings.index_memory:
        return settings.index_memory, settings.index_memory
    return given, most
