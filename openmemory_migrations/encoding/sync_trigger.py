"""The SQL that turns `v` into a vector: of the trigger that keeps `v_vector` in step with `v`, and of a run.

OpenMemory writes only `v`. The trigger's texts are frozen with the first release: a later change gets functions of new
names.
"""

from __future__ import annotations

from ..db.database import Database
from ..sql import FUNCTION, SQL, Fragment, blocks, quote
from .temporary import Temporary

BLOCKS = blocks("encoding")

CONVERT = Temporary((BLOCKS.create_convert,), "DROP FUNCTION IF EXISTS {convert}(bytea, integer)")
# also for what a subscription applies, and whoever else has session_replication_role at replica
FIRE_ALWAYS = "ALTER TABLE {table} ENABLE ALWAYS TRIGGER {trigger}"

# Citus asks for this around the DDL of a trigger, not for its work; elsewhere it is a name that nobody uses
ALLOW_TRIGGERS = "SET LOCAL citus.enable_unsafe_triggers TO on"
REFUSE_TRIGGERS = "SET LOCAL citus.enable_unsafe_triggers TO off"


def of_a_trigger(db: Database, statement: str, **names: Fragment) -> None:
    """Runs the DDL of a trigger, inside the caller's transaction, without the server's NOTICE of nothing to drop."""
    with db.local({"client_min_messages": "warning"}):
        db.run(ALLOW_TRIGGERS)
        db.run(statement, **names)
        db.run(REFUSE_TRIGGERS)


Statements = list[tuple[SQL, bool]]  # each with whether it is DDL of a trigger


def created(db: Database, trigger: str, *, function: str, on: str, **names: Fragment) -> Statements:
    """Function and trigger, both of that name; the function is the table owner's, and nobody else may call it."""
    own = {"function": db.names[trigger + "_function"], "trigger": db.names[trigger]}
    of_table = "SELECT pg_catalog.pg_get_userbyid(relowner) FROM pg_catalog.pg_class WHERE oid = CAST(:it AS regclass)"
    owner = db.value(of_table, {"it": db.names["table"]})
    return [
        (db.sql(function, tag=FUNCTION, **names), False),
        (db.sql("REVOKE ALL ON FUNCTION {function}() FROM PUBLIC", **own), False),
        (db.sql("ALTER FUNCTION {function}() OWNER TO {owner}", owner=quote(owner), **own), False),
        (db.sql(on, **names), True),
        (db.sql(FIRE_ALWAYS, **own), True),
    ]


def execute(db: Database, statements: Statements) -> None:
    """Inside the caller's transaction."""
    for statement, of_trigger in statements:
        if of_trigger:
            of_a_trigger(db, "{it}", it=statement)
        else:
            db.run("{it}", it=statement)


def create(db: Database, trigger: str, *, function: str, on: str, **names: Fragment) -> None:
    execute(db, created(db, trigger, function=function, on=on, **names))
