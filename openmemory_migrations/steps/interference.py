"""What of others' on the table changes a row after our trigger has, or keeps our UPDATE from its rows.

Assumes that whoever asks has looked at the rights already.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import TypeVar

from sqlalchemy.exc import DBAPIError

from .. import log
from ..backfill.passes import raised, reason_of
from ..db import locks, partitions
from ..db.catalog import Table
from ..db.context import Context, TableContext
from ..db.database import PATH, Database, Seen
from ..db.sqlerrors import LOCK_NOT_AVAILABLE, PASSING, READ_ONLY, as_migration_error, functions_of, sqlstate
from ..errors import MigrationError
from ..sql import SQL, Fragment, blocks, fill, joined, literal, quote
from ..target import Target
from . import requirements

BLOCKS = blocks("steps")

T = TypeVar("T")

NO_IDENTITY, FILTERED, UNDEFINED_COLUMN = "55000", "42P10", "42703"
# by way of the root, as the application does, whose triggers FOR EACH STATEMENT fire
ONE = "tableoid = CAST({oid} AS oid) AND ctid = (SELECT ctid FROM ONLY {leaf} OFFSET {row} LIMIT 1)"
UPDATE_ONE = f"UPDATE {{table}} SET {{same}} WHERE {ONE}"
INSERT_ONE = f"""
WITH gone AS (DELETE FROM {{table}} WHERE {ONE} RETURNING *)
INSERT INTO {{table}} ({{columns}}) OVERRIDING SYSTEM VALUE SELECT {{columns}} FROM gone
"""
COPY = "openmemory_migrations_written"
COPIED = "CREATE TEMPORARY TABLE {copy} (LIKE {table} INCLUDING DEFAULTS INCLUDING GENERATED INCLUDING IDENTITY)"
ONE_ROW = " SELECT {columns} FROM {of} LIMIT 1"
COPY_WRITES = {
    "UPDATE": "UPDATE {table} SET {same}",
    "UPDATE of other bytes": "UPDATE {table} SET {source} = pg_catalog.decode('00', 'hex')",
    "INSERT": "INSERT INTO {table} ({columns}) OVERRIDING SYSTEM VALUE" + ONE_ROW,
    "DELETE": "DELETE FROM {table}",
}
PUT_TOGETHER = re.compile(r"\bexecute\b|\*|\(\s*(?:new|old)\s*\)", re.IGNORECASE)
# under the lock of a change, which whoever holds a row that a trigger wants may wait for: much less than the server's
# deadlock_timeout, by which it would be the other that has to give way
TRIAL = {"statement_timeout": "100ms", "lock_timeout": "50ms"}
TRIAL_S = 0.2  # after which no other write is tried
ROWS_TRIED = 5  # one after the other, of a table, until one is found that takes the write
NAME_COLUMNS = (
    "A function that takes the row as a whole (NEW.*) has to name the columns that it means, and none that goes."
    " Or drop its trigger, or meanwhile: ALTER TABLE {table} DISABLE TRIGGER ...;"
)

# of contrib/spi and the server: they change the columns that their arguments name, or none
BY_ARGUMENTS = {
    "autoinc",
    "insert_username",
    "moddatetime",
    "suppress_redundant_updates_trigger",
    "tsvector_update_trigger_bycolumn",
    "tsvector_update_trigger_byid",
}
SAID = re.compile(r"""--[^\n]*|/\*.*?\*/|'(?:[^']|'')*'|("(?:[^"]|"")*")""", re.DOTALL)
UNQUOTED = re.compile(r'("[^"]*")|[^"]+')
NEW = re.compile(
    r'\bnew\b(?:\s*\.\s*(?:"(?P<quoted>(?:[^"]|"")+)"|(?P<plain>[^\W\d][\w$]*)(?![\w$&])|(?P<all>\*))|(?P<cast>\s*::))?'
)
ROW = re.compile(NEW.pattern.replace(r"\bnew\b", r"\b(?:new|old)\b"))
# in parentheses there is nothing that could be assigned to
READ = re.compile(r"\breturn\s+new\s*;|\(\s*new(?:\s*\.\s*\w+)?\s*\)")
RETURN = re.compile(r"\breturn\b(?P<row>\s+(?:new|old|null)\s*;)?")


def leaves_alone(language: str, source: str, arguments: Sequence[str], columns: Sequence[str]) -> bool:
    """Whether the text of a trigger's function proves that it doesn't change these columns of the row.

    PL/pgSQL changes a column of NEW only where it names it, and all of them only by NEW as a whole or by what it
    returns. Any other mention of these is no proof, though it may be harmless.
    """
    if language in ("c", "internal"):
        return source in BY_ARGUMENTS and not set(arguments) & set(columns)
    if language != "plpgsql":
        return False
    text = _code(source).lower()
    if any(found["row"] is None for found in RETURN.finditer(text)):
        return False
    if not re.search(r"\bcall\b", text):  # which may write to what it is given
        text = READ.sub(";", text)
    for found in NEW.finditer(text):
        named = found["plain"] or (found["quoted"] or "").replace('""', '"')
        if not (named or found["all"] or found["cast"]) or named in (column.lower() for column in columns):
            return False
    return True


