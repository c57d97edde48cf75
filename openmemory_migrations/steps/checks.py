"""What has to hold before anything is changed; each refusal names the thing, what was expected, and how to go on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .. import log
from ..columns.marks import Mark
from ..db import catalog, locks, partitions
from ..db.catalog import Column, Table
from ..db.context import Context, TableContext
from ..db.database import Database
from ..db.partitions import Part
from ..errors import ANEW, Changed, MigrationError
from ..settings import Settings
from ..sql import quote
from ..target import Target

OLDEST_SERVER = 140_000  # the backfill reads by ranges of tids, which came with PostgreSQL 14


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
    db, target = ctx.db, ctx.target
    require_server(db)
    table = catalog.table(db, target.schema, target.table)
    if table is None:
        raise MigrationError(
            f"table {target} does not exist",
            hint="Set OM_PG_SCHEMA and OM_VECTOR_TABLE as OpenMemory has them; it creates the table when it starts.",
        )
    db.expect(table.oid)
    if table.is_partition:
        raise MigrationError(
            f"{target} is a partition", hint="Set OM_VECTOR_TABLE to the table that it is a partition of."
        )
    if table.kind != "p" and (table.kind != "r" or table.has_children):
        what = {"v": "a view", "m": "a materialized view", "f": "a foreign table"}
        raise MigrationError(
            f"{target} is {what.get(table.kind, 'a table that others inherit from')}",
            hint="Only an ordinary or a partitioned table can be migrated.",
        )
    parts = partitions.parts(db, table.oid)
    for part in parts:
        if part.kind not in "rp":
            raise MigrationError(
                f"partition {part} of {target} is a foreign table",
                hint="Only tables of this server can be migrated; detach it, or migrate it where it is.",
            )
    source = table.columns.get(target.source)
    if Mark.of(table, target):
        _require_visible(target, parts)
        return table
    if source is None:
        raise MigrationError(
            f"table {target} has no column {quote(target.source)}",
            detail="Its columns are " + ", ".join(quote(name) for name in table.columns) + ".",
            hint="Set OM_PG_SCHEMA and OM_VECTOR_TABLE to the table that OpenMemory writes its vectors to.",
        )
    if source.type != "bytea" and not source.is_vector:
        raise MigrationError(
            f"column {quote(target.source)} of {target} is of type {source.type}",
            hint="Expected bytea (float32, little-endian), as OpenMemory creates it.",
        )
    _require_visible(target, parts)
    return table


def _require_visible(target: Target, parts: list[Part]) -> None:
    if hidden := [part for part in parts if part.rows_hidden]:
        raise MigrationError(
            f"row-level security of {hidden[0]} would hide rows from this role",
            hint="Connect as a role that bypasses it: the owner (without FORCE), one with BYPASSRLS, a superuser.",
        )


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


def require_rights(ctx: TableContext) -> None:
    for problem in missing_rights(ctx):
        raise problem


def missing_rights(ctx: TableContext) -> Iterator[MigrationError]:
    """Each right on the table and its schema that the first step needs and this role hasn't."""
    target, table = ctx.target, ctx.table
    role = ctx.db.value("SELECT current_user")
    if not table.owned:
        yield MigrationError(
            f"role {quote(role)} does not own table {target}",
            detail=f"Only its owner, {quote(table.owner)}, or a member of that role can add a column and a trigger.",
            hint=f"Connect as {quote(table.owner)}, or: GRANT {quote(table.owner)} TO {quote(role)};",
        )
    for part in partitions.parts(ctx.db, table.oid):
        if not part.owned and part.oid != table.oid:
            yield MigrationError(
                f"role {quote(role)} does not own partition {part} of {target}",
                detail=f"It belongs to {quote(part.owner)}; a column is added to all partitions at once.",
                hint=f"ALTER TABLE {part.sql_name} OWNER TO {quote(table.owner)};",
            )
    if ctx.settings.sync_trigger and not ctx.db.value(
        "SELECT has_schema_privilege(:schema, 'CREATE')", {"schema": target.schema}
    ):
        yield MigrationError(
            f"role {quote(role)} may not create functions in schema {quote(target.schema)}",
            hint=f"GRANT CREATE ON SCHEMA {quote(target.schema)} TO {quote(role)};",
        )


def require_available(db: Database) -> None:
    if not catalog.extension_available(db):
        raise MigrationError(
            'extension "vector" is not available on this server',
            hint="Have an administrator install pgvector for this PostgreSQL, then: CREATE EXTENSION vector;",
        )


def require_column(table: Table, target: Target, settings: Settings, stamp: Iterable[str] | None) -> None:
    """Raises MigrationError where there is no column of ours, though the stamp, if there is one, says so."""
    column = table.columns.get(target.vector)
    if (column is None or not column.ours) and stamp is None:
        raise MigrationError(
            f"{target} has no column {quote(target.vector)} of this package yet",
            hint="First the step that adds it and its trigger: alembic upgrade om_20240107_pgvector.",
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
