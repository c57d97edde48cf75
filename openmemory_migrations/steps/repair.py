"""Whether the trigger does its work, and making it what this version makes it.

A table may have been migrated by another version, restored without its trigger or under another owner. What the trigger
is made of is compared with what it is to be, and what its function calls is called: a row in a table of its own would
leave dead rows in the catalogs with each look.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy.exc import DBAPIError

from .. import log
from ..columns import cutover_mark, properties
from ..columns.cutover_mark import Mark
from ..db import catalog
from ..db.context import Context, TableContext, VectorContext
from ..db.database import Database
from ..db.sqlerrors import DENIED, as_migration_error, sqlstate
from ..encoding import back_trigger, sync_trigger
from ..encoding.sync_trigger import Statements
from ..errors import MigrationError
from ..finding import Finding
from ..marks import MARK
from ..sql import FUNCTION, SQL, Fragment, blocks, literal, quote
from ..target import CUTOVER_VERSION_TABLE, VERSION_TABLE
from ..verify import equality, verification
from ..verify.equality import Comparison
from . import interference, requirements, statements

BLOCKS = blocks("steps")
REPAIR = "openmemory-migrations repair"
COMPARE = "openmemory-migrations verify --queries 0"
VERSIONS = (VERSION_TABLE, CUTOVER_VERSION_TABLE)
HARMLESS: tuple[equality.Kind, ...] = ("missing", "sourceless")  # the backfill's to do, or carried over


@dataclass(frozen=True)
class Made:
    """A trigger as this version makes it: its name, the text of its function, which events it `fires` for, as
    pg_trigger.tgtype has them (BEFORE 2, ROW 1, INSERT 4, UPDATE 16), and whether `for_each` row or by a condition."""

    name: str
    function: str
    fires: int = 23
    for_each: bool = True
    to_vector: bool = True
    without: str = "What is written has no vector, or a stale one."


def faults(ctx: TableContext) -> list[Finding]:
    """What keeps the trigger from giving what is written its vector, the worst thing first; in a transaction.

    Nothing where there is no column of ours, or nothing is to follow the source.
    """
    size = _size(ctx)
    if size is None or not ctx.settings.sync_trigger:
        return []
    dimensions = size or SQL("NULL")
    function = ctx.db.sql(sync_trigger.BLOCKS.create_sync, tag=FUNCTION, dimensions=dimensions)
    return _faults(ctx, Made(ctx.target.sync, function), ctx.target.source) or list(_called(ctx))


def broken(ctx: TableContext) -> list[Finding]:
    """Those by which what is written now is wrong, or fails."""
    return [fault for fault in faults(ctx) if fault.severity == "error"]


def _faults(ctx: TableContext, made: Made, column: str) -> list[Finding]:
    _, body, _ = made.function.split(FUNCTION)
    names: dict[str, Fragment] = {
        **requirements.names(ctx.target, ctx.settings),
        "trigger_name": literal(made.name),
        "of_column": literal(column),
        "body": literal(body),
        "fires": made.fires,
        "for_each": made.for_each,
        "with_bytes": literal(ctx.target.archive),
        "definer": "SECURITY DEFINER" in made.function,
        "to_vector": made.to_vector,
        "without": literal(made.without),
        "repair": literal(f"{REPAIR}."),
    }
    return Finding.of_rows(ctx.db.rows(BLOCKS.working, **names))


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
    """What keeps the bytes beside the vectors of a table that was cut over from being theirs; in a transaction."""
    target = ctx.target
    found = Mark.of(ctx.table, target)
    if not found or target.archive not in ctx.table.columns:
        return []
    now = found.now(target)
    db, follows = ctx.db.at(cutover_mark.names(now)), back_trigger.follows(ctx, ctx.table.oid)
    if found.mode == "drop" and not follows:
        return []
    function, _ = back_trigger.texts(db, following=follows)
    without = "Bytes may be another vector's; undoing the cutover compares all rows."
    fires = 23 if follows else 19
    made = Made(target.back, function, fires, for_each=follows, to_vector=False, without=without)
    return _faults(ctx, made, now.vector)


def planned(ctx: Context) -> list[str]:
    """The statements that a repair would run, in a transaction; none where nothing is wrong."""
    at = _required(ctx)
    return [statement for statement, _ in _wanted(at, trigger=bool(wrong(at)))]


def _wanted(at: TableContext, *, trigger: bool) -> Statements:
    """What makes the `trigger`, if it is not what it is to be, and gives version tables to the table's owner."""
    found: Statements = []
    if trigger and Mark.of(at.table, at.target):
        found += back_trigger.made(_swapped(at), following=back_trigger.follows(at, at.table.oid))
    elif trigger:
        found += statements.asked(at, statements.BLOCKS.add_trigger, _size(at) or None)
    for name in VERSIONS:
        found += _own_versions(at, name)
    return found


