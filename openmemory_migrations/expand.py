"""First step: the extension, the column, the trigger. Quick whatever the table's size, and nothing is rewritten."""

from __future__ import annotations

from sqlalchemy.exc import DBAPIError

from . import catalog, dimensions, locks, log, synctrigger
from .catalog import Column, Extension, Table
from .database import Database, as_migration_error
from .errors import ANEW, MigrationError
from .settings import Settings
from .target import Target, quote

OLDEST_SERVER = 140_000  # the backfill reads by ranges of tids, which came with PostgreSQL 14
EXTENSIONS_SCHEMA = "extensions"  # where Supabase keeps them; never in a schema of the application's own


def upgrade(db: Database, target: Target, settings: Settings) -> None:
    """Adds `v_vector` and its trigger, or finishes what an interrupted run has begun. Raises before any change."""
    with db.reading():
        table = require_table(db, target)
        if already_vector(table, target):
            return
        _require_rights(db, target, table, settings)
        extension = catalog.extension(db)
        if extension is None:
            _require_available(db)
        size = _dimensions(db, target, settings, table, extension)
    db.take_over()

    if extension is None:
        extension = _create_extension(db)
    names = extension.names()
    column = table.columns.get(target.vector)
    what = f"adding {quote(target.vector)} to {target}"

    def change() -> None:
        if column is not None and not column.ours:
            db.run("ALTER TABLE {table} RENAME COLUMN {vector} TO {adopted}")
        db.run("ALTER TABLE {table} ADD COLUMN IF NOT EXISTS {vector} {type}", type=vector_type(extension, size))
        db.run("COMMENT ON COLUMN {table}.{vector} IS {comment}")
        if settings.sync_trigger:
            synctrigger.create_convert(db, **names)
            synctrigger.create_trigger(db, size, **names)

    locks.retried(db, settings.lock_timeout_ms, table.oid, what, change)
    log.notice(
        f"column {quote(target.vector)} of {target} is in place: vector{f'({size})' if size else ''}"
        + (f", dimensions {_origin(settings)}" if size and (column is None or not column.ours) else ""),
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
            f"no row of {target} says how many dimensions its vectors have, so {quote(target.vector)} has none",
            hint=f"For an index, set OM_VEC_DIM or OM_TIER, then: {ANEW}.",
        )


def downgrade(db: Database, target: Target, settings: Settings) -> None:
    """Takes trigger, functions and column away; `v` and the extension stay. Refused where values would be lost."""
    with db.reading():
        table = catalog.table(db, target.schema, target.table)
        if table is None:
            log.warning(f"table {target} does not exist, nothing to take away")
            return
        column = table.columns.get(target.vector)
        restored = target.adopted in table.columns
        if column is not None and column.ours and not restored:
            _refuse_loss(db, column, target, settings)
    db.take_over()
    if column is None:
        log.notice(f"column {quote(target.vector)} of {target} does not exist, skipping")
    elif not column.ours:
        log.warning(f"column {quote(target.vector)} of {target} is not this package's, leaving it")

    def change() -> None:
        synctrigger.drop_trigger(db)
        if column is not None and column.ours:
            db.run("ALTER TABLE {table} DROP COLUMN IF EXISTS {vector}")
            if restored:
                db.run("ALTER TABLE {table} RENAME COLUMN {adopted} TO {vector}")

    locks.retried(db, settings.lock_timeout_ms, table.oid, f"removing {quote(target.vector)} from {target}", change)
    if column is not None and column.ours and not restored:
        log.notice(f"column {quote(target.vector)} of {target} dropped, {quote(target.source)} is as it was")
    if restored:
        log.notice(f"column {quote(target.vector)} of {target}, which the upgrade had set aside, is back as it was")


def _origin(settings: Settings) -> str:
    return "as configured" if settings.dimensions else "as the rows have them"


def vector_type(extension: Extension, size: int | None) -> str:
    return f"{quote(extension.schema)}.vector" + (f"({size})" if size else "")


def require_table(db: Database, target: Target) -> Table:
    """The table, fit to be migrated. Raises MigrationError naming what is missing or different."""
    if (version := catalog.server_version(db)) < OLDEST_SERVER:
        raise MigrationError(f"PostgreSQL {version // 10_000} is too old", hint="PostgreSQL 14 or newer is needed.")
    table = catalog.table(db, target.schema, target.table)
    if table is None:
        raise MigrationError(
            f"table {target} does not exist",
            hint="Set OM_PG_SCHEMA and OM_VECTOR_TABLE as OpenMemory has them; it creates the table when it starts.",
        )
    if table.kind != "r" or table.has_children:
        what = {"v": "a view", "m": "a materialized view", "f": "a foreign table", "p": "a partitioned table"}
        raise MigrationError(
            f"{target} is {what.get(table.kind, 'a table that others inherit from')}",
            hint="Only an ordinary table can be migrated.",
        )
    source = table.columns.get(target.source)
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
    if table.rows_hidden:
        raise MigrationError(
            f"row-level security of {target} would hide rows from this role",
            hint="Connect as a role that bypasses it: the owner (without FORCE), one with BYPASSRLS, a superuser.",
        )
    return table


