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
from ..db.catalog import Column, Extension, Table
from ..db.database import Database
from ..encoding import dimensions
from ..errors import ANEW, MigrationError
from ..index import choice, partitioned
from ..settings import Settings
from ..target import Target, quote
from . import checks, finalize, interference, native_column


@dataclass(frozen=True)
class Look:
    """`size` is what `v` has or is to have, None where nothing says it; `typed` is the column of ours beside it."""

    table: Table
    extension: Extension
    source: Column
    typed: Column | None
    size: int | None
    empty: bool

    @property
    def pending(self) -> int | None:
        """The dimensions that `v` hasn't got yet."""
        return None if self.source.dimensions else self.size


def applies(db: Database, target: Target) -> bool:
    """Whether it is a table of vectors that never were bytes."""
    with db.reading():
        table = catalog.table(db, target.schema, target.table)
    source = table and table.columns.get(target.source)
    return bool(source and source.is_vector and not source.cut_over)


def upgrade_expand(db: Database, target: Target, settings: Settings) -> Look:
    """Gives an empty table its dimensions, and one with rows the column and its trigger. Raises before any change."""
    with db.reading():
        found = look(db, target, settings)
    db.take_over()
    while found.pending and not _begun(db, target, found):
        (_at_once if found.empty and not found.typed else _beside)(db, target, settings, found, found.pending)
        with db.transaction(snapshot=True):
            found = look(db, target, settings)
    if found.size is None:
        without, hint = no_dimensions(target)
        log.notice(without, hint=hint)
    elif found.source.dimensions and not found.source.given:
        log.notice(f"column {quote(target.source)} of {target} is of type vector({found.size}) already, nothing to do")
    return found


def upgrade_backfill(db: Database, target: Target, settings: Settings) -> None:
    """Fills the column with dimensions, and puts it in the place of `v` once each row has been compared."""
    found = upgrade_expand(db, target, settings)
    size = found.pending
    if not size:
        return

    def fill_and_put() -> None:
        native_column.fill(db, target, settings, found.table, found.extension, size)
        native_column.take_place(db, target, settings, found.extension)

    locks.decided(fill_and_put)


def upgrade_finalize(db: Database, target: Target, settings: Settings) -> None:
    """Builds the index that newer OpenMemory looks for, or another that is configured."""
    table, extension = prepared(db, target)
    size = table.columns[target.source].dimensions
    if size is None:
        without, hint = no_dimensions(target)
        log.notice(f"{without}, and no index", hint=hint)
        return
    at = db.at(target.native.names())
    with at.transaction(snapshot=True):
        rows = at.value("SELECT count(*) FROM {table} WHERE {vector} IS NOT NULL")
    if built := finalize.ensure_index(at, target.native, settings.native, table, extension, rows):
        finalize.advise(at, target.native, settings.native, table, extension, built)
    if size > choice.INDEX_DIMENSIONS:
        name = quote(target.native.index)
        log.notice(
            f"newer OpenMemory's own CREATE INDEX can't work with more than {choice.INDEX_DIMENSIONS:,} dimensions",
            detail=f"Where there is an index {name} already it makes none, starts, and searches by reading every row."
            if built
            else f"It starts only where there is an index {name} already.",
        )


def prepared(db: Database, target: Target) -> tuple[Table, Extension]:
    """The table as it is, everything before it committed."""
    with db.reading():
        table = checks.require_table(db, target)
        extension = catalog.extension(db)
    db.take_over()
    assert extension is not None  # there is a column of its type
    return table, extension


def downgrade_finalize(db: Database, target: Target, settings: Settings) -> None:
    """Drops the index CONCURRENTLY; newer OpenMemory makes it again when it starts."""
    finalize.downgrade(db.at(target.native.names()), target.native, settings.native)


def downgrade_expand(db: Database, target: Target, settings: Settings) -> None:
    """Takes off the dimensions that the upgrade gave, or what it has begun beside them. Raises before any change."""
    with db.reading():
        table = catalog.table(db, target.schema, target.table)
        assert table is not None  # or this would not have been asked for
        source, typed = table.columns[target.source], table.columns.get(target.typed)
        extension = catalog.extension(db)
        assert extension is not None
        if source.given:
            native_column.refuse_dependents(db, target, table, *(name for name, _ in _own_indexes(db, target, table)))
    db.take_over()
    if source.dimensions and not source.given:
        log.notice(f"column {quote(target.source)} of {target} has its dimensions from elsewhere, leaving them")

    def change() -> None:
        checks.lock(db, target, table)
        guard.drop(db)  # of a run that was killed
        if typed is not None and typed.typed:
            native_column.drop_trigger(db)
            db.run("ALTER TABLE {table} DROP COLUMN IF EXISTS {typed}")
        if source.given:
            # OpenMemory may have made it again since; nobody is kept waiting longer by it than by the lock
            for _, statement in _own_indexes(db, target, table):
                db.run("{it}", it=statement)
            native_column.refuse_dependents(db, target, table)
            was = properties.attributes(db, target.source)
            db.run("ALTER TABLE {table} ALTER COLUMN {source} TYPE {ext}.vector", **extension.names())
            properties.store(db, target.source, was)
            native_column.unmark(db, target, was)

    what = f"taking back what {quote(target.source)} of {target} was given"
    locks.retried(db, settings.lock_timeout_ms, table.oid, what, lambda: interference.tried(db, target, change))
    if source.given:
        log.notice(f"column {quote(target.source)} of {target} has no dimensions again, its values are as they were")
    elif typed is not None and typed.typed:
        log.notice(f"column {quote(target.typed)} of {target} dropped, {quote(target.source)} is as it was")


