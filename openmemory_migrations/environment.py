"""What env.py calls: a database that is configured, one run at a time, our own version table."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from logging.config import fileConfig
from typing import Any

from alembic import context
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError

from . import log
from .columns.cutover_mark import DO, UNDO, Mark
from .cutover import preparations, undo
from .db import catalog, locks
from .db.connections import engine_of, reconnecting, required_url
from .db.context import Context
from .db.database import Database
from .db.signals import Stop, listening
from .encoding import back_trigger
from .errors import MigrationError
from .finding import Finding
from .script.script import StampGuard, opening
from .settings import Settings, refuse_unknown
from .sql import quote
from .steps import repair, requirements, statements
from .steps.step import Step
from .target import CUTOVER_VERSION_TABLE, VERSION_TABLE, Target

CUTOVER = "cutover"  # the section of alembic.ini, or what the console script calls so


def version_table() -> str:
    """That of the lineage which Alembic runs: the chain's, or the cutover's."""
    return CUTOVER_VERSION_TABLE if context.config.config_ini_section == CUTOVER else VERSION_TABLE


def run() -> None:
    """Runs the migrations of Alembic's current command. Raises MigrationError before anything is connected."""
    if context.config.config_file_name and context.config.file_config.has_section("loggers"):
        fileConfig(context.config.config_file_name, disable_existing_loggers=False)
    arguments = context.get_x_argument(as_dictionary=True)
    refuse_unknown(arguments)
    settings = Settings.load(arguments)
    if context.is_offline_mode():
        _print(settings)
        return
    url = required_url(settings)
    if url is None:
        return
    with engine_of(url) as engine:
        if url.get_backend_name() == "sqlite":
            with engine.connect() as connection:
                _migrate(connection, settings)
        else:
            reconnecting(engine, lambda: _run_postgres(engine, settings))


def _print(settings: Settings) -> None:
    """Prints the script for --sql, which needs no database: all of it, or nothing where a step has none."""
    versions = quote(settings.pg_schema, version_table())
    printed = StampGuard(versions, settings)
    context.configure(
        output_buffer=printed,
        dialect_name="postgresql",
        dialect_opts={"paramstyle": "named"},
        literal_binds=True,
        version_table=version_table(),
        version_table_schema=settings.pg_schema,
    )
    with nullcontext() if settings.single_transaction else context.begin_transaction():
        # Alembic's CREATE TABLE comes before the first step
        printed.write(f"{opening(settings)}\n\n")
        context.run_migrations()
    (context.config.output_buffer or sys.stdout).write(printed.getvalue())


def _run_postgres(engine: Engine, settings: Settings) -> None:
    what = f"the chain of {quote(settings.pg_schema)}.{quote(version_table())}"
    with ExitStack() as held:
        stop = Stop()
        with listening(stop, lambda: None):
            # before Alembic reads the version: who comes second must see what the first has stamped
            held.enter_context(locks.exclusive(engine, what, "chain", settings.pg_schema, sleep=stop.sleep))
        connection = held.enter_context(engine.connect())
        target = Target.of(settings)
        db = Database(connection, target.names())
        with db.transaction():
            if not catalog.schema_exists(db, settings.pg_schema):
                raise MigrationError(
                    f"schema {quote(settings.pg_schema)} does not exist",
                    hint="Set OM_PG_SCHEMA to the schema of OpenMemory's tables.",
                )
            had_versions = catalog.relation_exists(db, settings.pg_schema, version_table())
            if not had_versions:
                requirements.require(Context(db, target, settings), requirements.BLOCKS.server)
            requirements.require_version_table(db, settings.pg_schema, version_table())
        connection.rollback()  # or Alembic would take the transaction for somebody else's
        try:
            steps = _migrate(connection, settings)
        except MigrationError:
            if not had_versions:
                _drop_versions(db, settings.pg_schema)
            raise
        # of the functions that Alembic's commands hand over
        direction = getattr(context.get_context().opts.get("fn"), "__name__", "")
        if not steps and direction == "upgrade":
            _check_stamp(Step.on(db, target, settings))
        elif not steps and direction == "downgrade" and version_table() == CUTOVER_VERSION_TABLE:
            _check_undone(Step.on(db, target, settings))


