"""Keeps what was found in all rows true until the change that was decided by it.

A change drops values because each row was seen to need them no more. Whoever writes meanwhile could make that untrue,
and to read the rows again under the lock would keep everybody waiting. So for that time a trigger refuses each write
that would. To create it waits for the transactions that have written before: what those wrote, a snapshot that is taken
afterwards sees. It fires AFTER the row is written, so that it sees what others' triggers have made of it, and ALWAYS,
whatever session_replication_role. That nobody has disabled it in between, and that this run has had its locks between
runs all the time, is asked by `Database.require_seen`. Without those it refuses nothing: what a killed run leaves does
no harm until a later one takes it away.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy.exc import DBAPIError

from .. import log
from ..db import locks
from ..db.catalog import Extension
from ..db.context import VectorContext
from ..db.database import HELD, Database
from ..db.sqlerrors import as_migration_error
from ..encoding import sync_trigger
from ..encoding.sync_trigger import FIRE_ALWAYS, of_a_trigger, tag
from ..errors import MigrationError
from ..target import literal, quote

CLEAN_UP_TIMEOUT = "100ms"
COMMENT = "openmemory_migrations: refuses, while a step is at work, what that step would lose"

# SECURITY DEFINER: the writer may lack rights on the extension's schema. A run that was killed may have left it, and a
# schema of these functions have got another name since: then it refuses nothing and fails nothing. Images are compared,
# as the operator of vectors takes 0 and -0 for equal
CREATE_FUNCTION = """
CREATE OR REPLACE FUNCTION {guard_function}() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS {tag}
BEGIN
  IF TG_OP = 'UPDATE' AND {unchanged}
     OR EXISTS (SELECT FROM unnest({calls}) AS its (name) WHERE to_regprocedure(its.name) IS NULL) THEN
    RETURN NULL;
  END IF;
  IF ({lost}) AND {at_work} THEN
    RAISE EXCEPTION USING ERRCODE = 'object_in_use', MESSAGE = {message}, HINT = {hint};
  END IF;
  RETURN NULL;
END
{tag}
"""
# the condition makes it depend on the columns: whoever drops one while it is there is told so, and writes go on
CREATE_TRIGGER = """
CREATE OR REPLACE TRIGGER {guard} AFTER INSERT OR UPDATE ON {table}
FOR EACH ROW WHEN (NEW.{one} IS NOT NULL OR NEW.{other} IS NOT NULL) EXECUTE FUNCTION {guard_function}()
"""
AT_WORK = """
EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 1
                               AND (pid, (classid::bigint << 32) + objid::bigint) IN ({held}))
"""
# by what it says of itself: the table, the trigger or its schema may have got other names since
OURS = """
SELECT t.tgname, CAST(CAST(t.tgfoid AS regprocedure) AS text)
FROM pg_catalog.pg_trigger t
WHERE t.tgrelid = pg_catalog.to_regclass(:table) AND t.tgparentid = 0
  AND pg_catalog.obj_description(t.oid, 'pg_trigger') = :comment
