"""What has to hold before anything is changed: one query each, which the steps, `check` and the scripts ask alike.

Each refusal names the thing, what was expected, and how to go on.
"""

from __future__ import annotations

from collections.abc import Iterable

from .. import log
from ..columns.cutover_mark import Mark
from ..db import catalog, locks
from ..db.catalog import Column, Table
from ..db.context import Context, TableContext
from ..db.database import Database
from ..errors import ANEW, Changed, MigrationError
from ..finding import Finding
from ..marks import CUT_OVER, OWN, SET_ASIDE
from ..settings import Settings
from ..sql import Fragment, blocks, literal, quote
from ..target import Target

OLDEST_SERVER = 140_000  # the backfill reads by ranges of tids, which came with PostgreSQL 14
BLOCKS = blocks("questions")
# of a table that is to get our column, once it is known that there is one; and with them what the step needs besides
OF_TABLE = (BLOCKS.rights, BLOCKS.source_column, BLOCKS.vector_column, BLOCKS.room_for_vector)
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
        "sync_name": target.sync,
        **{f"{kind}_call": target.names()[f"{kind}_function"] + "()" for kind in ("sync", "back", "guard", "typing")},
        "own_mark": OWN,
        "set_aside_mark": SET_ASIDE,
        "cut_over_mark": CUT_OVER,
    }
    # functions: of the sync trigger, or of that which guards a change
    asked: dict[str, Fragment] = {"sync_trigger": settings.sync_trigger, "functions": True}
    return asked | {name: literal(text) for name, text in texts.items()}


def unmet(ctx: Context, block: str, *, functions: bool = True) -> list[Finding]:
    """What does not hold of a block's, the first thing first; with no functions to make, no rights for them."""
    return Finding.of_rows(ctx.db.rows(block, **{**names(ctx.target, ctx.settings), "functions": functions}))


def require(ctx: Context, *asked: str) -> None:
    """Raises MigrationError for the first thing that doesn't hold; says what will not hold for long."""
    for block in asked:
        for found in unmet(ctx, block):
            if found.severity == "error":
                raise found.error
            log.warning(found.message, detail=found.detail, hint=found.hint)


def require_server(db: Database) -> None:
    if (version := catalog.server_version(db)) < OLDEST_SERVER:
        raise MigrationError(f"PostgreSQL {version // 10_000} is too old", hint="PostgreSQL 14 or newer is needed.")


def lock(ctx: TableContext) -> None:
    """Locks the table alone, and raises Changed unless it is still what the step has found in the catalogs."""
    # the root first, as writers do: a trigger that goes is taken off the partitions before
    locks.take(ctx.db)
    if catalog.table(ctx.db, ctx.target.schema, ctx.target.table) != ctx.table:
        raise Changed(f"{ctx.target} was changed just now")


def require_table(ctx: Context) -> Table:
    """The table, fit to be migrated. Raises MigrationError naming what is missing or different."""
    require_server(ctx.db)
    require(ctx, BLOCKS.table)
    table = catalog.table(ctx.db, ctx.target.schema, ctx.target.table)
    if table is None:
        raise Changed(f"{ctx.target} was dropped just now")
    ctx.db.expect(table.oid)
    return table


def already_vector(table: Table, target: Target) -> bool:
    """Whether `v` is a vector already, as newer OpenMemory creates it, or the table was cut over; says so."""
    if found := Mark.of(table, target):
        log.notice(f"{found.said(target)}; nothing to do")
        return True
    source = table.columns[target.source]
    if not source.is_vector:
        return False
    log.notice(
        f"column {quote(target.source)} of {target} is of type vector already, nothing to do",
        hint=None if source.dimensions else "alembic upgrade head gives it the dimensions that it lacks.",
    )
    return True


def require_column(table: Table, target: Target, settings: Settings, stamp: Iterable[str] | None) -> None:
    """Raises MigrationError where there is no column of ours, though the stamp, if there is one, says so."""
    column = table.columns.get(target.vector)
    if (column is None or not column.ours) and stamp is None:
        raise MigrationError(
            f"{target} has no column {quote(target.vector)} of this package yet",
            hint="First the step that adds it and its trigger: alembic upgrade om_20240107_pgvector.",
        )
    if column is not None and column.is_vector and not column.comment:
        raise MigrationError(
            f"column {quote(target.vector)} of {target} has no mark of this package, though this database is stamped"
            f" {', '.join(stamp or ()) or 'as migrated'}",
            detail="A dump without comments loses it (pg_dump --no-comments), or a tool that sets its own.",
            hint="openmemory-migrations repair --adopt compares every row and marks it again.",
        )
    if column is None or not column.ours:
        raise MigrationError(
            f"this database is stamped {', '.join(stamp or ()) or 'as migrated'}, but {target} has no column"
            f" {quote(target.vector)} of this package",
            detail="The stamp was made for another table or schema, or by hand.",
            hint="Correct schema and table (OM_PG_SCHEMA, OM_VECTOR_TABLE). If this is the table, stamp what comes"
            " before om_20240107_pgvector (in a chain of its own: alembic stamp base), then alembic upgrade head.",
        )
    agree(column, settings, target)


def require_dimensions(table: Table, target: Target, settings: Settings, stamp: Iterable[str]) -> None:
    """Raises MigrationError where a `v` that is a vector has none, though they are configured and nothing will run."""
    source = table.columns[target.source]
    if settings.dimensions and source.dimensions is None and not source.cut_over:
        raise MigrationError(
            f"this database is stamped {', '.join(stamp)}, but {quote(target.source)} of {target} has no dimensions",
            detail="They were not configured when the revisions ran, or the table was created anew since.",
            hint=f"{ANEW[0].upper()}{ANEW[1:]}.",
        )


def require_version_table(db: Database, schema: str, name: str) -> None:
    """Raises MigrationError where Alembic could not create its version table."""
    if catalog.relation_exists(db, schema, name) or db.value(
        "SELECT has_schema_privilege(:schema, 'CREATE')", {"schema": schema}
    ):
        return
    role = db.value("SELECT current_user")
    raise MigrationError(
        f"role {quote(role)} may not create the version table {quote(name)} in schema {quote(schema)}",
        hint=f"GRANT CREATE ON SCHEMA {quote(schema)} TO {quote(role)};",
    )


def agree(column: Column, settings: Settings, target: Target) -> None:
    """Raises MigrationError where our column has other dimensions than are configured."""
    if column.dimensions and settings.dimensions and column.dimensions != settings.dimensions:
        raise MigrationError(
            f"column {quote(target.vector)} of {target} has {column.dimensions:,} dimensions,"
            f" but {settings.dimensions:,} are configured",
            hint=f"Set OM_VEC_DIM={column.dimensions}, or begin anew: {ANEW}.",
        )
