"""The way back: the bytes are rebuilt from the vectors while the application writes, then one short transaction.

Both modes go the same way. A row is pending while it has a vector and no bytes: after a drop every row, after a swap
those that were written since. Whoever is interrupted goes on where it was.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from .. import log
from ..backfill import claims
from ..backfill.claims import Claims
from ..backfill.client import ClientEngine
from ..backfill.pace import Pace
from ..backfill.passes import Obstacles, until_none_is_left
from ..backfill.progress import Progress
from ..backfill.reader import BACK
from ..columns import cutover_mark, guard, properties
from ..columns.cutover_mark import Mark
from ..db import catalog, locks, partitions, replication
from ..db.catalog import Table
from ..db.context import Context, TableContext, VectorContext
from ..db.database import Database, Seen
from ..encoding import back_trigger
from ..errors import Changed, MigrationError
from ..index import replacement
from ..sql import quote
from ..steps import interference, requirements, statements
from ..target import Target
from ..verify import verification
from . import kept, preparations

PENDING = "{vector} IS NOT NULL AND {source} IS NULL"


def downgrade(ctx: Context) -> None:
    """Leaves the table as it was before the cutover, with what was written since. Raises MigrationError."""
    db, target = ctx.db, ctx.target
    with db.reading():
        table = requirements.require_table(ctx)
        found = Mark.of(table, target)
        if found is None and catalog.trigger_enabled(db, table.oid, target.back):
            raise cutover_mark.changed(target, target.source)
    if found is None:
        db.take_over()
        replacement.drop_left(ctx.with_table(table))  # by a run that was interrupted after its switch
        if not table.columns[target.source].is_vector:
            # by one that was before it, or of rows that had to stay
            preparations.take_back(ctx.with_table(table))
        log.notice(f"{target} is not cut over, nothing to undo")
        return
    with db.reading():
        requirements.require(ctx, requirements.BLOCKS.rights)
        found.require_names(table, target)
        found.require_dimensions(table, target)
        missing = kept.require(ctx.with_table(table), found.kept, ctx.settings.accept_loss)
        kept.require_owned(db)
        ready = ctx.with_table(table).with_extension(catalog.require_extension(db))
    if missing:
        log.warning(
            f"{missing:,} rows that left {target} at its cutover are lost,"
            f" as OM_ACCEPT_LOSS={ctx.settings.accept_loss} accepts"
        )
    db.take_over()
    locks.decided(lambda: _undo(ready, found))
    replacement.drop_left(ready)
    log.notice(
        f"the cutover of {target} is undone: {quote(target.source)} holds bytes again, and trigger"
        f" {quote(target.sync)} keeps {quote(target.vector)} equal to them",
        detail=f"A writer that still sends vectors to {quote(target.source)} gets an error from now on."
        if found.mode == "swap"
        else f"A writer that still sends vectors to {quote(target.vector)} gets no error, and its rows no bytes.",
    )
    # where they fit again: after a swap their column is a vector, and after a drop it may have to be NOT NULL
    kept.put_back(ready)


def _undo(ctx: VectorContext, found: Mark) -> None:
    """Rebuilds, compares and switches; raises Changed where the table isn't what it was, and that has to be done
    again."""
    target = ctx.target
    at = replace(ctx, db=ctx.db.at(cutover_mark.names(found.now(target))), target=found.now(target))
    at = _begin(ctx, at, found)
    _rebuild(at, target)
    with guard.against(at, guard.VECTORS):
        seen = _verify(at, target)
        if found.source.not_null:
            properties.prove_not_null(at.of(target), at.target.source)
        there = replace(ctx, table=at.table)
        replacement.drop_left(there)
        what = f"undoing the cutover of {target}"
        interference.retried(there, what, lambda: _switch(there, at.db, found), seen)


def _begin(ctx: VectorContext, at: VectorContext, found: Mark) -> VectorContext:
    """From here on what is written has its bytes; returns `at`, which has the columns' names of now, with the table
    and its column for them."""
    db, target = at.db, ctx.target
    with db.transaction():
        table = requirements.require_table(ctx.by(db))
        interference.require_none(interference.overriding(db, table, target.back, at.target.vector, at.target.source))
        for _, problem in interference.of_updates(at.with_table(table), ctx.settings.lock_timeout_ms):
            raise problem
        to_add = target.archive not in table.columns
        for one in replication.of_bytes(at.of(target).with_table(table), target.archive) if to_add else ():
            log.warning(one.message, detail=one.detail, hint=one.hint)
    found.require_names(table, target)

    def change() -> Table:
        if to_add:
            db.run("ALTER TABLE {table} ADD COLUMN {source} bytea")
            properties.store(db, target.archive, found.source)
        back_trigger.follow(db)
        begun = catalog.table(db, target.schema, target.table)
        assert begun is not None
        return begun

    what = f"preparing {target} for its bytes"
    return replace(at, table=interference.retried(ctx.by(db).with_table(table), what, change))


def _rebuild(ctx: VectorContext, target: Target) -> None:
    """Passes, until one snapshot finds no row that has a vector and no bytes; `target` is what the table was."""
    db = ctx.db
    size = ctx.table.columns[ctx.target.vector].dimensions
    assert size is not None  # the mark has been asked for it
    what = f"rebuilding {quote(target.source)} of {target.table}"
    with db.transaction():
        pace = Pace(db, ctx.settings)
    engine = ClientEngine(ctx, BACK)

    def once(obstacles: Obstacles) -> tuple[int, int]:
        with db.transaction(snapshot=True):
            rows = _pending(db)
        workers = [Claims(True) for _ in range(ctx.settings.backfill_workers)]
        others = partial(claims.of_others, workers)
        progress = Progress(what, rows, _pending, others, doing="rebuild", obstacles=obstacles)
        if rows:
            with progress.shown():
                engine.walk(size, workers, progress, pace)
            progress.tell()
        return progress.converted, rows

    until_none_is_left(
        db,
        ctx.table,
        what,
        once,
        pending=PENDING,
        otherwise=f"rows of {target} still have no bytes",
        hint=f"Mend what keeps them as they are, or end what writes past trigger {quote(target.back)}; then run the"
        " same command again.",
    )


def _pending(db: Database) -> int:
    return int(db.value("SELECT count(*) FROM {table} WHERE " + PENDING))


def _verify(ctx: VectorContext, target: Target) -> Seen:
    """Returns what the switch has to find again.

    Kept bytes may be another vector's by now, if that was written past the trigger: nothing tells which is right.
    """
    now = ctx.target
    found = verification.compare(ctx)
    if found.fine:
        log.notice(f"every row of {target} is verified to the bit: {found.rows:,} rows, {found.equal:,} equal")
        return found.seen
    raise MigrationError(
        f"in {found.not_right:,} rows of {target} {quote(now.source)} is not what {quote(now.vector)} says",
        detail=f"{found.problems(ctx.table)} They were written past the trigger.",
        hint=f"If the vectors are right, UPDATE … SET {quote(now.source)} = NULL for those rows; if the bytes are, mend"
        f" {quote(now.vector)}. Then the same command again.",
    )


def _switch(ctx: VectorContext, at: Database, found: Mark) -> None:
    db, target, table = ctx.db, ctx.target, ctx.table
    if not catalog.trigger_enabled(db, table.oid, target.back):
        raise Changed(f"trigger {quote(target.back)} of {target} is missing or disabled")
    now = found.now(target)
    interference.require_none(interference.overriding(at, table, target.back, now.vector, now.source))
    guard.drop(at)
    back_trigger.drop(at)
    parts = partitions.parts(db, table.oid)
    if found.mode == "swap":
        if properties.attributes(db, target.source).not_null and not found.vector.not_null:
            properties.require(db, target.source, not_null=False)
        properties.exchange(db, parts, target.archive, target.source, target.vector, found.source)
    else:
        of_bytes = {db.names["table"]: found.source.grants, **found.parts}
        properties.take_place(db, parts, target.archive, target.source, found.source, of_bytes)
    properties.comment(db, target.source, found.source.comment)
    properties.comment(db, target.vector, target.comment)
    statements.run(ctx, statements.BLOCKS.add_trigger, table.columns[found.now(target).vector].dimensions)
    if found.mode == "swap":
        _rename_index(ctx, found)


def _rename_index(ctx: TableContext, found: Mark) -> None:
    """Newer OpenMemory's gets the name back that it had, or one under which it is dropped when there is time."""
    target = ctx.target
    newer = target.newer.index
    if target.newer.index_name and catalog.own_indexes(ctx.db, target, ctx.table.oid, newer):
        to = quote(found.renamed or target.old.index)
        ctx.db.run("ALTER INDEX {schema}.{index} RENAME TO {to}", index=quote(newer), to=to)
