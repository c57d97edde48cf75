"""Whether the trigger does its work, and making it what this version makes it.

A table may have been migrated by another version, restored without its trigger or under another owner. What the trigger
is made of is compared with what it is to be, and what its function calls is called: a row in a table of its own would
leave dead rows in the catalogs with each look.
"""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy.exc import DBAPIError

from .. import log
from ..columns import cutover_mark, properties
from ..columns.cutover_mark import Mark
from ..db import catalog, locks
from ..db.context import Context, TableContext
from ..db.database import Database
from ..db.sqlerrors import DENIED, as_migration_error, sqlstate
from ..encoding import back_trigger, sync_trigger
from ..errors import MigrationError
from ..finding import Finding
from ..sql import FUNCTION, SQL, blocks, fill, literal, quote
from ..verify import equality, verification
from . import interference, requirements, statements

BLOCKS = blocks("steps")
REPAIR = "openmemory-migrations repair"
MARKED = "openmemory_migrations: "  # what every mark begins with
HARMLESS: tuple[equality.Kind, ...] = ("missing", "sourceless")  # the backfill's to do, or carried over


def faults(ctx: TableContext) -> list[Finding]:
    """What keeps the trigger from giving what is written its vector, the worst thing first; in a transaction.

    Nothing where there is no column of ours, or nothing is to follow the source.
    """
    size = _size(ctx)
    if size is None or not ctx.settings.sync_trigger:
        return []
    of_function = fill(
        sync_trigger.BLOCKS.create_sync, {**ctx.target.names(), "tag": FUNCTION, "dimensions": size or SQL("NULL")}
    )
    _, body, _ = of_function.split(FUNCTION)
    names = {**requirements.names(ctx.target, ctx.settings), "body": literal(body), "repair": literal(f"{REPAIR}.")}
    return Finding.of_rows(ctx.db.rows(BLOCKS.working, **names)) or list(_called(ctx))


def _size(ctx: TableContext) -> int | None:
    """The column's dimensions, 0 where it has none; None where it isn't ours."""
    column = ctx.table.columns.get(ctx.target.vector)
    return (column.dimensions or 0) if column is not None and column.ours else None


def _called(ctx: TableContext) -> Iterator[Finding]:
    """What the function calls, with a few numbers, unless this role may not."""
    trigger = f"trigger {quote(ctx.target.sync)} of {ctx.target}"
    try:
        with ctx.db.attempt(keep=False):
            right = ctx.db.value(BLOCKS.called, **catalog.require_extension(ctx.db).names())
    except DBAPIError as error:
        if error.connection_invalidated:
            raise
        if sqlstate(error) == DENIED:
            return
        problem = as_migration_error(error, f"what {trigger} calls was tried")
        yield Finding("error", "trigger", f"{problem.message}: every write fails", problem.detail, problem.hint)
        return
    if not right:
        hint = "Install pgvector as it is released: what makes a vector of numbers has been changed."
        yield Finding("error", "trigger", f"what {trigger} calls was tried, and makes another vector", hint=hint)


def wrong(ctx: TableContext) -> list[Finding]:
    """Of the trigger that the table is to have now: the sync trigger, or what there is after a swap."""
    return back_faults(ctx) if Mark.of(ctx.table, ctx.target) else faults(ctx)


def back_faults(ctx: TableContext) -> list[Finding]:
    """What keeps the bytes of a table that was swapped from being known as another vector's; in a transaction."""
    target = ctx.target
    found = Mark.of(ctx.table, target)
    archived = found and found.mode == "swap" and target.archive in ctx.table.columns
    if not archived or catalog.trigger_enabled(ctx.db, ctx.table.oid, target.back):
        return []
    message = f"trigger {quote(target.back)} of {target} is missing or disabled, so bytes may be another vector's"
    return [Finding("error", "trigger", message, hint=f"{REPAIR}; {cutover_mark.UNDO} compares all rows.")]


def planned(ctx: Context) -> list[str]:
    """The statements that a repair would run, in a transaction; none where nothing is wrong."""
    at = _required(ctx)
    if not wrong(at):
        return []
    if not Mark.of(at.table, at.target):
        return statements.of(ctx, statements.BLOCKS.add_trigger, _size(at))
    swapped = _swapped(at)
    function = swapped.sql(back_trigger.BLOCKS.create_forgetting, tag=FUNCTION)
    always = swapped.sql(sync_trigger.FIRE_ALWAYS, trigger=swapped.names["back"])
    return [function, swapped.sql(back_trigger.BLOCKS.forgetting), always]