def look(db: Database, target: Target, settings: Settings) -> Look:
    """Asks for all that a step needs, in a transaction that is open. Raises MigrationError for what it would refuse."""
    table = checks.require_table(db, target)
    found, problems = examine(db, target, settings, table)
    for _, problem in problems:
        raise problem
    if found.pending:
        for _, problem in interference.of_the_table(db, target, found.table, settings.lock_timeout_ms):
            raise problem
    return found


def examine(
    db: Database, target: Target, settings: Settings, table: Table
) -> tuple[Look, list[tuple[str, MigrationError]]]:
    """What there is, and each reason why it can't be brought any further, with a code for programs."""
    extension = catalog.extension(db)
    assert extension is not None  # there is a column of its type
    typed = table.columns.get(target.typed)
    ours = typed if typed is not None and typed.typed else None
    empty = not db.value("SELECT EXISTS (SELECT FROM {table})")
    found = Look(table, extension, table.columns[target.source], ours, None, empty)
    try:
        found = replace(found, size=_size(db, target, settings, found))
    except MigrationError as error:
        return found, [("dimensions", error)]
    return found, list(_problems(db, target, settings, found)) if found.pending else []


def _problems(db: Database, target: Target, settings: Settings, found: Look) -> Iterator[tuple[str, MigrationError]]:
    if not found.empty and found.typed is None and target.typed in found.table.columns:
        yield (
            "column-taken",
            MigrationError(
                f"{target} has a column {quote(target.typed)} that is not this package's",
                hint="Rename or drop that column: one of that name is to take the place of"
                f" {quote(target.source)}, with dimensions.",
            ),
        )
    if not found.empty and citus.shards(db, found.table.oid):
        yield (
            "engine",
            MigrationError(
                f"{target} is distributed by Citus: {quote(target.source)} gets its dimensions while it is empty only",
                hint="Create the table anew with dimensions, and copy the rows.",
            ),
        )
    for missing in checks.missing_rights(db, target, found.table, replace(settings, sync_trigger=not found.empty)):
        yield "rights", missing
    if not found.empty:
        for problem in native_column.interfering(db, target, found.table):
            yield "interference", problem
    for hanging in native_column.dependents(db, target, found.table):
        yield "dependents", hanging


def no_dimensions(target: Target) -> tuple[str, str]:
    """What to say, and the hint, where nothing says how many there are to be."""
    return (
        f"column {quote(target.source)} of {target} has no dimensions, without which newer OpenMemory can't start",
        f"Set OM_VEC_DIM or OM_TIER, then: {ANEW}.",
    )


def _size(db: Database, target: Target, settings: Settings, found: Look) -> int | None:
    column = found.source if found.source.dimensions or found.typed is None else found.typed
    if column.dimensions is None:
        return dimensions.resolve_vectors(
            target, settings.dimensions, dimensions.vectors(db, **found.extension.names())
        )
    if settings.dimensions not in (None, column.dimensions):
        raise MigrationError(
            f"column {quote(column.name)} of {target} has {column.dimensions:,} dimensions,"
            f" but {settings.dimensions:,} are configured",
            hint=f"Set OM_VEC_DIM={column.dimensions}"
            + (f", or begin anew: {ANEW}." if column.given or column.typed else ", or leave it and OM_TIER unset."),
        )
    return column.dimensions


def _begun(db: Database, target: Target, found: Look) -> bool:
    if found.typed is None:
        return False
    with db.transaction():
        return catalog.trigger_enabled(db, found.table.oid, target.typing)


def _at_once(db: Database, target: Target, settings: Settings, found: Look, size: int) -> None:
    def change() -> bool:
        checks.lock(db, target, found.table)
        if db.value("SELECT EXISTS (SELECT FROM {table})"):
            return False
        was = properties.attributes(db, target.source)
        db.run(
            "ALTER TABLE {table} ALTER COLUMN {source} TYPE {ext}.vector({size})",
            size=str(size),
            **found.extension.names(),
        )
        properties.store(db, target.source, was)
        native_column.mark(db, target, was)
        return True

    what = f"giving {quote(target.source)} of {target} its dimensions"
    if locks.retried(db, settings.lock_timeout_ms, found.table.oid, what, change):
        log.notice(f"column {quote(target.source)} of {target}, which is empty, is of type vector({size}) now")


def _beside(db: Database, target: Target, settings: Settings, found: Look, size: int) -> None:
    def change() -> None:
        checks.lock(db, target, found.table)
        if found.typed:  # whose trigger somebody has disabled or dropped
            native_column.drop_trigger(db)
        native_column.create(db, target, size, **found.extension.names())

    what = f"adding {quote(target.typed)} to {target}"
    locks.retried(db, settings.lock_timeout_ms, found.table.oid, what, lambda: interference.tried(db, target, change))
    log.notice(
        f"column {quote(target.typed)} of {target} is in place: vector({size}), dimensions"
        f" {'as configured' if settings.dimensions else 'as the rows have them'}",
        detail=f"Trigger {quote(target.typing)} keeps it equal to {quote(target.source)}, whose place it takes when it"
        " is filled.",
    )


def _own_indexes(db: Database, target: Target, table: Table) -> list[tuple[str, str]]:
    """Those on `v` under a name of ours, from the root of a tree down, each with the statement that drops it."""
    own = []
    for part in partitions.parts(db, table.oid):
        _, at = partitioned.own_target(db, target.native, part)
        for index in catalog.indexes_on(db, part.oid):
            if index.name in at.indexes and choice.of_all_rows(index, target.source):
                own.append((index.name, f"DROP INDEX IF EXISTS {quote(at.schema)}.{quote(index.name)}"))
    return own
