"""Tables that newer OpenMemory made: `v` holds vectors itself, and gets the dimensions without which it has no index.

An empty table gets them at once: that is how a fresh installation gets going. Rows get them beside: a column that has
them, kept equal to `v` by a trigger, is filled (native_column.py) and takes the place of `v`. A downgrade takes off
what the upgrade gave, known by a COMMENT.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .. import log
from ..columns import guard, properties
from ..db import catalog, citus, locks, partitions
from ..db.catalog import Column
from ..db.context import Context, TableContext, VectorContext
from ..encoding import dimensions
from ..errors import ANEW, MigrationError
from ..index import build, choice, partitioned
from ..sql import SQL, quote
from ..target import Target
from . import expand, finalize, interference, native_column, requirements


@dataclass(frozen=True)
class Look:
    """`size` is what `v` has or is to have, None where nothing says it; `typed` is the column of ours beside it."""

    ctx: VectorContext
    source: Column
    typed: Column | None
    size: int | None
    empty: bool

    @property
    def pending(self) -> int | None:
        """The dimensions that `v` hasn't got yet."""
        return None if self.source.dimensions else self.size


def applies(ctx: Context) -> bool:
    """Whether it is a table of vectors that never were bytes."""
    with ctx.db.reading():
        table = catalog.table(ctx.db, ctx.target.schema, ctx.target.table)
    source = table and table.columns.get(ctx.target.source)
    return bool(source and source.is_vector and not source.cut_over)


def upgrade_expand(ctx: Context) -> Look:
    """Gives an empty table its dimensions, and one with rows the column and its trigger. Raises before any change."""
    with ctx.db.reading():
        found = look(ctx)
    ctx.db.take_over()
    while found.pending and not _begun(found):
        (_at_once if found.empty and not found.typed else _beside)(found, found.pending)
        with ctx.db.transaction(snapshot=True):
            found = look(ctx)
    if found.size is None:
        without, hint = no_dimensions(ctx.target)
        log.notice(without, hint=hint)
    elif found.source.dimensions and not found.source.given:
        log.notice(
            f"column {quote(ctx.target.source)} of {ctx.target} is of type vector({found.size}) already, nothing to do"
        )
    return found


def upgrade_backfill(ctx: Context) -> None:
    """Fills the column with dimensions, and puts it in the place of `v` once each row has been compared."""
    found = upgrade_expand(ctx)
    size = found.pending
    if not size:
        return

    def fill_and_put() -> None:
        native_column.fill(found.ctx, size)
        native_column.take_place(found.ctx)

    locks.decided(fill_and_put)


def upgrade_finalize(ctx: Context) -> None:
    """Builds the index that newer OpenMemory looks for, or another that is configured."""
    at = prepared(ctx).native
    size = at.table.columns[ctx.target.source].dimensions
    if size is None:
        without, hint = no_dimensions(ctx.target)
        log.notice(f"{without}, and no index", hint=hint)
        return
    with at.db.transaction(snapshot=True):
        rows = build.count_vectors(at.db)
    if built := finalize.ensure_index(at, rows):
        finalize.advise(at, built)
    if size > choice.INDEX_DIMENSIONS:
        name = quote(at.target.index)
        log.notice(
            f"newer OpenMemory's own CREATE INDEX can't work with more than {choice.INDEX_DIMENSIONS:,} dimensions",
            detail=f"Where there is an index {name} already it makes none, starts, and searches by reading every row."
            if built
            else f"It starts only where there is an index {name} already.",
        )


def prepared(ctx: Context) -> VectorContext:
    """With the table as it is, everything before it committed."""
    with ctx.db.reading():
        table = requirements.require_table(ctx)
        extension = catalog.require_extension(ctx.db)
    ctx.db.take_over()
    return ctx.with_table(table).with_extension(extension)


def downgrade_finalize(ctx: Context) -> None:
    """Drops the index CONCURRENTLY; newer OpenMemory makes it again when it starts."""
    finalize.downgrade(ctx.native)