def already_vector(table: Table, target: Target) -> bool:
    """Whether `v` is a vector already, as newer OpenMemory creates it; says so."""
    if not table.columns[target.source].is_vector:
        return False
    log.notice(f"column {quote(target.source)} of {target} is of type vector already, nothing to do")
    return True


def _require_rights(db: Database, target: Target, table: Table, settings: Settings) -> None:
    role = db.value("SELECT current_user")
    if not table.owned:
        raise MigrationError(
            f"role {quote(role)} does not own table {target}",
            detail=f"Only its owner, {quote(table.owner)}, or a member of that role can add a column and a trigger.",
            hint=f"Connect as {quote(table.owner)}, or: GRANT {quote(table.owner)} TO {quote(role)};",
        )
    if settings.sync_trigger and not db.value(
        "SELECT has_schema_privilege(:schema, 'CREATE')", {"schema": target.schema}
    ):
        raise MigrationError(
            f"role {quote(role)} may not create functions in schema {quote(target.schema)}",
            hint=f"GRANT CREATE ON SCHEMA {quote(target.schema)} TO {quote(role)};",
        )


def _require_available(db: Database) -> None:
    if not catalog.extension_available(db):
        raise MigrationError(
            'extension "vector" is not available on this server',
            hint="Have an administrator install pgvector for this PostgreSQL, then: CREATE EXTENSION vector;",
        )


def _create_extension(db: Database) -> Extension:
    schema = EXTENSIONS_SCHEMA if catalog.schema_exists(db, EXTENSIONS_SCHEMA) else "public"
    statement = f"CREATE EXTENSION vector SCHEMA {quote(schema)}"
    try:
        with db.transaction():
            db.run(statement)
    except DBAPIError as error:
        problem = as_migration_error(error, 'extension "vector" can\'t be created')
        raise MigrationError(
            problem.message, detail=problem.detail, hint=f"Have an administrator run: {statement};"
        ) from error
    with db.transaction():
        extension = catalog.extension(db)
    assert extension is not None
    log.notice(f'extension "vector" {".".join(map(str, extension.version))} created in schema {quote(schema)}')
    return extension


def _dimensions(
    db: Database, target: Target, settings: Settings, table: Table, extension: Extension | None
) -> int | None:
    column = table.columns.get(target.vector)
    if column is not None and column.ours:
        agree(column, settings, target)
        return column.dimensions
    if column is not None:
        if not column.is_vector:
            raise MigrationError(
                f"column {quote(target.vector)} of {target} is of type {column.type}",
                hint="Rename or drop that column: this package puts its vectors there.",
            )
        if target.adopted in table.columns:
            raise MigrationError(
                f"{target} has both {quote(target.vector)} and {quote(target.adopted)}, neither made by this package",
                hint=f"Rename or drop {quote(target.adopted)}: the existing column is set aside under that name.",
            )
        assert extension is not None
        found = dimensions.survey(db, db.names["vector"], **extension.names())
    else:
        found = dimensions.survey(db)
    return dimensions.resolve(settings.dimensions, found)


def agree(column: Column, settings: Settings, target: Target) -> None:
    """Raises MigrationError where our column has other dimensions than are configured."""
    if column.dimensions and settings.dimensions and column.dimensions != settings.dimensions:
        raise MigrationError(
            f"column {quote(target.vector)} of {target} has {column.dimensions:,} dimensions,"
            f" but {settings.dimensions:,} are configured",
            hint=f"Set OM_VEC_DIM={column.dimensions}, or begin anew: {ANEW}.",
        )


def _refuse_loss(db: Database, column: Column, target: Target, settings: Settings) -> None:
    extension = catalog.extension(db)
    assert extension is not None  # there is a column of its type
    # vector_dims would fetch every value that is out of line; a column with dimensions needn't be asked
    size = str(column.dimensions) if column.dimensions else db.sql("{ext}.vector_dims({vector})", **extension.names())
    lost = db.value(
        """
        SELECT count(*) FROM {table}
        WHERE {vector} IS NOT NULL AND ({source} IS NULL OR octet_length({source}) <> 4 * {size})
        """,
        size=size,
    )
    if lost > settings.accept_loss:
        raise MigrationError(
            f"{lost:,} values of {quote(target.vector)} have no source in {quote(target.source)} of {target}"
            " and would be lost",
            hint=f"Copy them elsewhere first, or accept the loss with OM_ACCEPT_LOSS={lost}.",
        )
