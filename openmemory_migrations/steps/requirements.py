"""What has to hold before anything is changed: one query each, which the steps, `check` and the scripts ask alike.

Each refusal names the thing, what was expected, and how to go on.
"""

from __future__ import annotations

from ..db.context import Context
from ..finding import Finding
from ..marks import CUT_OVER, OWN
from ..settings import Settings
from ..sql import Fragment, blocks, literal, quote
from ..target import Target

BLOCKS = blocks("questions")
# of a table that is to get our column, once it is known that there is one; and with them what the step needs besides
OF_TABLE = (BLOCKS.rights, BLOCKS.source, BLOCKS.column)
OF_EXPAND = (BLOCKS.extension, *OF_TABLE)


def names(target: Target, settings: Settings) -> dict[str, Fragment]:
    """Of a block: strings, as they are and as messages show them."""
    texts = {
        "itself": str(target),
        "schema_name": target.schema,
        "schema_shown": quote(target.schema),
        "table_name": target.table,
        "table_shown": quote(target.schema, target.table),
        "source_name": target.source,
        "source_shown": quote(target.source),
        "vector_name": target.vector,
        "vector_shown": quote(target.vector),
        "adopted_name": target.adopted,
        "adopted_shown": quote(target.adopted),
        "own_mark": OWN,
        "cut_over_mark": CUT_OVER,
    }
    return {"sync_trigger": settings.sync_trigger, **{name: literal(text) for name, text in texts.items()}}


def unmet(ctx: Context, block: str) -> list[Finding]:
    """What does not hold of a block's, the first thing first."""
    found = ctx.db.rows(block, **names(ctx.target, ctx.settings))
    return [Finding(severity, code, message, detail, hint) for code, severity, message, detail, hint in found]


def require(ctx: Context, *asked: str) -> None:
    """Raises MigrationError for the first thing that doesn't hold."""
    for block in asked:
        for found in unmet(ctx, block):
            raise found.error
