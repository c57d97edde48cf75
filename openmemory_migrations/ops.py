"""What revisions call, ours and a host application's: one function up and one down for each step.

    from openmemory_migrations import ops

    def upgrade(**kw): ops.upgrade_expand(schema="app", table="chunks", column="embedding", dimensions=384)
    def downgrade(**kw): ops.downgrade_expand(schema="app", table="chunks", column="embedding", dimensions=384)

Each takes its connection from Alembic's `op`. What isn't given as an argument comes from `-x` over OM_* over the
default, so the same ones belong in each of the calls. A step commits on the driver's connection before its first
change, and with that whatever the same Alembic run has done before; all its checks come before that, unless that
transaction isn't READ COMMITTED: then its snapshot may be old, and the commit comes first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, TypedDict

from alembic import context, op
from sqlalchemy.exc import DBAPIError
from typing_extensions import Unpack

from . import log
from .columns.cutover_mark import DO, NO_SCRIPT, UNDO
from .cutover import preparations, switch, undo
from .db.database import Database, refuse_foreign_transaction
from .db.sqlerrors import as_migration_error
from .errors import MigrationError
from .runtime import stamps
from .script.script import Order, Script, StampGuard
from .settings import Settings
from .steps import backfill, expand, finalize, native_table
from .steps import repair as trigger_repair
from .steps.step import Step
from .target import Target

__all__ = [
    "Options",
    "downgrade_backfill",
    "downgrade_cutover",
    "downgrade_expand",
    "downgrade_finalize",
    "repair",
    "upgrade_backfill",
    "upgrade_cutover",
    "upgrade_expand",
    "upgrade_finalize",
]


class Options(TypedDict, total=False):
    """What a step may be told instead of asking -x and OM_*; each is described in the README's table of settings."""

    schema: str  # OM_PG_SCHEMA
    table: str  # OM_VECTOR_TABLE
    column: str  # of bytes, float32 little-endian; "v"
    vector_column: str  # "v_vector"
    dimensions: int  # OM_VEC_DIM
    sync_trigger: bool
    batch: int  # rows, BACKFILL_BATCH
    engine: Literal["client", "native", "server"]  # OM_BACKFILL_ENGINE
    workers: int
    pause_ms: int  # OM_BACKFILL_PAUSE_MS
    max_lag: int  # seconds, OM_BACKFILL_MAX_LAG
    stop_at_slot_lag: str  # such as "10GB"
    on_bad_rows: Literal["skip", "fail"]
    index: Literal["ivfflat", "hnsw", "none"]
    index_metric: Literal["l2", "cosine", "ip"]
    index_halfvec: bool
    index_lists: int
    index_m: int
    index_ef_construction: int
    index_memory: str  # such as "512MB"
    lock_timeout_ms: int
    accept_loss: int  # values that a downgrade may lose, rows that may leave at a cutover
    cutover: Literal["swap", "drop"]


# the options whose name isn't the -x name
SETTING = {
    "schema": "pg_schema",
    "table": "vector_table",
    "dimensions": "vec_dim",
    "batch": "backfill_batch",
    "engine": "backfill_engine",
    "workers": "backfill_workers",
    "pause_ms": "backfill_pause_ms",
    "max_lag": "backfill_max_lag",
}


def upgrade_expand(**options: Unpack[Options]) -> None:
    """Adds the extension, the vector column and the trigger that keeps it in step. Raises MigrationError."""
    if script := _script("upgrade", options):
        script.upgrade_expand()
        return
    with _step("expand", options) as step:
        if step:
            with step.alone():
                run = native_table.upgrade_expand if step.is_native else expand.upgrade
                run(step)


def downgrade_expand(**options: Unpack[Options]) -> None:
    """Takes trigger, functions and vector column away; the bytes and the extension stay. Raises MigrationError."""
    if script := _script("downgrade", options):
        with _outside_transaction(script):
            pass  # a refusal keeps the stamp of what has been undone before it
        script.downgrade_expand()
        return
    with _step("downgrade of expand", options) as step:
        if step:
            with step.alone():
                step.refuse_cut_over()
                if step.is_native:
                    native_table.downgrade_expand(step)
                    return
                # of a cutover that was interrupted and never resumed
                expand.downgrade(step, before=preparations.rows_back)


def upgrade_backfill(**options: Unpack[Options]) -> None:
    """Streams the bytes into the vector column in batches, each committed by itself. Raises MigrationError."""
    if script := _script("upgrade", options):
        with _outside_transaction(script):
            script.upgrade_backfill()
        return
    with _step("backfill", options) as step:
        if step and step.is_native:
            with step.alone():
                native_table.upgrade_backfill(step)
        elif step:
            with step.beside_others():
                ready = step.prepared(_stamp())
                if ready:
                    backfill.upgrade(ready, last=True)


def downgrade_backfill(**options: Unpack[Options]) -> None:
    """Nothing to undo: the vectors go with their column, or are in `v` and stay there."""
    if script := _script("downgrade", options):
        with _outside_transaction(script):
            pass  # each step down is a transaction of its own
        script.downgrade_backfill()
        return
    with _step("downgrade of backfill", options) as step:
        if step:
            step.refuse_cut_over()
            log.notice("nothing to undo: the next downgrade takes away the column, or the dimensions that were given")


