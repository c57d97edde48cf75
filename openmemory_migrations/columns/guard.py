"""Keeps what was found in all rows true until the change that was decided by it.

A change drops values because each row was seen to need them no more. Whoever writes meanwhile could make that untrue,
and to read the rows again under the lock would keep everybody waiting. So for that time a trigger refuses each write
that would. To create it waits for the transactions that have written before: what those wrote, a snapshot that is taken
afterwards sees. It fires AFTER the row is written, so that it sees what others' triggers have made of it, and ALWAYS,
whatever session_replication_role. That nobody has disabled it in between, and that this run has had its locks between
runs all the time, is asked by `Database.require_seen`. Without those it refuses nothing: what a killed run leaves does
no harm until a later one takes it away.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy.exc import DBAPIError

from .. import log
from ..db import locks
from ..db.context import TableContext
from ..db.database import HELD, Database
from ..db.sqlerrors import as_migration_error
from ..encoding import back_trigger
from ..encoding.stored import STORED
from ..encoding.sync_trigger import create, of_a_trigger
from ..errors import MigrationError
from ..marks import GUARD
from ..sql import SQL, blocks, fill, joined, literal, quote

BLOCKS = blocks("columns")

CLEAN_UP_TIMEOUT = "100ms"


@dataclass(frozen=True)
class Loss:
    """Which write is refused: one that leaves `lost` true, unless it is an UPDATE that leaves both columns as they
    were, or with `other_may_change` only the first.

    `column` is the one that nobody needs to write, beside `other`, as the names of a `Database` have them.
    """

    column: str
    other: str
    lost: str
    other_may_change: bool = False

    @property
    def unchanged(self) -> str:
        names = [self.column] if self.other_may_change else [self.column, self.other]
        new, old = (", ".join(f"{row}.{{{name}}}" for name in names) for row in ("NEW", "OLD"))
        return f"record_image_eq(ROW({new}), ROW({old}))"


# `v` goes: another vector than its bytes say would be all that is left
BYTES = Loss(
    "vector",
    "source",
    "NEW.{source} IS NOT NULL AND CASE WHEN NEW.{vector} IS NULL THEN {fits} ELSE {bytes} <> NEW.{source} END",
)
# the bytes are to be the source again: others than the vector says would be taken for it
VECTORS = Loss("source", "vector", "{bytes} IS DISTINCT FROM NEW.{source}")
# the vector column goes: a vector that no bytes give would be nowhere. One whose bytes the application takes away is
# stale, where no trigger takes it along
SOURCELESS = Loss(
    "vector",
    "source",
    "NEW.{vector} IS NOT NULL AND (NEW.{source} IS NULL OR NOT ({fits_vector}))",
    other_may_change=True,
)
# the adopted column goes: of a row that moves to another partition the server says that it is INSERTed
ADOPTED = Loss(
    "adopted",
    "source",
    "NEW.{adopted} IS NOT NULL AND CASE WHEN NEW.{source} IS NULL"
    " THEN NOT record_image_eq(ROW(NEW.{vector}), ROW(NEW.{adopted})) ELSE NEW.{vector} IS NULL END",
    other_may_change=True,
)
# a native table's `v` goes, and the column with dimensions takes its place
UNTYPED = Loss("typed", "source", "NOT record_image_eq(ROW(NEW.{typed}), ROW(NEW.{source}))")


@contextmanager
def against(ctx: TableContext, loss: Loss) -> Iterator[None]:
    """Refuses such writes from here on, until the change has dropped it; after an error it takes that back."""
    db = ctx.db

    def create() -> None:
        drop(db, but=db.names["guard"])
        _create(ctx, loss)

    what = f"guarding {ctx.target}"
    locks.retried(db, ctx.settings.lock_timeout_ms, ctx.table.oid, what, create)
    try:
        yield
    except BaseException:
        take_back(db)
        raise


def take_back(db: Database) -> None:
    """After a run that failed, and not at the price of waiting for others: where it stays it does no harm."""
    if not db.usable:
        return
    try:
        db.rollback()
        with db.transaction():
            if there(db):
                locks.set_timeout(db, CLEAN_UP_TIMEOUT)
                drop(db)
    except (MigrationError, DBAPIError) as error:
        problem = error if isinstance(error, MigrationError) else as_migration_error(error, "removing a trigger")
        log.notice(f"{problem.message}; it does no harm, and goes with the next run")


def there(db: Database) -> list[str]:
    """Triggers that a run has left, quoted."""
    return [quote(name) for name, _, _ in _left(db)]


def drop(db: Database, but: str | None = None) -> None:
    """Trigger and function, if they are there, inside the caller's transaction; `but` one that is to be replaced, which
    need not wait for readers."""
    for trigger, _, function in _left(db):
        if quote(trigger) == but:
            continue
        of_a_trigger(db, "DROP TRIGGER {trigger} ON {table}", trigger=quote(trigger))
        db.run("DROP FUNCTION {function}", function=SQL(function))


def _left(db: Database) -> Sequence[Any]:
    return db.rows(BLOCKS.guards, table_shown=literal(db.names["table"]), guard_mark=literal(GUARD))


def _of_new(db: Database, text: str) -> SQL:
    return db.sql(text.replace("{source}", "NEW.{source}"))


def _create(ctx: TableContext, loss: Loss) -> None:
    db = ctx.db
    vector = ctx.table.columns.get(ctx.target.vector)
    of_column, of_vector = vector.dimensions if vector else None, "cardinality(NEW.{vector}::real[])"
    held = joined(", ", [SQL(f"({pid}, {key})") for _, key, pid in HELD.get()])
    create(
        db,
        "guard",
        function=BLOCKS.create_guard_function,
        on=BLOCKS.create_guard_trigger,
        one=db.names[loss.column],
        other=db.names[loss.other],
        unchanged=db.sql(loss.unchanged),
        lost=db.sql(
            loss.lost,
            fits=_of_new(db, STORED.fits(of_column)),
            fits_vector=_of_new(db, STORED.fits(of_vector)),
            bytes=back_trigger.bytes_of(db),
        ),
        message=literal(f"{db.names[loss.column]} of {ctx.target} can't have a value of its own now"),
        hint=literal(
            "openmemory-migrations is about to change this table: write the other column alone, or retry later."
        ),
        at_work=fill(BLOCKS.at_work, {"held": held}) if held else True,
    )
    db.run("COMMENT ON TRIGGER {guard} ON {table} IS {comment}", comment=literal(GUARD))
