"""First step: the extension, the column, the trigger. Quick whatever the table's size, and nothing is rewritten."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy.exc import DBAPIError

from .. import log
from ..backfill.passes import is_a_rows
from ..columns import guard
from ..db import catalog, locks
from ..db.catalog import Column, Extension
from ..db.context import Context, TableContext
from ..db.database import Database
from ..db.sqlerrors import as_migration_error, sqlstate
from ..encoding import dimensions
from ..encoding.stored import STORED
from ..errors import ANEW, MigrationError
from ..settings import Settings
from ..sql import SQL, blocks, fill, quote
from ..target import Target
from . import interference, requirements, statements

BLOCKS = blocks("steps")

FOR_AN_INDEX = "For an index, set OM_VEC_DIM or OM_TIER"


def upgrade(ctx: Context) -> None:
    """Adds `v_vector` and its trigger, or finishes what an interrupted run has begun. Raises before any change."""
    db, target, settings = ctx.db, ctx.target, ctx.settings
    with db.reading():
        table = requirements.require_table(ctx)
        if requirements.already_vector(table, target):
            return
        requirements.require(ctx, *requirements.OF_EXPAND)
        extension = catalog.extension(db)
        size = _dimensions(ctx.with_table(table), extension)
        column = table.columns.get(target.vector)
        for _, problem in interference.of_updates(ctx.with_table(table), settings.lock_timeout_ms):
            raise problem
        interfering = list(interference.of_sync(ctx.with_table(table)))
        if column is not None and not column.ours:
            # which goes in the end, and what was in it with it
            interference.require_none(interfering)
    # still in Alembic's transaction: refused, it takes even the version table back
    extension = extension or _create_extension(db)
    db.take_over()

    interference.warn(interfering)
    if column is None:
        with db.transaction():
            added = (target.vector, vector_type(extension, size))
            interference.require_none(interference.of_whole_rows(ctx.with_table(table), added=added))
    what = f"adding {quote(target.vector)} to {target}"

    def change() -> None:
        requirements.lock(ctx.with_table(table))
        statements.run(ctx, statements.BLOCKS.add_column, size)
        if settings.sync_trigger:
            statements.run(ctx, statements.BLOCKS.add_trigger, size)

    interference.retried(ctx.with_table(table), what, change)
    log.notice(
        in_place(
            target, target.vector, size, origin(settings) if size and (column is None or not column.ours) else None
        ),
        detail=f"Trigger {quote(target.sync)} keeps it equal to {quote(target.source)}."
        if settings.sync_trigger
        else "Without a trigger: OM_SYNC_TRIGGER is off.",
    )
    if column is not None and not column.ours:
        log.notice(
            f"column {quote(target.vector)} of {target} existed already and is filled anew from {quote(target.source)}",
            detail=f"The application writes only {quote(target.source)}, so its values may be stale."
            f" Until the backfill ends the old column is kept as {quote(target.adopted)}.",
        )
    if size is None:
        log.notice(
            f"{no_dimensions(target)}, so {quote(target.vector)} has none",
            hint=f"{FOR_AN_INDEX}, then: {ANEW}.",
        )


def downgrade(ctx: Context, before: Callable[[TableContext], None]) -> None:
    """Takes trigger, functions and column away; `v` and the extension stay. Refused where values would be lost.

    `before` undoes what a later step has begun and never done.
    """
    db, target = ctx.db, ctx.target
    with db.reading():
        table = catalog.table(db, target.schema, target.table)
        if table is None:
            log.warning(f"table {target} does not exist, nothing to take away")
            return
    db.take_over()
    before(ctx.with_table(table))

    def take_away() -> None:
        with db.transaction():
            now = requirements.require_table(ctx)
        column = now.columns.get(target.vector)
        if column is None or not column.ours:
            return _take_away(ctx)
        with guard.against(ctx.with_table(now), guard.SOURCELESS):
            return _take_away(ctx)

    locks.decided(take_away)


def _take_away(ctx: Context) -> None:
    db, target = ctx.db, ctx.target
    # not in Alembic's transaction: its snapshot may be older than values that would be lost
    with db.transaction(snapshot=True) as seen:
        table = requirements.require_table(ctx)
        column = table.columns.get(target.vector)
        aside = table.columns.get(target.adopted)
        if aside is not None and not aside.set_aside:
            aside = None  # somebody else's
        if column is not None and column.ours:
            ours = (target.sync, target.guard)
            interference.require_none(interference.naming(db, table, target.vector, ours, "after the downgrade"))
            _refuse_loss(ctx, column, aside)
    if column is None:
        log.notice(f"column {quote(target.vector)} of {target} does not exist, skipping")
    elif not column.ours:
        log.warning(f"column {quote(target.vector)} of {target} is not this package's, leaving it")

    def change() -> None:
        statements.run(ctx, statements.BLOCKS.remove_trigger)
        if column is not None and column.ours:
            statements.run(ctx, statements.BLOCKS.remove_column)

    if column is not None and column.ours and not aside:
        with db.transaction():
            interference.require_none(interference.of_whole_rows(ctx.with_table(table), dropped=target.vector))
    what = f"removing {quote(target.vector)} from {target}"
    interference.retried(ctx.with_table(table), what, change, seen)
    if column is not None and column.ours:
        what = "as the upgrade found it, is back" if aside else f"dropped, {quote(target.source)} is as it was"
        log.notice(f"column {quote(target.vector)} of {target}{',' if aside else ''} {what}")


def in_place(target: Target, column: str, size: int | None, origin: str | None) -> str:
    return f"column {quote(column)} of {target} is in place: vector{f'({size})' if size else ''}" + (
        f", dimensions {origin}" if origin else ""
    )


def origin(settings: Settings) -> str:
    return "as configured" if settings.dimensions else "as the rows have them"


def no_dimensions(target: Target) -> str:
    return f"no row of {target} says how many dimensions its vectors have"


def vector_type(extension: Extension, size: int | None) -> SQL:
    return fill("{ext}.vector({size})" if size else "{ext}.vector", {"ext": quote(extension.schema), "size": size})


def home(db: Database) -> str:
    """The schema that an extension which isn't there yet is created in."""
    return str(db.value("SELECT " + requirements.BLOCKS.home))


