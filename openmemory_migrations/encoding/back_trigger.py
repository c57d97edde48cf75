"""The SQL that turns a vector into the bytes that it came from, and the triggers on a table that was cut over.

Between a swap and its undoing the bytes are an archive: a row whose vector changes has none any more (forgetting).
While the cutover is undone, bytes follow the vectors (following). Frozen with the first release.
"""

from __future__ import annotations

from ..db.context import Context
from ..db.database import Database
from ..encoding.sync_trigger import Statements, created, execute, of_a_trigger
from ..marks import BACK
from ..sql import FUNCTION, SQL, blocks, literal, unquote

BLOCKS = blocks("encoding")


def forget(db: Database) -> None:
    """Leaves the trigger that takes the bytes of a row away whose vector is changed."""
    make(db, following=False)


def follow(db: Database) -> None:
    """Leaves the trigger that gives a row whose vector is written the bytes of it."""
    make(db, following=True)


def texts(db: Database, *, following: bool) -> tuple[SQL, SQL]:
    """Of the function, and of the trigger."""
    function = BLOCKS.create_following if following else BLOCKS.create_forgetting
    trigger = BLOCKS.following if following else BLOCKS.forgetting
    return db.sql(function, tag=FUNCTION, bytes=bytes_of(db)), db.sql(trigger)


def made(db: Database, *, following: bool) -> Statements:
    """What leaves the trigger as it is to be, whatever there is."""
    function, trigger = texts(db, following=following)
    return [
        (db.sql("DROP TRIGGER IF EXISTS {back} ON {table}"), True),
        *created(db, "back", function="{made}", on="{fires}", made=function, fires=trigger),
        (
            db.sql(
                "COMMENT ON TRIGGER {back} ON {table} IS {comment}",
                comment=literal(BACK + unquote(db.names["source"])),
            ),
            False,
        ),
    ]


def make(db: Database, *, following: bool) -> None:
    execute(db, made(db, following=following))


def bytes_of(db: Database) -> SQL:
    """SQL of the bytes that a new row's vector came from, in the function of a trigger."""
    return db.sql(BLOCKS.bytes_of, it=db.sql("NEW.{vector}"))


def follows(ctx: Context, table_oid: int) -> bool:
    """Whether it is the following one that is there: an undoing was begun, and has not ended. 4 is INSERT."""
    return bool(
        ctx.db.value(
            "SELECT EXISTS (SELECT FROM pg_catalog.pg_trigger WHERE tgrelid = :table AND tgname = :name"
            " AND tgtype & 4 <> 0)",
            {"table": table_oid, "name": ctx.target.back},
        )
    )


def drop(db: Database) -> None:
    """Trigger and function, if they are there."""
    of_a_trigger(db, "DROP TRIGGER IF EXISTS {back} ON {table}")
    db.quietly("DROP FUNCTION IF EXISTS {back_function}()")