def repair(ctx: Context) -> bool:
    """Makes the trigger what it is to be; says what was wrong, and returns whether anything was.

    Rows are left as they are: `openmemory-migrations backfill` gives those their vectors that were written meanwhile.
    """
    db, target = ctx.db, ctx.target
    with db.transaction():
        at = _required(ctx)
        found, versions = wrong(at), list(_versions(ctx))
    swapped = Mark.of(at.table, target)
    trigger = f"trigger {quote(target.back if swapped else target.sync)} of {target}"
    if not found and not versions:
        log.notice(f"nothing to repair: {f'{target} is cut over' if swapped else f'{trigger} does its work'}")
        return False
    for one in (*found, *versions):
        log.notice(one.message, detail=one.detail)

    def change() -> None:
        sync_trigger.execute(db, _wanted(at, trigger=bool(found)))

    interference.retried(at, f"repairing {trigger}", change)
    with db.transaction():
        if left := wrong(at):
            raise left[0].error
    if not found:
        log.notice(f"what there is of this package for {target} is its owner's now")
    elif swapped:
        hint = f"Bytes of rows that were written meanwhile may be another vector's: {cutover_mark.UNDO} compares them."
        log.notice(f"{trigger} is repaired", hint=hint)
    else:
        log.notice(f"{trigger} is repaired")
        log.warning(
            f"rows of {target} that were written before may have no vector, or a stale one",
            hint=f"openmemory-migrations backfill converts the former; {COMPARE} names the latter, for which UPDATE …"
            f" SET {quote(target.source)} = {quote(target.source)} is the remedy.",
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
        if column is None or not column.is_vector or (column.comment.startswith(MARK) and not column.ours):
            raise MigrationError(
                f"{target} has no column {quote(target.vector)} of vectors that could be this package's",
                hint="What there is to be done says openmemory-migrations check.",
            )
        if column.ours:
            log.notice(f"column {quote(target.vector)} of {target} has its mark")
            return
        requirements.require(ctx, requirements.BLOCKS.rights, requirements.BLOCKS.source_column)
        ready = ctx.with_table(table).with_extension(catalog.require_extension(db))

    def mark() -> None:
        properties.comment(db, target.vector, target.comment)
        if ctx.settings.sync_trigger:
            statements.run(ctx, statements.BLOCKS.add_trigger, column.dimensions)

    found = _compared(ready)
    what = f"adopting {quote(target.vector)} of {target}"
    interference.retried(ready, what, mark, found.seen)
    with db.transaction():
        marked = requirements.require_table(ctx)
    # what was written between the comparison and the trigger
    found = _compared(ready.with_table(marked).with_extension(ready.extension))
    log.notice(
        f"column {quote(target.vector)} of {target} has its mark again: {found.equal:,} rows are equal to the bit"
    )


def _compared(ctx: VectorContext) -> Comparison:
    """Raises MigrationError where a row has another vector than its bytes say."""
    target = ctx.target
    found = verification.compare(ctx)
    known = sum(found.wrong[kind].rows for kind in HARMLESS if kind in found.wrong)
    if others := found.not_right - known:
        raise MigrationError(
            f"{others:,} rows of {target} have another {quote(target.vector)} than {quote(target.source)} says",
            detail=found.problems(ctx.table),
            hint=f"Mend them; or stamp what comes before om_20240107_pgvector, then alembic upgrade head: it sets"
            f" {quote(target.vector)} aside and fills a new one.",
        )
    return found


def _versions(ctx: Context) -> Iterator[Finding]:
    """Version tables of ours that belong to somebody else than the table, and can be the owner's."""
    for name in VERSIONS:
        if _own_versions(ctx, name):
            message = f"version table {quote(name)} doesn't belong to the owner of {ctx.target}"
            yield Finding("warning", "versions", message)


def _own_versions(ctx: Context, name: str) -> Statements:
    shown = statements.shown_versions(ctx.settings, name)
    return statements.asked(ctx, statements.BLOCKS.own_versions, versions_shown=shown)


def _required(ctx: Context) -> TableContext:
    """Raises MigrationError where there is no column that a trigger is to keep in step, or it can't be made."""
    at = ctx.with_table(requirements.require_table(ctx))
    requirements.require(ctx, requirements.BLOCKS.rights)
    if not Mark.of(at.table, ctx.target):
        requirements.require_column(at.table, ctx.target, ctx.settings, None)
        requirements.require(ctx, requirements.BLOCKS.source_column)
    return at


def _swapped(ctx: TableContext) -> Database:
    found = Mark.of(ctx.table, ctx.target)
    assert found
    return ctx.db.at(cutover_mark.names(found.now(ctx.target)))