def _migrate(connection: Connection, settings: Settings) -> int:
    """Runs the steps, each committed with its stamp; returns how many there were."""
    steps = 0
    is_postgres = connection.dialect.name != "sqlite"
    target = Target.of(settings)

    def applied(*_: Any, **__: Any) -> None:
        nonlocal steps
        steps += 1
        if is_postgres:
            ctx = Context(Database(connection, target.names()), target, settings)
            versions = statements.shown_versions(settings, version_table())
            statements.run(ctx, statements.BLOCKS.own_versions, versions_shown=versions)
        # one transaction for all would lose the stamp of a finished step to the failure of a later one
        connection.connection.dbapi_connection.commit()  # type: ignore[union-attr]
        if is_postgres:
            Database(connection, {}).shelter()

    context.configure(
        connection=connection,
        version_table=version_table(),
        version_table_schema=settings.pg_schema if is_postgres else None,
        on_version_apply=applied,
    )
    # not transaction_per_migration: a first step that refuses leaves not even an empty version table
    with context.begin_transaction():
        if is_postgres:
            Database(connection, {}).shelter()
        context.run_migrations()
    return steps


def _drop_versions(db: Database, schema: str) -> None:
    """What Alembic has made for a first step that refuses, if that has committed before: the table, empty."""
    name = version_table()
    with suppress(MigrationError, DBAPIError), db.transaction():
        if not catalog.relation_exists(db, schema, name):
            return
        db.run("LOCK TABLE {schema}.{versions} IN ACCESS EXCLUSIVE MODE", versions=quote(name))
        if not db.value("SELECT EXISTS (SELECT FROM {schema}.{versions})", versions=quote(name)):
            db.run("DROP TABLE {schema}.{versions}", versions=quote(name))


def _check_stamp(ctx: Context) -> None:
    """Nothing was left to run: that must not hide that the configured table was never migrated."""
    with ctx.db.transaction():
        stamped = context.get_context().get_current_heads()
        faults = _require_stamped(ctx, stamped) if stamped else []
    if not faults:
        return
    try:
        _alone(ctx, repair.repair)
    except MigrationError:
        if faults[0].severity == "error":
            raise
        # it works, and whoever may mend it can do so later
        log.warning(faults[0].message, detail=faults[0].detail, hint=faults[0].hint)


def _require_stamped(ctx: Context, stamped: tuple[str, ...]) -> list[Finding]:
    """Raises MigrationError where the stamp isn't this table's; returns what its trigger is to be repaired for."""
    target = ctx.target
    table = requirements.require_table(ctx)
    cut_over = Mark.of(table, target)
    if cut_over and back_trigger.follows(ctx, table.oid):
        log.warning(f"the cutover of {target} is half undone; the application can work", hint=f"To end that: {UNDO}.")
    elif cut_over:
        if version_table() == CUTOVER_VERSION_TABLE:
            cut_over.require(ctx.settings.cutover or cut_over.mode, target)
    elif table.columns[target.source].is_vector:
        requirements.require_dimensions(table, target, ctx.settings, stamped)
    elif version_table() == CUTOVER_VERSION_TABLE:
        raise MigrationError(
            f"this database is stamped {', '.join(stamped)}, but {target} is not cut over",
            detail="The stamp was made for another table or schema, or by hand.",
            hint="Correct schema and table (OM_PG_SCHEMA, OM_VECTOR_TABLE). If this is the table:"
            " alembic -n cutover stamp base, then alembic -n cutover upgrade head.",
        )
    else:
        requirements.require_column(table, target, ctx.settings, stamped)
        return repair.faults(ctx.with_table(table))
    return []


def only_stamps(mode: str) -> str:
    """The command for a table that is cut over, and not stamped so."""
    return f"With OM_CUTOVER={mode}: {DO}, which only stamps it"


def _check_undone(ctx: Context) -> None:
    """Nothing is stamped: that must hide neither that the configured table is still cut over, nor what a cutover has
    left that was killed before its switch."""
    db, target = ctx.db, ctx.target
    with db.transaction():
        table = catalog.table(db, target.schema, target.table)
        if table and (found := Mark.of(table, target)):
            raise MigrationError(
                f"{found.said(target)}; but this database isn't stamped so",
                detail="Another table of the schema had the same stamp, or it was taken away by hand.",
                hint=f"{only_stamps(found.mode)}; then {UNDO}.",
            )
        left = table and preparations.left(ctx.with_table(table))
    if left:
        _alone(ctx, undo.downgrade)


def _alone(ctx: Context, work: Callable[[Context], object]) -> None:
    """As a step does it, of which there was none to run."""
    with ctx.db.session(), Step(ctx.db, ctx.target, ctx.settings).alone():
        work(ctx)


__all__ = ["CUTOVER", "CUTOVER_VERSION_TABLE", "VERSION_TABLE", "only_stamps", "run"]
