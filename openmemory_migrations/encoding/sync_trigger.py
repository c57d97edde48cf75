"""The SQL that turns `v` into a vector, and the trigger that keeps `v_vector` in step with `v`.

OpenMemory writes only `v`. These texts are frozen with the first release: a later change gets functions of new names.
"""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy.exc import DBAPIError

from ..db.database import Database
from ..db.sqlerrors import as_migration_error

# float32 from its bytes: sign, exponent and 23 bits, in float8, where every float32 is exact (denormals and -0 too).
# NULL for whatever can't become a vector, so that it never fails a write. PL/pgSQL because it is 2.6 times as fast here
# as the same query in LANGUAGE sql (measured, 256 dimensions); `|| ''` fetches a value out of line once, not per byte.
CREATE_CONVERT = """
CREATE OR REPLACE FUNCTION {convert}(source bytea, dimensions integer) RETURNS {ext}.vector
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE SET search_path = pg_catalog, pg_temp AS {tag}
DECLARE
  wanted CONSTANT integer := coalesce(dimensions, octet_length(source) / 4);
  bytes bytea;
  elements float8[];
BEGIN
  IF source IS NULL OR octet_length(source) <> 4 * wanted OR wanted NOT BETWEEN 1 AND 16000 THEN
    RETURN NULL;
  END IF;
  bytes := source || ''::bytea;
  elements := ARRAY(
    SELECT CASE high & 32640
             WHEN 32640 THEN NULL
             WHEN 0 THEN (((high & 127) << 16) + low)
                         * CASE WHEN high > 32767 THEN -(2::float8 ^ -149) ELSE 2::float8 ^ -149 END
             ELSE (((high & 127) << 16) + low + 8388608)
                  * CASE WHEN high > 32767 THEN -(2::float8 ^ (((high >> 7) & 255) - 150))
                         ELSE 2::float8 ^ ((high >> 7) - 150) END
           END
    FROM (SELECT get_byte(bytes, i) + (get_byte(bytes, i + 1) << 8) AS low,
                 get_byte(bytes, i + 2) + (get_byte(bytes, i + 3) << 8) AS high
          FROM generate_series(0, 4 * wanted - 4, 4) AS i OFFSET 0) AS halves);
  IF array_position(elements, NULL) IS NOT NULL THEN
    RETURN NULL;
  END IF;
  RETURN elements::{ext}.vector;
END
{tag}
"""

# the writer may lack rights on the extension's schema, hence SECURITY DEFINER; no EXCEPTION block: it would cost every
# write a subtransaction. A vector that the writer has set itself stays.
CREATE_SYNC = """
CREATE OR REPLACE FUNCTION {sync_function}() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS {tag}
BEGIN
  IF NEW.{vector} IS NULL
     OR (TG_OP = 'UPDATE' AND {ext}.vector_send(NEW.{vector}) IS NOT DISTINCT FROM {ext}.vector_send(OLD.{vector})) THEN
    NEW.{vector} := {convert}(NEW.{source}, {dimensions});
  END IF;
  RETURN NEW;
END
{tag}
"""

CREATE_TRIGGER = """
CREATE OR REPLACE TRIGGER {sync} BEFORE INSERT OR UPDATE OF {source} ON {table}
FOR EACH ROW EXECUTE FUNCTION {sync_function}()
"""
# also for what a subscription applies, and whoever else has session_replication_role at replica
FIRE_ALWAYS = "ALTER TABLE {table} ENABLE ALWAYS TRIGGER {trigger}"

# Citus asks for this around the DDL of a trigger, not for its work; elsewhere it is a name that nobody uses
ALLOW_TRIGGERS = "SET LOCAL citus.enable_unsafe_triggers TO on"
REFUSE_TRIGGERS = "SET LOCAL citus.enable_unsafe_triggers TO off"


def tag(names: Iterable[str]) -> str:
    """A dollar quote that no name inside the function can end."""
    found = "$function$"
    while any(found in name for name in names):
        found = f"{found[:-1]}_$"
    return found


def of_a_trigger(db: Database, statement: str, **names: str) -> None:
    """Runs the DDL of a trigger, inside the caller's transaction, without the server's NOTICE of nothing to drop."""
    with db.local({"client_min_messages": "warning"}):
        db.run(ALLOW_TRIGGERS)
        db.run(statement, **names)
        db.run(REFUSE_TRIGGERS)


def create_convert(db: Database, **names: str) -> None:
    db.run(CREATE_CONVERT, tag=tag([*db.names.values(), *names.values()]), **names)


def bring_convert(db: Database, **names: str) -> None:
    """Creates the function where there is no trigger that has brought it, inside the caller's transaction."""
    if _missing(db):
        create_convert(db, **names)


def _missing(db: Database) -> bool:
    name = {"name": db.names["convert"] + "(bytea, integer)"}
    return bool(db.value("SELECT pg_catalog.to_regprocedure(:name) IS NULL", name))


def ensure_convert(db: Database, **names: str) -> None:
    """The same in transactions of its own; who comes second finds it there."""
    try:
        with db.transaction():
            bring_convert(db, **names)
    except DBAPIError as error:
        with db.transaction():
            missing = _missing(db)
        if missing:
            raise as_migration_error(error, "creating the function that converts") from error


def create_trigger(db: Database, dimensions: int | None, **names: str) -> None:
    """One statement each, inside the caller's transaction; SHARE ROW EXCLUSIVE on the table."""
    size = "NULL" if dimensions is None else str(dimensions)
    db.run(CREATE_SYNC, dimensions=size, tag=tag([*db.names.values(), *names.values()]), **names)
    db.run("REVOKE ALL ON FUNCTION {sync_function}() FROM PUBLIC")
    of_a_trigger(db, CREATE_TRIGGER, **names)
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
