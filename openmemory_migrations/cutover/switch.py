"""From two columns to one: first what takes time, while the application writes, then one short transaction."""

from __future__ import annotations

from dataclasses import replace

from .. import log
from ..columns import cutover_mark, guard, properties
from ..columns.cutover_mark import UNDO, Mark
from ..db import catalog, locks, partitions
from ..db.context import Context, TableContext, VectorContext
from ..encoding import back_trigger
from ..errors import Changed
from ..index import build, choice, partitioned
from ..index.build import CannotBuild
from ..index.choice import INDEX_DIMENSIONS, NoIndex
from ..sql import quote
from ..steps import interference, requirements, statements
from . import gate, kept, preparations


def upgrade(ctx: Context) -> None:
    """Raises MigrationError, with nothing changed but that newer OpenMemory's index may be there, unless everything
    that `gate` asks for holds."""
    db, target = ctx.db, ctx.target
    mode = gate.require_mode(ctx.settings, target)
    with db.reading():
        table = requirements.require_table(ctx)
        if found := Mark.of(table, target):
            found.require(mode, target)
            log.notice(f"{found.said(target)}; nothing to do")
            return
        if table.columns[target.source].is_vector:
            log.notice(f"column {quote(target.source)} of {target} is of type vector already, nothing to cut over")
            return
        preparations.require_names(ctx.with_table(table))
        gate.require(ctx.with_table(table))
        gate.warn(ctx.with_table(table))
    db.take_over()
    try:
        done = locks.decided(lambda: _cut_over(ctx, mode))
    except BaseException:
        if db.usable:
            db.rollback()
            preparations.clean_up(ctx.with_table(table))
        raise
    log.notice(
        done.said(target),
        detail=f"A writer that still sends bytes to {quote(target.source)} gets an error from now on.",
        hint=f"The way back: {UNDO}.",
    )


def _newer_index(ctx: VectorContext) -> str | None:
    """Has the index ready that newer OpenMemory makes when it starts, or returns the one that only needs its name.

    For a column of a host's, and with OM_INDEX=none, there is nothing to do.
    """
    db, target, table = ctx.db, ctx.target, ctx.table
    newer = target.newer
    if newer.index_name is None or ctx.settings.index == "none":
        return None
    size = table.columns[target.vector].dimensions or 0
    if size > INDEX_DIMENSIONS:
        log.warning(
            f"newer OpenMemory can't start on vectors of {size:,} dimensions: the index that it makes takes"
            f" {INDEX_DIMENSIONS:,} at most"
        )
        return None
    there = replace(
        ctx, target=newer, settings=replace(ctx.settings, index="hnsw", index_metric="cosine", index_halfvec=False)
    )
    with db.transaction(snapshot=True):
        rows = build.count_vectors(db)
    wanted = choice.plan(newer, there.settings, ctx.extension, size, rows)
    if isinstance(wanted, NoIndex):
        build.say_none(newer, wanted)
        return None
    with db.transaction():
        own = catalog.indexes(db, target.schema, target.index).get(target.index)
        taken = catalog.relation_exists(db, target.schema, newer.index)
    if own and own.valid and own.table_oid == table.oid and wanted.matches(own) and not taken:
        return own.name
    try:
        if table.kind == "p":
            partitioned.ensure(there)
        else:
            build.drop_invalid(there, table.oid)
            build.ensure(there, table.oid, wanted)
    except CannotBuild as problem:
        build.say(problem)
    return None


def _cut_over(ctx: Context, mode: str) -> Mark:
    """Looks, prepares and switches; raises Changed where the table isn't what it was, and that has to be done again."""
    db, target = ctx.db, ctx.target
    with db.transaction():
        table = requirements.require_table(ctx)
        ready = ctx.with_table(table).with_extension(catalog.require_extension(db))
        gate.require(ready)
        leaves = partitions.leaves(db, table.oid)
        not_null = properties.attributes(db, target.source).not_null
    # of a run before, or the last look: not while all rows are compared
    preparations.unprove(ready)
    to_leave = gate.require_rows(ready)
    renamed = _newer_index(ready) if mode == "swap" else None
    if not to_leave:
        preparations.index_left(ctx, leaves)
    with guard.against(ready, guard.BYTES):
        skipped, seen = gate.verify(ready)
        if skipped:
            # which would point to rows that have left, and the switch would visit them one by one
            preparations.drop_left(ctx, leaves)
            kept.move_out(ready)
        preparations.index_left(ctx, leaves)
        with db.transaction():
            away = kept.count(db)
        if mode == "drop" and not_null:
            properties.require_values(ready, target.source)
        if mode == "swap" and not_null:
            # last: it refuses rows that no vector can hold, which others may still write
            properties.prove_not_null(ready, target.vector)

        def switch() -> Mark:
            if (
                properties.attributes(db, target.source).not_null != not_null
                or partitions.leaves(db, table.oid) != leaves
            ):
                raise Changed(f"{target} was changed just now")  # and its rows would have to be read, to switch
            return _switch(ready, mode, renamed, away)

        return interference.retried(ready, f"the cutover of {target}", switch, seen)


def _switch(ctx: TableContext, mode: str, renamed: str | None, away: int) -> Mark:
    """The one transaction in which anything is different for others; `away` are the rows that have left before."""
    db, target = ctx.db, ctx.target
    guard.drop(db)
    gate.require_trigger(ctx)
    gate.require_dependents(ctx)
    left = kept.count_left(db)
    if left > kept.FEW:
        raise Changed(f"more than {kept.FEW} rows of {target} have come that no vector can hold")
    gate.require_accepted(ctx, left, away)
    if left:
        kept.take_last(ctx, left)
    parts = partitions.parts(db, ctx.table.oid)
    source, vector = properties.attributes(db, target.source), properties.attributes(db, target.vector)
    dimensions = ctx.table.columns[target.vector].dimensions
    statements.run(ctx, statements.BLOCKS.remove_trigger)
    preparations.drop_left_at_once(ctx, parts)
    if mode == "drop":
        grants = properties.grants(db, parts, target.source)
        of_parts = {name: theirs for name, theirs in grants.items() if theirs and name != db.names["table"]}
        found = Mark("drop", source, vector, parts=of_parts, dimensions=dimensions, kept=away + left)
        db.run("ALTER TABLE {table} DROP COLUMN {source}")
        properties.comment(db, target.vector, found.text)
        return found
    found = Mark("swap", source, vector, renamed, dimensions=dimensions, kept=away + left)
    if source.not_null:
        properties.require(db, target.source, not_null=False)
    if source.default is not None:
        properties.set_default(db, target.source, None)
    # the source's default is one of bytes; what the vectors have of their own stays
    wanted = replace(source, default=vector.default, not_null=source.not_null or vector.not_null)
    properties.exchange(db, parts, target.vector, target.source, target.archive, wanted)
    properties.comment(db, target.source, found.text)
    back_trigger.forget(db.at(cutover_mark.names(target.swapped)))
    if renamed:
        db.run("ALTER INDEX {schema}.{index} RENAME TO {to}", index=quote(renamed), to=quote(target.newer.index))
    return found