def create_extension(schema: str) -> str:
    return f"CREATE EXTENSION vector SCHEMA {quote(schema)}"


def _create_extension(db: Database) -> Extension:
    schema = home(db)
    statement = create_extension(schema)
    try:
        with db.attempt():
            db.run(statement)
    except DBAPIError as error:
        if found := catalog.extension(db):
            return found  # somebody else's, beside us
        problem = as_migration_error(error, 'extension "vector" can\'t be created')
        raise MigrationError(
            problem.message, detail=problem.detail, hint=f"Have an administrator run: {statement};"
        ) from error
    extension = catalog.require_extension(db)
    log.notice(f'extension "vector" {".".join(map(str, extension.version))} created in schema {quote(schema)}')
    return extension


def _dimensions(ctx: TableContext, extension: Extension | None) -> int | None:
    column = ctx.table.columns.get(ctx.target.vector)
    if column is not None and column.ours:
        requirements.agree(column, ctx.settings, ctx.target)
        return column.dimensions
    if column is not None:
        assert extension is not None
        found = dimensions.survey(ctx.db, ctx.db.names["vector"], **extension.names())
    else:
        found = dimensions.survey(ctx.db)
    return dimensions.resolve(ctx.settings.dimensions, found)


def _refuse_loss(ctx: Context, column: Column, aside: Column | None) -> None:
    db, target = ctx.db, ctx.target
    names = catalog.require_extension(db).names()
    # vector_dims would fetch every value that is out of line; a column with dimensions needn't be asked
    size = str(column.dimensions) if column.dimensions else "{ext}.vector_dims({vector})"
    kept = "({ext}.vector_send({adopted}) = {ext}.vector_send({vector}))" if aside else "false"
    asked = {"other_length": db.sql(STORED.without(size), **names), "kept": db.sql(kept, **names)}
    try:
        with db.attempt():
            lost = db.value(BLOCKS.count_lost, not_finite=db.sql(STORED.not_finite), **asked)
    except DBAPIError as error:
        if not is_a_rows(error):
            raise
        if not ctx.settings.accept_loss:
            raise MigrationError(
                f"the server can't read all values of {quote(target.source)} of {target} (SQLSTATE {sqlstate(error)}),"
                f" whose vectors may be all that is left of them",
                hint="openmemory-migrations verify --queries 0 names those rows. Restore or delete them, or accept the"
                " loss with OM_ACCEPT_LOSS=<their number>.",
            ) from error
        lost = db.value(BLOCKS.count_lost, not_finite=False, **asked)
    if lost > ctx.settings.accept_loss:
        raise MigrationError(
            f"{lost:,} values of {quote(target.vector)} have no source in {quote(target.source)} of {target}"
            " and would be lost",
            hint=f"Copy them elsewhere first, or accept the loss with OM_ACCEPT_LOSS={lost}.",
        )
    if lost:
        log.warning(
            f"{lost:,} values of {quote(target.vector)} have no source in {quote(target.source)} of {target} and are"
            f" lost, as OM_ACCEPT_LOSS={ctx.settings.accept_loss} accepts"
        )