ORDER BY 1
"""


@dataclass(frozen=True)
class Loss:
    """Which write is refused: one that leaves `lost` true, unless it is an UPDATE that leaves both columns as they
    were, or with `other_may_change` only the first.

    `column` is the one that nobody needs to write, beside `other`, as the names of a `Database` have them.
    """

    column: str
    other: str
    lost: str
    other_may_change: bool = False

    @property
    def unchanged(self) -> str:
        names = [self.column] if self.other_may_change else [self.column, self.other]
        new, old = (", ".join(f"{row}.{{{name}}}" for name in names) for row in ("NEW", "OLD"))
        return f"record_image_eq(ROW({new}), ROW({old}))"


# `v` goes: another vector than its bytes say would be all that is left
BYTES = Loss(
    "vector",
    "source",
    "NEW.{source} IS NOT NULL AND {ext}.vector_send({convert}(NEW.{source}, {dimensions}))"
    " IS DISTINCT FROM {ext}.vector_send(NEW.{vector})",
)
# the bytes are to be the source again: others than the vector says would be taken for it
VECTORS = Loss("source", "vector", "{unconvert}(NEW.{vector}) IS DISTINCT FROM NEW.{source}")
# the vector column goes: a vector that no bytes give would be nowhere. One whose bytes the application takes away is
# stale, where no trigger takes it along
SOURCELESS = Loss(
    "vector",
    "source",
    "NEW.{vector} IS NOT NULL AND {convert}(NEW.{source}, {ext}.vector_dims(NEW.{vector})) IS NULL",
    other_may_change=True,
)
# the adopted column goes: of a row that moves to another partition the server says that it is INSERTed
ADOPTED = Loss(
    "adopted",
    "source",
    "NEW.{adopted} IS NOT NULL AND CASE WHEN NEW.{source} IS NULL THEN {ext}.vector_send(NEW.{vector})"
    " IS DISTINCT FROM {ext}.vector_send(NEW.{adopted}) ELSE NEW.{vector} IS NULL END",
    other_may_change=True,
)
# a native table's `v` goes, and the column with dimensions takes its place
UNTYPED = Loss("typed", "source", "{ext}.vector_send(NEW.{typed}) IS DISTINCT FROM {ext}.vector_send(NEW.{source})")


@contextmanager
def against(ctx: VectorContext, loss: Loss) -> Iterator[None]:
    """Refuses such writes from here on, until the change has dropped it; after an error it takes that back."""
    db = ctx.db

    def create() -> None:
        if "{convert}" in loss.lost:
            sync_trigger.bring_convert(db, **ctx.extension.names())
        drop(db, but=db.names["guard"])
        _create(ctx, loss)

    what = f"guarding {ctx.target}"
    locks.retried(db, ctx.settings.lock_timeout_ms, ctx.table.oid, what, create)
    try:
        yield
    except BaseException:
        take_back(db)
        raise


def take_back(db: Database) -> None:
    """After a run that failed, and not at the price of waiting for others: where it stays it does no harm."""
    if not db.usable:
        return
    try:
        db.rollback()
        with db.transaction():
            if there(db):
                locks.set_timeout(db, CLEAN_UP_TIMEOUT)
                drop(db)
    except (MigrationError, DBAPIError) as error:
        problem = error if isinstance(error, MigrationError) else as_migration_error(error, "removing a trigger")
        log.notice(f"{problem.message}; it does no harm, and goes with the next run")


def there(db: Database) -> list[str]:
    """Triggers that a run has left, quoted."""
    return [quote(name) for name, _ in db.rows(OURS, {"table": db.names["table"], "comment": COMMENT})]


def drop(db: Database, but: str | None = None) -> None:
    """Trigger and function, if they are there, inside the caller's transaction; `but` one that is to be replaced, which
    need not wait for readers."""
    for trigger, function in db.rows(OURS, {"table": db.names["table"], "comment": COMMENT}):
        if quote(trigger) == but:
            continue
        of_a_trigger(db, "DROP TRIGGER {trigger} ON {table}", trigger=quote(trigger))
        db.run("DROP FUNCTION {function}", function=function)


def _calls(db: Database, loss: Loss, extension: Extension) -> list[str]:
    """The functions that it calls beside the server's own."""
    ext = quote(extension.schema)
    calls = [f"{ext}.vector_send({ext}.vector)"]
    calls += [f"{db.names['convert']}(bytea, integer)"] if "{convert}" in loss.lost else []
    return calls + ([f"{db.names['unconvert']}({ext}.vector)"] if "{unconvert}" in loss.lost else [])


def _create(ctx: VectorContext, loss: Loss) -> None:
    db = ctx.db
    names = ctx.extension.names()
    vector = ctx.table.columns.get(ctx.target.vector)
    dimensions = str(vector.dimensions) if vector and vector.dimensions else "NULL"
    db.run(
        CREATE_FUNCTION,
        unchanged=db.sql(loss.unchanged),
        calls=f"ARRAY[{', '.join(map(literal, _calls(db, loss, ctx.extension)))}]",
        lost=db.sql(loss.lost, dimensions=dimensions, **names),
        message=literal(f"{db.names[loss.column]} of {ctx.target} can't have a value of its own now"),
        hint=literal(
            "openmemory-migrations is about to change this table: write the other column alone, or retry later."
        ),
        at_work=AT_WORK.format(held=held)
        if (held := ", ".join(f"({pid}, {key})" for _, key, pid in HELD.get()))
        else "true",
        tag=tag([*db.names.values(), *names.values()]),
    )
    db.run("REVOKE ALL ON FUNCTION {guard_function}() FROM PUBLIC")
    of_a_trigger(db, CREATE_TRIGGER, one=db.names[loss.column], other=db.names[loss.other])
    of_a_trigger(db, FIRE_ALWAYS, trigger=db.names["guard"])
    db.run("COMMENT ON TRIGGER {guard} ON {table} IS {comment}", comment=literal(COMMENT))