def downgrade_expand(ctx: Context) -> None:
    """Takes off the dimensions that the upgrade gave, or what it has begun beside them. Raises before any change."""
    db, target = ctx.db, ctx.target
    with db.reading():
        table = catalog.table(db, target.schema, target.table)
        assert table is not None  # or this would not have been asked for
        source, typed = table.columns[target.source], table.columns.get(target.typed)
        extension = catalog.require_extension(db)
        if source.given:
            there = ctx.with_table(table)
            native_column.refuse_dependents(there, *(name for name, _ in _own_indexes(there)))
    db.take_over()
    if source.dimensions and not source.given:
        log.notice(f"column {quote(target.source)} of {target} has its dimensions from elsewhere, leaving them")

    def change() -> None:
        requirements.lock(ctx.with_table(table))
        guard.drop(db)  # of a run that was killed
        if typed is not None and typed.typed:
            native_column.drop_trigger(db)
            db.run("ALTER TABLE {table} DROP COLUMN IF EXISTS {typed}")
        if source.given:
            # OpenMemory may have made it again since; nobody is kept waiting longer by it than by the lock
            for _, index in _own_indexes(ctx.with_table(table)):
                db.run("DROP INDEX IF EXISTS {index}", index=index)
            native_column.refuse_dependents(ctx.with_table(table))
            was = properties.attributes(db, target.source)
            db.run("ALTER TABLE {table} ALTER COLUMN {source} TYPE {ext}.vector", **extension.names())
            properties.store(db, target.source, was)
            native_column.unmark(ctx, was)

    what = f"taking back what {quote(target.source)} of {target} was given"
    interference.retried(ctx.with_table(table), what, change)
    if source.given:
        log.notice(f"column {quote(target.source)} of {target} has no dimensions again, its values are as they were")
    elif typed is not None and typed.typed:
        log.notice(f"column {quote(target.typed)} of {target} dropped, {quote(target.source)} is as it was")


def look(ctx: Context) -> Look:
    """Asks for all that a step needs, in a transaction that is open. Raises MigrationError for what it would refuse."""
    table = requirements.require_table(ctx)
    found, problems = examine(ctx.with_table(table))
    for _, problem in problems:
        raise problem
    if found.pending:
        for _, problem in interference.of_updates(found.ctx, ctx.settings.lock_timeout_ms):
            raise problem
    return found


def examine(ctx: TableContext) -> tuple[Look, list[tuple[str, MigrationError]]]:
    """What there is, and each reason why it can't be brought any further, with a code for programs."""
    typed = ctx.table.columns.get(ctx.target.typed)
    ours = typed if typed is not None and typed.typed else None
    empty = not ctx.db.value("SELECT EXISTS (SELECT FROM {table})")
    found = Look(
        ctx.with_extension(catalog.require_extension(ctx.db)), ctx.table.columns[ctx.target.source], ours, None, empty
    )
    try:
        found = replace(found, size=_size(found))
    except MigrationError as error:
        return found, [("dimensions", error)]
    return found, list(_problems(found)) if found.pending else []


def _problems(found: Look) -> Iterator[tuple[str, MigrationError]]:
    ctx, target = found.ctx, found.ctx.target
    if not found.empty and found.typed is None and target.typed in ctx.table.columns:
        yield (
            "column-taken",
            MigrationError(
                f"{target} has a column {quote(target.typed)} that is not this package's",
                hint="Rename or drop that column: one of that name is to take the place of"
                f" {quote(target.source)}, with dimensions.",
            ),
        )
    if not found.empty and found.typed is None:
        for full in requirements.unmet(ctx, requirements.BLOCKS.room):
            if full.severity == "error":
                yield full.code, full.error
    if not found.empty and citus.shards(ctx.db, ctx.table.oid):
        yield (
            "engine",
            MigrationError(
                f"{target} is distributed by Citus: {quote(target.source)} gets its dimensions while it is empty only",
                hint="Create the table anew with dimensions, and copy the rows.",
            ),
        )
    rights = replace(ctx, settings=replace(ctx.settings, sync_trigger=not found.empty))
    for missing in requirements.unmet(rights, requirements.BLOCKS.rights, functions=not found.empty):
        yield missing.code, missing.error
    followed = replace(ctx, settings=replace(ctx.settings, sync_trigger=True))
    for generated in requirements.unmet(followed, requirements.BLOCKS.source_column):
        yield generated.code, generated.error
    if not found.empty:
        for problem in native_column.interfering(ctx):
            yield "interference", problem
    for hanging in native_column.dependents(ctx):
        yield "dependents", hanging