def _code(source: str) -> str:
    """Without comments and literals, unless it may have other quotes."""
    return source if re.search(r"[\\$]", source) else SAID.sub(lambda said: said[1] or " ", source)


def overriding(db: Database, table: Table, ours: str, source: str, made: str) -> Iterator[MigrationError]:
    """Each trigger that may leave another `made` than our trigger makes of `source`, which nobody would notice."""
    tables = {"tables": [part.oid for part in partitions.parts(db, table.oid)], "ours": ours, "source": source}
    for on, name, later, elsewhere, language, text, arguments in db.rows(BLOCKS.triggers, tables):
        # before ours only the value matters that ours doesn't make, since it is there already; but a row that moves to
        # another partition is inserted with a vector, which ours leaves alone
        moves = table.kind == "p"
        columns = [source, made] if later or elsewhere or moves else [made]
        given = arguments.split("\\000")[:-1]
        if leaves_alone(language, text, given, columns):
            continue
        first = "0_" + name
        may_be_first = not elsewhere and not moves and first.encode() < ours.encode()
        mended = may_be_first and leaves_alone(language, text, given, [made])
        when = f"for an UPDATE that doesn't set {quote(source)}, too" if elsewhere else "after it" if later else ""
        yield MigrationError(
            f"trigger {quote(name)} on {on} can change {' or '.join(map(quote, columns))}"
            f" where trigger {quote(ours)} doesn't see it",
            detail=f"It fires {when or 'before it'}, for each row, and its function is not one that clearly leaves"
            " them as they are.",
            hint=f"ALTER TRIGGER {quote(name)} ON {on} RENAME TO {quote(first)};"
            if mended
            else f"If it changes them, drop it; else, meanwhile: ALTER TABLE {on} DISABLE TRIGGER {quote(name)};"
            " and afterwards ENABLE.",
        )


def of_sync(ctx: TableContext) -> Iterator[MigrationError]:
    return overriding(ctx.db, ctx.table, ctx.target.sync, ctx.target.source, ctx.target.vector)


def naming(db: Database, table: Table, column: str, ours: Sequence[str], after: str) -> Iterator[MigrationError]:
    """Each trigger of others' whose function names the column of a row: without it every write would fail."""
    field = re.compile(rf'\b(?:new|old)\s*\.\s*(?:"{re.escape(column)}"|{re.escape(column.lower())}(?![\w$]))')
    tables = [part.oid for part in partitions.parts(db, table.oid)]
    for on, name, text, function in db.rows(BLOCKS.of_rows, {"tables": tables, "ours": list(ours)}):
        # names are lower case unless quoted
        if field.search(UNQUOTED.sub(lambda part: part[1] or part[0].lower(), _code(text))):
            yield MigrationError(
                f"trigger {quote(name)} on {on} names {quote(column)} of a row, which isn't what it is {after}",
                detail=f"Every write that fires it would fail in {function}.",
                hint=f"Change {function}, or drop the trigger, or: ALTER TABLE {on} DISABLE TRIGGER {quote(name)};",
            )


def retried(ctx: TableContext, what: str, change: Callable[[], T], seen: Seen = ()) -> T:
    """A change of the table's columns in tries of the lock, as `locks.retried` has them, each with trial writes."""
    db, timeout = ctx.db, ctx.settings.lock_timeout_ms
    return locks.retried(db, timeout, ctx.table.oid, what, lambda: _with_trial_writes(ctx, change), seen)


def _with_trial_writes(ctx: Context, change: Callable[[], T]) -> T:
    """Makes a change of the table's columns, inside a transaction. Raises MigrationError where a write that the table
    takes now fails afterwards in a trigger of others'; that is tried, and leaves nothing behind.

    A table without rows can't be tried.
    """
    db, target = ctx.db, ctx.target
    oid = db.value("SELECT CAST(CAST(:table AS regclass) AS oid)", {"table": db.names["table"]})
    partitions.require_whole(db, oid)
    parts = partitions.parts(db, oid)
    ours = [target.sync, target.guard, target.back, target.typing]
    if not db.value(BLOCKS.others, {"tables": [part.oid for part in parts], "ours": ours}):
        return change()
    locks.take(db)
    before = dict(_failures(db, parts))
    done = change()
    after = dict(_failures(db, parts, [write for write, failure in before.items() if failure is None]))
    for (write, oid, _), failure in after.items():
        if failure:
            part = next(part for part in parts if part.oid == oid)
            raise _would_fail(ctx, write, f" in partition {part}" if len(parts) > 1 else "", failure)
    if untried := {"UPDATE", "INSERT"} - {write for write, *_ in after}:
        failures = [(write, failure) for (write, *_), failure in before.items() if failure and write in untried]
        why = "; ".join(dict.fromkeys(f"{write} fails already: {failure}" for write, failure in failures))
        log.notice(
            f"whether triggers of {target} bear the change could not be tried with {' and '.join(sorted(untried))}",
            detail=f"{why}." if why else None,
            hint="A function that takes the row as a whole (NEW.*) fails with other columns: try a write.",
        )
    return done


