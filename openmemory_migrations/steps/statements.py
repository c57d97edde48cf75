"""What changes the table, statement by statement: one query each, which a step asks under its lock and executes.

The scripts do the same. What is done already is not asked for again, so that a run which was interrupted goes on.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..db.context import Context
from ..encoding import sync_trigger
from ..encoding.sync_trigger import Statements
from ..marks import GUARD
from ..settings import Settings
from ..sql import FUNCTION, SQL, Argument, Fragment, blocks, fill, formatted, literal, quote
from ..target import Target
from . import requirements

BLOCKS = blocks("questions")
EXT = Argument("%1$s")  # the extension's schema, in what the server's format() gets

TEXTS = {
    "rename": "ALTER TABLE {table} RENAME COLUMN {vector} TO {adopted}",
    "restore": "ALTER TABLE {table} RENAME COLUMN {adopted} TO {vector}",
    "comment_ours": "COMMENT ON COLUMN {table}.{vector} IS {comment}",
    "comment_adopted": "COMMENT ON COLUMN {table}.{adopted} IS ",
    "drop_column": "ALTER TABLE {table} DROP COLUMN {vector}",
    "drop_adopted": "ALTER TABLE {table} DROP COLUMN {adopted}",
    "own_sync": "ALTER FUNCTION {sync_function}() OWNER TO ",
    "revoke_sync": "REVOKE ALL ON FUNCTION {sync_function}() FROM PUBLIC",
    "create_trigger": sync_trigger.BLOCKS.create_sync_trigger,
    "fire_always": sync_trigger.FIRE_ALWAYS.replace("{trigger}", "{sync}"),
    "comment_trigger": "COMMENT ON TRIGGER {sync} ON {table} IS {comment}",
    "create_sync": sync_trigger.BLOCKS.create_sync,
    "drop_convert": "DROP FUNCTION {spread_convert}(bytea, integer)",
}
ADD = "ALTER TABLE {table} ADD COLUMN {vector} {ext}.vector{size}"


def names(target: Target, size: int | None) -> dict[str, Fragment]:
    """Of the blocks: each statement as a string constant, and what they look for."""
    own: dict[str, Fragment] = {**target.names(), "tag": FUNCTION}
    own |= {"size": SQL(f"({size})" if size else ""), "dimensions": size or SQL("NULL")}
    found: dict[str, Fragment] = {name: literal(fill(text, own)) for name, text in TEXTS.items()}
    return found | {
        "add": with_extension(ADD, own),
        "guard_mark": literal(GUARD),
        "convert_call": literal(fill("{spread_convert}(bytea, integer)", own)),
    }


def with_extension(template: str, names: Mapping[str, Fragment], **more: Fragment) -> SQL:
    """A statement as a string constant for the server's format(), whose first argument is the extension's schema."""
    return literal(fill(formatted(template), {**names, "ext": EXT, **more}, formatted))


def shown_versions(settings: Settings, name: str) -> SQL:
    """Which version table `own_versions` is asked about."""
    return literal(quote(settings.pg_schema, name))


def run(ctx: Context, block: str, size: int | None = None, **more: Fragment) -> None:
    """Inside the caller's transaction."""
    sync_trigger.execute(ctx.db, asked(ctx, block, size, **more))


def asked(ctx: Context, block: str, size: int | None = None, **more: Fragment) -> Statements:
    """The same, to be looked at."""
    wanted = {**requirements.names(ctx.target, ctx.settings), **names(ctx.target, size), **more}
    return [(SQL(statement), of_trigger) for statement, of_trigger in ctx.db.rows(block, **wanted)]
