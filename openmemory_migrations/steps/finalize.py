"""Third step: looks at what has been done, builds the index, and says how to use it."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.exc import DBAPIError

from .. import log
from ..backfill.leftovers import leftovers
from ..columns import guard
from ..db import catalog, citus, partitions
from ..db.context import Context, VectorContext
from ..db.sqlerrors import as_migration_error
from ..errors import ANEW, Changed, MigrationError
from ..index import build, partitioned, replacement
from ..index.build import CannotBuild
from ..index.choice import NoIndex, Plan
from ..sql import quote
from ..verify import verification
from ..verify.search import listed
from . import interference, repair

WANTED_RECALL = 0.95
MEASURE = "openmemory-migrations verify measures it, and says which settings find enough."
GLANCE_BYTES = 64 * 1024**3  # of a table whose rows are looked through for some to ask with
TABLE_SIZE = "SELECT coalesce(sum(pg_catalog.pg_table_size(oid)), 0) FROM unnest(CAST(:tables AS oid[])) AS oid"


def upgrade(ctx: VectorContext) -> None:
    """Never fails for an index that can't be had, as the SQL that it mirrors promises; the log says why."""
    db, target = ctx.db, ctx.target
    guard.take_back(db)  # of a downgrade that was killed or refused
    size = ctx.table.columns[target.vector].dimensions
    if size is None:
        log.notice(
            f"column {quote(target.vector)} of {target} has no dimensions (typmod), so it can't be indexed",
            hint=f"Set OM_VEC_DIM or OM_TIER, then: {ANEW}.",
        )
    with db.transaction():
        followed = catalog.trigger_enabled(db, ctx.table.oid, target.sync)
        others = list(interference.of_sync(ctx)) if followed else []
        for fault in repair.broken(ctx) if followed else ():
            raise MigrationError(
                fault.message,
                detail="What was written since has a stale vector.",
                hint=f"{repair.REPAIR}, then {repair.COMPARE}.",
            )
        spread = citus.shards(db, ctx.table.oid)
    if others and not spread:
        _compare(ctx, others)
    left = leftovers(ctx)
    if left.convertible:
        log.warning(
            f"{left.convertible:,} rows of {target} have {quote(target.source)} but no {quote(target.vector)}",
            hint="alembic downgrade om_20240107_pgvector, then alembic upgrade head.",
        )
    with db.transaction(snapshot=True):
        rows = build.count_vectors(db)
    if not followed:
        log.warning(
            f"nothing keeps {quote(target.vector)} of {target} in step with {quote(target.source)}",
            detail="The application writes only the latter: rows written from now on have no vector, or a stale one.",
            hint=f"Unless something of yours does it, set OM_SYNC_TRIGGER=on, then: {ANEW}.",
        )
    if left.skipped:
        log.notice(f"{left.skipped:,} rows of {target} have no vector", detail=f"{left.summary()}.")

    if built := ensure_index(ctx, rows):
        advise(ctx, built)
    log.notice(
        f"OpenMemory 1.x asks for {quote(target.vector)} by information_schema.columns.data_type, in vain",
        detail="That is USER-DEFINED for every pgvector column."
        f" What it should ask: {target.detection}; the answer is vector.",
    )


def _compare(ctx: VectorContext, others: Sequence[MigrationError]) -> None:
    """Every row, to the bit, where a trigger of others' may have made another vector, or other bytes, than ours saw.

    Raises MigrationError, but not for rows without a vector, which the backfill has told of.
    """
    found = verification.compare(ctx)
    if not found.unseen and found.wrong.keys() <= {"missing"}:
        log.notice(f"every row of {ctx.target} was compared to the bit: {found.equal:,} are equal")
        return
    raise MigrationError(
        f"{found.not_right:,} rows of {ctx.target} are not right",
        detail=f"{found.problems(ctx.table)} Perhaps by what was warned of: {others[0].message}.",
        hint=f"{others[0].hint} Then UPDATE … SET {quote(ctx.target.source)} = {quote(ctx.target.source)} for those"
        " rows, and the same command again.",
    )


def ensure_index(ctx: VectorContext, rows: int) -> Plan | None:
    """Leaves the wanted index in place and returns it; where it can't, the log says why."""
    table = ctx.table
    if table.kind == "r":
        build.drop_invalid(ctx, table.oid)
    wanted = build.plan(ctx, rows)
    if isinstance(wanted, NoIndex):
        build.say_none(ctx.target, wanted)
        return None
    try:
        if table.kind == "p":
            return partitioned.ensure(ctx)
        build.ensure(ctx, table.oid, wanted)
    except CannotBuild as problem:
        build.say(problem)
        return None
    return wanted


def downgrade(ctx: Context) -> None:
    """Takes the index away, under whichever of its names."""
    db, target = ctx.db, ctx.target
    with db.reading():
        table = catalog.table(db, target.schema, target.table)
        ours = catalog.own_indexes(db, target, table.oid) if table else {}
    db.take_over()
    if table is not None:
        replacement.drop_left(ctx.with_table(table))
    if table is not None and table.kind == "p":
        if partitioned.drop(ctx.with_table(table)):
            log.notice(f"index {quote(target.index)} of {target} and its partitions dropped")
        else:
            log.notice(f"index {quote(target.index)} of {target} does not exist, skipping")
        return
    for name in ours:
        build.drop(db, name)
        log.notice(f"index {quote(name)} of {target} dropped")
    if not ours:
        log.notice(f"index {quote(target.index)} of {target} does not exist, skipping")


def advise(ctx: VectorContext, built: Plan) -> None:
    """Says how a search has to ask for the index to be used, and what it finds of the true neighbours."""
    db, target = ctx.db, ctx.target
    log.notice(f"searches use index {quote(target.index)} when they say: {built.query} LIMIT …")
    if target.vector == target.source or target.source not in ctx.table.columns:
        return  # a table without bytes: verify measures it
    with db.transaction():
        spread = citus.shards(db, ctx.table.oid)
        tables = [part.oid for part in partitions.leaves(db, ctx.table.oid)]
        size = db.value(TABLE_SIZE, {"tables": tables})
    if spread or size > GLANCE_BYTES:
        log.notice(
            "what they find of the true neighbours is not measured in a table as large as this",
            hint=MEASURE,
        )
        return
    try:
        found = verification.glance(ctx, WANTED_RECALL, ctx.settings.lock_timeout_ms)
    # the index is in place, and that is what this step is for
    except (Changed, verification.TooLong) as problem:
        log.notice(f"what they find is not measured: {problem.message}", hint=MEASURE)
        return
    except DBAPIError as error:
        if error.connection_invalidated:
            raise
        log.notice(as_migration_error(error, "what they find can't be measured").message)
        return
    if found is None or found.session.all.recall is None:
        return
    short = found.session.all.short
    if found.session.all.recall >= WANTED_RECALL and not short:
        hint = None
    elif found.enough:
        reached = log.share(found.enough.all.recall or 0)
        hint = f"With {found.enough.way.sql} they find {reached}. openmemory-migrations verify measures more."
    else:
        hint = "No setting finds enough; openmemory-migrations tune looks for a better index."
    log.notice(
        f"with what a session has by default ({listed(found.defaults)}) they find"
        f" {log.share(found.session.all.recall)} of the true neighbours,"
        f" by {found.queries:,} of the table's own rows within their sectors",
        detail=f"{short:,} of them bring fewer than {verification.GLANCE_K} rows, though there are more."
        if short
        else None,
        hint=hint,
    )