def repair(ctx: Context) -> bool:
    """Makes the trigger what it is to be; says what was wrong, and returns whether anything was.

    Rows are left as they are: `openmemory-migrations backfill` gives those their vectors that were written meanwhile.
    """
    db, target = ctx.db, ctx.target
    with db.transaction():
        at = _required(ctx)
        found = wrong(at)
    swapped = Mark.of(at.table, target)
    name = f"trigger {quote(target.back if swapped else target.sync)} of {target}"
    if not found:
        log.notice(f"nothing to repair: {f'{target} is cut over' if swapped else f'{name} does its work'}")
        return False
    for one in found:
        log.notice(one.message, detail=one.detail)

    def change() -> None:
        if swapped:
            back_trigger.forget(_swapped(at))
        else:
            statements.run(ctx, statements.BLOCKS.add_trigger, _size(at) or None)

    interference.retried(at, f"repairing {name}", change)
    with db.transaction():
        if left := wrong(at):
            raise left[0].error
    log.notice(
        f"{name} is repaired",
        hint=f"Bytes of rows that were written meanwhile may be another vector's: {cutover_mark.UNDO} compares them."
        if swapped
        else "Rows that were written meanwhile: openmemory-migrations backfill, then openmemory-migrations verify.",
    )
    return True


def adopt(ctx: Context) -> None:
    """Gives a column of vectors its mark again, which a dump without comments has lost, once every row is compared.

    Raises MigrationError where a row has another vector than its bytes say; nothing is changed then.
    """
    db, target = ctx.db, ctx.target
    with db.transaction():
        table = requirements.require_table(ctx)
        column = table.columns.get(target.vector)
        if column is None or not column.is_vector or (column.comment.startswith(MARKED) and not column.ours):
            raise MigrationError(
                f"{target} has no column {quote(target.vector)} of vectors that could be this package's",
                hint="What there is to be done says openmemory-migrations check.",
            )
        if column.ours:
            log.notice(f"column {quote(target.vector)} of {target} has its mark")
            return
        requirements.require(ctx, requirements.BLOCKS.rights, requirements.BLOCKS.source_column)
        followed = catalog.trigger_enabled(db, table.oid, target.sync)
        ready = ctx.with_table(table).with_extension(catalog.require_extension(db))

    def follow() -> None:
        statements.run(ctx, statements.BLOCKS.add_trigger, column.dimensions)

    def leave() -> None:
        statements.run(ctx, statements.BLOCKS.remove_trigger)

    def mark() -> None:
        properties.comment(db, target.vector, target.comment)

    what = f"adopting {quote(target.vector)} of {target}"
    # first, so that what is written while rows are compared is right as well
    interference.retried(ready, what, follow)
    found = verification.compare(ready)
    known = sum(found.wrong[kind].rows for kind in HARMLESS if kind in found.wrong)
    if others := found.not_right - known:
        if not followed:
            interference.retried(ready, what, leave)
        raise MigrationError(
            f"{others:,} rows of {target} have another {quote(target.vector)} than {quote(target.source)} says",
            detail=found.problems(table),
            hint=f"Mend them; or stamp what comes before om_20240107_pgvector, then alembic upgrade head: it sets"
            f" {quote(target.vector)} aside and fills a new one.",
        )
    locks.retried(db, ctx.settings.lock_timeout_ms, table.oid, what, mark, found.seen)
    log.notice(
        f"column {quote(target.vector)} of {target} has its mark again: {found.equal:,} rows are equal to the bit"
    )


def _required(ctx: Context) -> TableContext:
    """Raises MigrationError where there is no column that a trigger is to keep in step, or it can't be made."""
    at = ctx.with_table(requirements.require_table(ctx))
    requirements.require(ctx, requirements.BLOCKS.rights)
    if not Mark.of(at.table, ctx.target):
        requirements.require_column(at.table, ctx.target, ctx.settings, None)
        requirements.require(ctx, requirements.BLOCKS.source_column)
    return at


def _swapped(ctx: TableContext) -> Database:
    return ctx.db.at(cutover_mark.names(ctx.target.swapped))