def _would_fail(ctx: Context, write: str, where: str, failure: str) -> MigrationError:
    return MigrationError(
        f"{write} of {ctx.target} would fail from now on{where}: {failure}",
        detail="That was tried with one row and rolled back, with the change.",
        hint=NAME_COLUMNS.format(table=ctx.db.names["table"]),
    )


def of_whole_rows(
    ctx: TableContext, *, added: tuple[str, Fragment] | None = None, dropped: str | None = None
) -> list[MigrationError]:
    """What writes would fail with, once a column (name, type) is added or dropped, in triggers of others' that take the
    row as a whole.

    That is tried with one row of a temporary copy of the table, which has their triggers, and rolled back. Nothing
    where it can't be tried.
    """
    db, target = ctx.db, ctx.target
    ours = [target.sync, target.guard, target.back, target.typing]
    found = db.rows(BLOCKS.copied, {"table": ctx.table.oid, "ours": ours}, copy_text=literal(quote("pg_temp", COPY)))
    theirs = [SQL(definition) for definition, language, text, of_all in found if of_all or _takes_whole(language, text)]
    if not theirs or not db.value("SELECT pg_catalog.has_database_privilege(current_database(), 'TEMPORARY')"):
        return []
    try:
        before, after = _tried_on_copy(ctx, theirs, added, dropped)
    except DBAPIError as error:
        if error.connection_invalidated:
            raise
        return []
    return [_would_fail(ctx, write, "", failure) for write, failure in after.items() if failure and before[write] == ""]


Outcomes = dict[str, str | None]


def _tried_on_copy(
    ctx: TableContext, theirs: Iterable[SQL], added: tuple[str, Fragment] | None, dropped: str | None
) -> tuple[Outcomes, Outcomes]:
    """What each write ends with before and after the change; nothing for a table without rows."""
    db = ctx.db
    given = db.rows(BLOCKS.given, {"table": ctx.table.oid})
    of_row = [(name, always) for name, always in given if name != dropped]
    columns = joined(", ", (quote(name) for name, _ in of_row))
    same = joined(", ", (fill("{it} = {it}", {"it": quote(name)}) for name, always in of_row if not always))
    writes = {
        write: statement
        for write, statement in COPY_WRITES.items()
        if "{source}" not in statement
        or (dropped != ctx.target.source and not ctx.table.columns[ctx.target.source].is_vector)
    }
    copy = db.at({"table": quote("pg_temp", COPY)})
    settings = {**TRIAL, PATH: db.path_of_rows}

    def outcomes() -> Outcomes:
        db.run("DISCARD PLANS")
        of = copy.names["table"]
        return {
            write: _outcome(copy, settings, statement, columns=columns, same=same, of=of)
            for write, statement in writes.items()
        }

    # what a trigger's function does it does as whoever writes: never as a superuser who only looks
    superuser = db.value("SELECT current_setting('is_superuser')") == "on"
    with db.attempt(keep=False), db.local({"role": ctx.table.owner}) if superuser else nullcontext():
        db.run(COPIED, copy=quote(COPY))
        if not copy.run(COPY_WRITES["INSERT"], columns=columns, of=db.names["table"]).rowcount:
            return {}, {}
        for definition in theirs:
            db.run("{definition}", definition=definition)
        before = outcomes()
        if added:
            copy.run("ALTER TABLE {table} ADD {column} {type}", column=quote(added[0]), type=added[1])
        if dropped:
            copy.run("ALTER TABLE {table} DROP {column} CASCADE", column=quote(dropped))
        return before, outcomes()


def _takes_whole(language: str, text: str) -> bool:
    """Whether the function of a trigger may take the row as a whole, and not only columns by their names."""
    if language != "plpgsql" or PUT_TOGETHER.search(text):
        return True
    return any(not (found["plain"] or found["quoted"]) for found in ROW.finditer(READ.sub(";", _code(text).lower())))


Write = tuple[str, int, int]  # UPDATE or INSERT, in which table, of which of its rows


