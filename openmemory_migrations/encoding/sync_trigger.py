"""The SQL that turns `v` into a vector, and the trigger that keeps `v_vector` in step with `v`.

OpenMemory writes only `v`. These texts are frozen with the first release: a later change gets functions of new names.
"""

from __future__ import annotations

from sqlalchemy.exc import DBAPIError

from ..db.database import Database
from ..db.sqlerrors import as_migration_error
from ..sql import SQL, blocks, dollar_quote

BLOCKS = blocks("encoding")


# also for what a subscription applies, and whoever else has session_replication_role at replica
FIRE_ALWAYS = "ALTER TABLE {table} ENABLE ALWAYS TRIGGER {trigger}"

# Citus asks for this around the DDL of a trigger, not for its work; elsewhere it is a name that nobody uses
ALLOW_TRIGGERS = "SET LOCAL citus.enable_unsafe_triggers TO on"
REFUSE_TRIGGERS = "SET LOCAL citus.enable_unsafe_triggers TO off"


def of_a_trigger(db: Database, statement: str, **names: SQL) -> None:
    """Runs the DDL of a trigger, inside the caller's transaction, without the server's NOTICE of nothing to drop."""
    with db.local({"client_min_messages": "warning"}):
        db.run(ALLOW_TRIGGERS)
        db.run(statement, **names)
        db.run(REFUSE_TRIGGERS)


def create_convert(db: Database, **names: SQL) -> None:
    db.run(BLOCKS.create_convert, tag=dollar_quote([*db.names.values(), *names.values()]), **names)


def bring_convert(db: Database, **names: SQL) -> None:
    """Creates the function where there is no trigger that has brought it, inside the caller's transaction."""
    if _missing(db):
        create_convert(db, **names)


def _missing(db: Database) -> bool:
    name = {"name": db.names["convert"] + "(bytea, integer)"}
    return bool(db.value("SELECT pg_catalog.to_regprocedure(:name) IS NULL", name))


def ensure_convert(db: Database, **names: SQL) -> None:
    """The same in transactions of its own; who comes second finds it there."""
    try:
        with db.transaction():
            bring_convert(db, **names)
    except DBAPIError as error:
        with db.transaction():
            missing = _missing(db)
        if missing:
            raise as_migration_error(error, "creating the function that converts") from error


def create_trigger(db: Database, dimensions: int | None, **names: SQL) -> None:
    """One statement each, inside the caller's transaction; SHARE ROW EXCLUSIVE on the table."""
    size = SQL("NULL") if dimensions is None else dimensions
    db.run(BLOCKS.create_sync, dimensions=size, tag=dollar_quote([*db.names.values(), *names.values()]), **names)
    db.run("REVOKE ALL ON FUNCTION {sync_function}() FROM PUBLIC")
    of_a_trigger(db, BLOCKS.create_sync_trigger, **names)
    of_a_trigger(db, FIRE_ALWAYS, trigger=db.names["sync"])
    db.run("COMMENT ON TRIGGER {sync} ON {table} IS {comment}")


def drop_trigger(db: Database) -> None:
    """The trigger and its function, then the function that converts if no other table of the schema needs it."""
    of_a_trigger(db, "DROP TRIGGER IF EXISTS {sync} ON {table}")
    db.run("DROP FUNCTION IF EXISTS {sync_function}()")
    if not called(db, db.names["convert"]):
        db.run("DROP FUNCTION IF EXISTS {convert}(bytea, integer)")


def called(db: Database, function: str) -> bool:
    """Whether another function calls the one of that quoted name: each table's trigger has one that does."""
    calls = "SELECT EXISTS (SELECT FROM pg_catalog.pg_proc WHERE position(:call IN prosrc) > 0)"
    return bool(db.value(calls, {"call": function + "("}))
