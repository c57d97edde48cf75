"""The SQL that turns a vector into the bytes that it came from, and the triggers on a table that was cut over.

Between a swap and its undoing the bytes are an archive: a row whose vector changes has none any more (forgetting).
While the cutover is undone, bytes follow the vectors (following). Frozen with the first release.
"""

from __future__ import annotations

from ..db.context import Context
from ..db.database import Database
from ..encoding.sync_trigger import FIRE_ALWAYS, called, of_a_trigger, tag

# vector_send() gives int16 dimensions, int16 zero, then float4 big-endian (pgvector, src/vector.c). Half the time of
# turning the bytes of its hexadecimal text round with a regular expression (measured, 1,536 dimensions: 0.37 ms)
CREATE_UNCONVERT = """
CREATE OR REPLACE FUNCTION {unconvert}(source {ext}.vector) RETURNS bytea
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE SET search_path = pg_catalog, pg_temp AS {tag}
DECLARE
  sent CONSTANT bytea := {ext}.vector_send(source);
BEGIN
  RETURN (SELECT string_agg(substr(sent, i + 3, 1) || substr(sent, i + 2, 1) || substr(sent, i + 1, 1)
                            || substr(sent, i, 1), ''::bytea ORDER BY i)
          FROM generate_series(5, octet_length(sent), 4) AS i);
END
{tag}
"""
CREATE_FORGETTING = """
CREATE OR REPLACE FUNCTION {back_function}() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS {tag}
BEGIN
  NEW.{source} := NULL;
  RETURN NEW;
END
{tag}
"""
FORGETTING = """
CREATE TRIGGER {back} BEFORE UPDATE OF {vector} ON {table}
FOR EACH ROW WHEN (OLD.{source} IS NOT NULL) EXECUTE FUNCTION {back_function}()
"""
# SECURITY DEFINER: the writer may lack rights on the extension's schema
CREATE_FOLLOWING = """
CREATE OR REPLACE FUNCTION {back_function}() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS {tag}
BEGIN
  NEW.{source} := {unconvert}(NEW.{vector});
  RETURN NEW;
END
{tag}
"""
FOLLOWING = """
CREATE TRIGGER {back} BEFORE INSERT OR UPDATE OF {vector} ON {table}
FOR EACH ROW EXECUTE FUNCTION {back_function}()
"""


def forget(db: Database) -> None:
    """Leaves the trigger that takes the bytes of a row away whose vector is changed."""
    _create(db, CREATE_FORGETTING, FORGETTING)


def follow(db: Database, **ext: str) -> None:
    """Leaves the trigger that gives a row whose vector is written the bytes of it."""
    db.run(CREATE_UNCONVERT, tag=_tag(db, ext), **ext)
    _create(db, CREATE_FOLLOWING, FOLLOWING)


def follows(ctx: Context, table_oid: int) -> bool:
    """Whether it is the following one that is there: an undoing was begun, and has not ended. 4 is INSERT."""
    return bool(
        ctx.db.value(
            "SELECT EXISTS (SELECT FROM pg_catalog.pg_trigger WHERE tgrelid = :table AND tgname = :name"
            " AND tgtype & 4 <> 0)",
            {"table": table_oid, "name": ctx.target.back},
        )
    )


def drop(db: Database) -> None:
    """Trigger and function, then the function that converts if no other table of the schema needs it."""
    of_a_trigger(db, "DROP TRIGGER IF EXISTS {back} ON {table}")
    db.quietly("DROP FUNCTION IF EXISTS {back_function}()")
    if not called(db, db.names["unconvert"]):
        # without its type, whose schema nobody needs to know for this
        db.quietly("DROP FUNCTION IF EXISTS {unconvert}")


def _create(db: Database, function: str, trigger: str) -> None:
    of_a_trigger(db, "DROP TRIGGER IF EXISTS {back} ON {table}")
    db.run(function, tag=_tag(db, {}))
    db.run("REVOKE ALL ON FUNCTION {back_function}() FROM PUBLIC")
    of_a_trigger(db, trigger)
    of_a_trigger(db, FIRE_ALWAYS, trigger=db.names["back"])


def _tag(db: Database, ext: dict[str, str]) -> str:
    return tag([*db.names.values(), *ext.values()])
