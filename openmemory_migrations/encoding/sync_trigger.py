"""The SQL that turns `v` into a vector, and the trigger that keeps `v_vector` in step with `v`.

OpenMemory writes only `v`. These texts are frozen with the first release: a later change gets functions of new names.
"""

from __future__ import annotations

from sqlalchemy.exc import DBAPIError

from ..db.database import Database
from ..db.sqlerrors import as_migration_error
from ..sql import FUNCTION, SQL, blocks

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
    db.run(BLOCKS.create_convert, tag=FUNCTION, **names)


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


def called(db: Database, function: str) -> bool:
    """Whether another function calls the one of that quoted name: each table's trigger has one that does."""
    calls = "SELECT EXISTS (SELECT FROM pg_catalog.pg_proc WHERE position(:call IN prosrc) > 0)"
    return bool(db.value(calls, {"call": function + "("}))
