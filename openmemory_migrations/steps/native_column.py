"""The column with dimensions that takes the place of a `v` without: kept in step, filled, compared, put in its place.

All of it inside the database, in batches that are committed one by one, while the application writes.
"""

from __future__ import annotations

from collections.abc import Iterator

from .. import log
from ..backfill import dead_rows, walk
from ..backfill.pace import Pace
from ..backfill.passes import Obstacles, until_none_is_left
from ..backfill.progress import Progress
from ..backfill.reader import BATCH_BYTES
from ..backfill.walk import Filling
from ..columns import guard, properties
from ..columns.properties import Attributes
from ..db import catalog, partitions
from ..db.context import Context, TableContext, VectorContext
from ..db.database import Database
from ..encoding import sync_trigger
from ..encoding.stored import STORED
from ..encoding.sync_trigger import of_a_trigger
from ..errors import ANEW, Changed, MigrationError
from ..marks import GIVEN, TYPED
from ..sql import SQL, blocks, literal, quote
from . import interference, requirements

BLOCKS = blocks("steps")

PENDING = "{typed} IS NULL AND {source} IS NOT NULL"
FILLING = Filling("{typed}", "{source}", PENDING, "{ext}.vector_send({source})")
COUNT_PENDING = "SELECT count(*) FROM {table} WHERE " + PENDING
COUNT_DIFFERENT = """
SELECT count(*) FROM {table} WHERE {ext}.vector_send({typed}) IS DISTINCT FROM {ext}.vector_send({source})
"""


def create(ctx: Context, size: int, **names: SQL) -> None:
    """Column and trigger, inside the caller's transaction; a column that is there already is kept."""
    db, target = ctx.db, ctx.target
    db.run("ALTER TABLE {table} ADD COLUMN IF NOT EXISTS {typed} {ext}.vector({size})", size=size, **names)
    properties.store(db, target.typed, properties.attributes(db, target.source))
    properties.comment(db, target.typed, TYPED + target.source)
    sync_trigger.create(db, "typing", function=BLOCKS.create_function, on=BLOCKS.create_trigger)
    db.run("COMMENT ON TRIGGER {typing} ON {table} IS {text}", text=literal(TYPED + target.source))


def drop_trigger(db: Database) -> None:
    of_a_trigger(db, "DROP TRIGGER IF EXISTS {typing} ON {table}")
    db.run("DROP FUNCTION IF EXISTS {typing_function}()")


def mark(ctx: Context, was: Attributes) -> None:
    """Remembers, on `v` itself, that its dimensions are from us, before the comment that it had."""
    properties.comment(ctx.db, ctx.target.source, GIVEN + (was.comment or "").removeprefix(GIVEN))


def unmark(ctx: Context, was: Attributes) -> None:
    properties.comment(ctx.db, ctx.target.source, (was.comment or "").removeprefix(GIVEN))


def interfering(ctx: TableContext) -> Iterator[MigrationError]:
    """Each trigger of others' that may leave another value in the column than in `v`."""
    return interference.overriding(ctx.db, ctx.table, ctx.target.typing, ctx.target.source, ctx.target.typed)


def dependents(ctx: TableContext, *ours: str) -> Iterator[MigrationError]:
    """Whatever hangs on `v`, beside what is ours: why its type can't be changed."""
    target = ctx.target
    if found := properties.dependents(ctx.db, ctx.table, target.source, target.typing, target.guard, *ours):
        yield MigrationError(
            f"the type of {quote(target.source)} of {target} can't be changed while there is: {', '.join(found)}",
            hint="Drop that, run the same command again, and create it anew.",
        )


def refuse_dependents(ctx: TableContext, *ours: str) -> None:
    for problem in dependents(ctx, *ours):
        raise problem


def fill(ctx: VectorContext, size: int) -> None:
    """Goes over the rows until none is left. Raises MigrationError."""
    db = ctx.db
    what = f"dimensions of {ctx.target.table}"
    with db.transaction():
        pace = Pace(db, ctx.settings)
    most_rows = STORED.batch(BATCH_BYTES, size, ctx.settings.backfill_batch)
    told: tuple[int, int] | None = None
    written = 0

    def once(obstacles: Obstacles) -> tuple[int, int]:
        nonlocal told, written
        with db.transaction(snapshot=True):
            pending = _pending(db)
        progress = Progress(what, pending, _pending, doing="dimensions", told=told, obstacles=obstacles)
        if pending:
            with progress.shown():
                walk.fill(ctx, FILLING, most_rows, progress, pace)
            progress.tell()
            told = (0, 0)
        written += progress.converted
        return progress.converted, pending

    until_none_is_left(
        db,
        ctx.table,
        what,
        once,
        pending=PENDING,
        otherwise=f"rows of {ctx.target} are still without a value in {quote(ctx.target.typed)}",
        hint="Delete or mend those rows (22000: of other dimensions, from before the trigger), or mend what keeps"
        " them as they are, then run the same command again.",
    )
    dead_rows.tell(ctx, what, written)


def take_place(ctx: VectorContext) -> None:
    """Compares all rows, then drops `v` and gives the column its name, NOT NULL, default, comment and privileges.

    Raises MigrationError.
    """
    db, target = ctx.db, ctx.target
    with db.transaction():
        not_null = properties.attributes(db, target.source).not_null
        table = requirements.require_table(ctx)
    if not_null:
        properties.prove_not_null(ctx.with_table(table), target.typed)

    def change() -> None:
        if not catalog.trigger_enabled(db, table.oid, target.typing):
            raise MigrationError(
                f"trigger {quote(target.typing)} of {target} has been disabled or dropped meanwhile",
                detail=f"Nothing has kept {quote(target.typed)} equal to {quote(target.source)} since.",
                hint=f"Begin anew: {ANEW}.",
            )
        guard.drop(db)
        refuse_dependents(ctx.with_table(table))
        was = properties.attributes(db, target.source)
        if was.not_null != not_null:
            raise Changed(f"{target} was changed just now")  # and its rows would have to be read
        parts = partitions.parts(db, table.oid)
        grants = properties.grants(db, parts, target.source)
        drop_trigger(db)
        db.run("ALTER TABLE {table} DROP COLUMN {source}")
        properties.take_place(db, parts, target.typed, target.source, was, grants)
        properties.store(db, target.source, was)
        mark(ctx, was)

    what = f"putting {quote(target.typed)} of {target} in the place of {quote(target.source)}"
    with guard.against(ctx.with_table(table), guard.UNTYPED):
        with db.transaction(snapshot=True) as seen:
            # those that are there at the switch: it finds the triggers as they are here
            interference.require_none(interfering(ctx.with_table(table)))
            _compare(ctx)
        interference.retried(ctx.with_table(table), what, change, seen)
    log.notice(
        f"column {quote(target.source)} of {target} has its dimensions, and is the last column of the table now",
        detail="The space of the one before is free for new rows; only VACUUM FULL or pg_repack make the file smaller.",
    )


def _pending(db: Database) -> int:
    return int(db.value(COUNT_PENDING))


def _compare(ctx: VectorContext) -> None:
    """All rows, in the snapshot that is open."""
    target = ctx.target
    log.notice(f"comparing {quote(target.typed)} of {target} with {quote(target.source)}, to the bit")
    if different := ctx.db.value(COUNT_DIFFERENT, **ctx.extension.names()):
        raise MigrationError(
            f"{different:,} rows of {target} have another {quote(target.typed)} than {quote(target.source)}",
            detail=f"Something writes {quote(target.source)} past trigger {quote(target.typing)}, or changes it after.",
            hint=f"Have that ended, then begin anew: {ANEW}.",
        )