def _failures(
    db: Database, parts: Sequence[partitions.Part], of: Sequence[Write] | None = None
) -> Iterator[tuple[Write, str | None]]:
    """What writes (all, or these) of single rows end with, as far as that can be said in so short a time.

    Raises DBAPIError where somebody has locked what a trigger needs: another try may find it free.
    """
    until = time.monotonic() + TRIAL_S
    # a session goes on with the columns that a function's statement had when it ran first
    db.run("DISCARD PLANS")
    settings = {**TRIAL, PATH: db.path_of_rows}
    if db.value("SELECT current_setting('session_replication_role')") == "replica":
        settings["session_replication_role"] = "origin"  # as the application has it
    for oid, stays in list(db.rows(BLOCKS.tried, {"tables": [part.oid for part in parts]})):
        leaf = next(part for part in parts if part.oid == oid)
        of_row = list(db.rows(BLOCKS.given, {"table": oid}))
        names: dict[str, Fragment] = {
            "leaf": leaf.sql_name,
            "oid": oid,
            "same": joined(", ", (fill("{it} = {it}", {"it": quote(name)}) for name, always in of_row if not always)),
            "columns": joined(", ", (quote(name) for name, _ in of_row)),
        }
        writes = {"UPDATE": UPDATE_ONE} if stays else {"UPDATE": UPDATE_ONE, "INSERT": INSERT_ONE}
        for write, statement in writes.items():
            for row in range(ROWS_TRIED):
                this = (write, oid, row)
                if (of is not None and this not in of) or time.monotonic() > until:
                    continue
                outcome = _outcome(db, settings, statement, **names, row=row)
                if outcome is not None:
                    yield this, outcome or None
                if not outcome:
                    break


def _outcome(db: Database, settings: dict[str, str], statement: str, **names: Fragment) -> str | None:
    """What a write fails with, nothing if it succeeds; None if neither can be said."""
    try:
        with db.attempt(keep=False):
            db.set_local(settings)
            written = db.run(statement, **names).rowcount
            db.run("SET CONSTRAINTS ALL IMMEDIATE")
    except DBAPIError as error:
        if error.connection_invalidated:
            raise
        if sqlstate(error) in PASSING and not raised(error):
            if sqlstate(error) == LOCK_NOT_AVAILABLE:
                raise
            return None
        return reason_of(error)
    return "" if written else None


def require_none(found: Iterable[MigrationError]) -> None:
    for problem in found:
        raise problem


def warn(found: Iterable[MigrationError]) -> None:
    for problem in found:
        log.warning(problem.message, detail=problem.detail, hint=problem.hint)


def of_updates(ctx: TableContext, lock_timeout_ms: int) -> Iterator[tuple[str, MigrationError]]:
    """Each reason, with a code for programs, why the rows that there are can't be updated; in a transaction that may
    write."""
    db = ctx.db
    parts = partitions.parts(db, ctx.table.oid)
    if not all(part.owned for part in parts) or not db.value("SELECT EXISTS (SELECT FROM {table})"):
        return
    rules = requirements.unmet(ctx, requirements.BLOCKS.rules)
    yield from ((rule.code, rule.error) for rule in rules)
    for part in () if rules else parts:
        if part.is_leaf and (problem := _refused(part.at(db), ctx.target, part, lock_timeout_ms)):
            yield "update", problem


def _refused(at: Database, target: Target, part: partitions.Part, lock_timeout_ms: int) -> MigrationError | None:
    """What an UPDATE of no row ends with: a publication that has no identity for rows, or a statement's trigger."""
    column = at.value(BLOCKS.settable, {"table": part.oid, "vector": target.vector})
    if column is None:
        return None
    try:
        with at.attempt(keep=False):
            at.as_host()
            locks.set_timeout(at, f"{lock_timeout_ms}ms")
            at.run("UPDATE {table} SET {column} = {column} WHERE false", column=quote(column))
    except DBAPIError as error:
        if error.connection_invalidated:
            raise
        # a function may well name the column that is to be
        if sqlstate(error) in (*PASSING, READ_ONLY, UNDEFINED_COLUMN):
            return None
        problem = as_migration_error(error, f"an UPDATE of {part}")
        hint = problem.hint or "Mend what refuses it, such as a trigger FOR EACH STATEMENT."
        if sqlstate(error) == FILTERED and not functions_of(error):
            hint = (
                "Take the row filter or the column list off the publication, or have it name columns of the identity:"
                f" ALTER PUBLICATION … SET TABLE {part.sql_name};"
            )
        if sqlstate(error) == NO_IDENTITY and not functions_of(error):
            hint = f"ALTER TABLE {part.sql_name} REPLICA IDENTITY FULL; or give it a primary key."
        return MigrationError(problem.message, detail=problem.detail, hint=hint)
    return None