def upgrade_finalize(**options: Unpack[Options]) -> None:
    """Checks the result and builds the index CONCURRENTLY; an index that can't be had is a NOTICE."""
    if script := _script("upgrade", options):
        with _outside_transaction(script):
            script.upgrade_finalize()
        return
    with _step("finalize", options) as step:
        if step and step.is_native:
            with step.alone():
                native_table.upgrade_finalize(step)
        elif step:
            with step.alone():
                ready = step.prepared(_stamp())
                if ready:
                    finalize.upgrade(ready)


def downgrade_finalize(**options: Unpack[Options]) -> None:
    """Drops the index CONCURRENTLY."""
    if script := _script("downgrade", options):
        with _outside_transaction(script):
            script.downgrade_finalize()
        return
    with _step("downgrade of finalize", options) as step:
        if step:
            with step.alone():
                step.refuse_cut_over()
                run = native_table.downgrade_finalize if step.is_native else finalize.downgrade
                run(step)


def upgrade_cutover(**options: Unpack[Options]) -> None:
    """Verifies every row, then makes the vector column `v` (swap) or takes `v` away (drop). Raises MigrationError."""
    _refuse_script(DO, "openmemory-migrations cutover upgrade")
    with _step("cutover", options) as step:
        if step:
            with step.alone():
                switch.upgrade(step)


def downgrade_cutover(**options: Unpack[Options]) -> None:
    """Rebuilds the bytes from the vectors, in batches, and puts the columns back. Raises MigrationError."""
    _refuse_script(UNDO, "openmemory-migrations cutover downgrade")
    with _step("downgrade of cutover", options) as step:
        if step:
            with step.alone():
                undo.downgrade(step)


def repair(**options: Unpack[Options]) -> None:
    """Makes the sync trigger what this version makes it, without touching a row; nothing where nothing is wrong.

    For a revision of the host's, after a restore, under another owner or with another version. Raises MigrationError.
    """
    if op.get_context().as_sql:
        raise MigrationError(
            "what there is to repair is seen online only", hint="openmemory-migrations repair --dry-run prints the SQL."
        )
    with _step("repair", options) as step:
        if step:
            with step.alone():
                trigger_repair.repair(step)


@contextmanager
def _step(name: str, options: Options) -> Iterator[Step | None]:
    """What a step works with, or None where there is nothing to do for it."""
    connection = op.get_bind()
    if connection.dialect.name == "sqlite":
        log.notice(f"{name}: SQLite keeps vectors as bytes, nothing to do")
        yield None
        return
    if connection.dialect.name != "postgresql":
        raise MigrationError(f'{name}: "{connection.dialect.name}" is not PostgreSQL')
    settings, target = configured(options)
    refuse_foreign_transaction(connection)
    stamps.watch(op.get_context(), connection)
    db = Database(connection, target.names())
    try:
        with db.session():
            yield Step.on(db, target, settings)
    except DBAPIError as error:
        raise as_migration_error(error, name) from error


def _stamp() -> tuple[str, ...]:
    return op.get_context().get_current_heads()


def _script(direction: Literal["upgrade", "downgrade"], options: Mapping[str, Any]) -> Script | None:
    """What writes the step to Alembic's script in offline mode (--sql), or None online."""
    migration = op.get_context()
    if not migration.as_sql:
        return None
    if migration.dialect.name != "postgresql":
        raise MigrationError(f'"{migration.dialect.name}" is not PostgreSQL')
    settings, target = configured(options)
    if settings.dimensions is None:
        raise MigrationError(
            "a script (--sql) needs to know the dimensions", hint="Set OM_VEC_DIM or OM_TIER, or -x vec_dim=1536."
        )
    destination = migration.opts.get("destination_rev")  # as the command line has it, such as head
    printed = migration.opts.get("output_buffer")
    order = printed.order if isinstance(printed, StampGuard) else Order(settings)
    return Script(target, settings, settings.dimensions, direction, destination, migration.impl.static_output, order)


def _refuse_script(*commands: str) -> None:
    """Raises MigrationError in offline mode, before anything of the step is printed."""
    if op.get_context().as_sql:
        raise MigrationError(
            NO_SCRIPT,
            hint=f"Run it online: {', or '.join(commands)} (in a chain of the host's, the same command without --sql).",
        )


def _outside_transaction(script: Script) -> AbstractContextManager[None]:
    return nullcontext() if script.settings.single_transaction else op.get_context().autocommit_block()


def configured(options: Mapping[str, Any]) -> tuple[Settings, Target]:
    """Settings and target from a call's options over -x over the environment. Raises MigrationError."""
    given = dict(options)
    unknown = [name for name in given if name not in Options.__annotations__]
    if unknown:
        raise MigrationError(
            f'unknown option "{unknown[0]}"', hint="Allowed: " + ", ".join(Options.__annotations__) + "."
        )
    columns = (given.pop("column", "v"), given.pop("vector_column", "v_vector"))
    settings = Settings.load({**_arguments(), **{SETTING.get(name, name): value for name, value in given.items()}})
    return settings, Target(settings.pg_schema, settings.vector_table, *columns)


def _arguments() -> dict[str, str]:
    """The -x arguments, where Alembic runs with an environment."""
    try:
        return context.get_x_argument(as_dictionary=True)
    except NameError:  # a MigrationContext made by hand
        return {}