def no_dimensions(target: Target) -> tuple[str, str]:
    """What to say, and the hint, where nothing says how many there are to be."""
    return (
        f"column {quote(target.source)} of {target} has no dimensions, without which newer OpenMemory can't start",
        f"Set OM_VEC_DIM or OM_TIER, then: {ANEW}.",
    )


def _size(found: Look) -> int | None:
    ctx = found.ctx
    column = found.source if found.source.dimensions or found.typed is None else found.typed
    if column.dimensions is None:
        return dimensions.resolve_vectors(
            ctx.target, ctx.settings.dimensions, dimensions.vectors(ctx.db, **ctx.extension.names())
        )
    if ctx.settings.dimensions not in (None, column.dimensions):
        raise MigrationError(
            f"column {quote(column.name)} of {ctx.target} has {column.dimensions:,} dimensions,"
            f" but {ctx.settings.dimensions:,} are configured",
            hint=f"Set OM_VEC_DIM={column.dimensions}"
            + (f", or begin anew: {ANEW}." if column.given or column.typed else ", or leave it and OM_TIER unset."),
        )
    return column.dimensions


def _begun(found: Look) -> bool:
    ctx = found.ctx
    if found.typed is None:
        return False
    with ctx.db.transaction():
        return catalog.trigger_enabled(ctx.db, ctx.table.oid, ctx.target.typing)


def _at_once(found: Look, size: int) -> None:
    ctx, db, target = found.ctx, found.ctx.db, found.ctx.target

    def change() -> bool:
        requirements.lock(ctx)
        if db.value("SELECT EXISTS (SELECT FROM {table})"):
            return False
        was = properties.attributes(db, target.source)
        db.run(
            "ALTER TABLE {table} ALTER COLUMN {source} TYPE {ext}.vector({size})",
            size=size,
            **ctx.extension.names(),
        )
        properties.store(db, target.source, was)
        native_column.mark(ctx, was)
        return True

    what = f"giving {quote(target.source)} of {target} its dimensions"
    if locks.retried(db, ctx.settings.lock_timeout_ms, ctx.table.oid, what, change):
        log.notice(f"column {quote(target.source)} of {target}, which is empty, is of type vector({size}) now")


def _beside(found: Look, size: int) -> None:
    ctx, target = found.ctx, found.ctx.target

    def change() -> None:
        requirements.lock(ctx)
        if found.typed:  # whose trigger somebody has disabled or dropped
            native_column.drop_trigger(ctx.db)
        native_column.create(ctx, size, **ctx.extension.names())

    with ctx.db.transaction():
        added = (target.typed, expand.vector_type(ctx.extension, size))
        interference.require_none(interference.of_whole_rows(ctx, added=added))
    what = f"adding {quote(target.typed)} to {target}"
    interference.retried(ctx, what, change)
    log.notice(
        expand.in_place(target, target.typed, size, expand.origin(ctx.settings)),
        detail=f"Trigger {quote(target.typing)} keeps it equal to {quote(target.source)}, whose place it takes when it"
        " is filled.",
    )


def _own_indexes(ctx: TableContext) -> list[tuple[str, SQL]]:
    """Those on `v` under a name of ours, from the root of a tree down, each with its name in SQL."""
    own = []
    for part in partitions.parts(ctx.db, ctx.table.oid):
        at = partitioned.own(ctx.native, part).target
        own += [(name, quote(at.schema, name)) for name in catalog.own_indexes(ctx.db, at, part.oid, *at.indexes)]
    return own
