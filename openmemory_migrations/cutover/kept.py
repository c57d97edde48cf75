"""A table beside the migrated one for the rows that no vector can hold: they leave whole, and come back whole.

Each batch is one statement, which deletes where the rows are and inserts where they go, and a commit. So a row is in
one of the two tables, whatever ends a run, and nothing has to find it again by a key that may be another row's since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from sqlalchemy.exc import DBAPIError

from .. import log
from ..backfill.passes import BatchSize, Obstacles, is_a_rows, passes, reason_of
from ..backfill.reader import UNIT, pages_of
from ..columns.cutover_mark import UNDO
from ..db import catalog, locks, partitions
from ..db.catalog import Table
from ..db.context import Context, TableContext
from ..db.database import APPLICATION_NAME, Database
from ..db.keys import AT, SUM, keys_at, keys_where
from ..db.partitions import Part
from ..encoding.stored import STORED
from ..errors import Changed, MigrationError
from ..marks import KEPT
from ..sql import SQL, Fragment, blocks, joined, literal, quote
from ..target import Target

BLOCKS = blocks("cutover")

LEFT = "{source} IS NOT NULL AND {vector} IS NULL"
# as the trigger has it: a row that could have its vector, and hasn't yet, stays
UNFIT = LEFT + f" AND NOT ({STORED.fits('{size}')})"
BATCH = 1000  # rows
FEW = 100  # rows that may have come since the batches, and leave under the lock of the switch
NOT_WHOLE = "no error, by a trigger or a rule that keeps rows out or changes them"

CREATE = "CREATE TABLE {kept} AS SELECT {columns} FROM {table} WITH NO DATA"
# default privileges may give roles this table whom policies keep from rows of the other
HIDE = "ALTER TABLE {kept} ENABLE ROW LEVEL SECURITY"
# it has no key, and in a publication FOR ALL TABLES no row could be deleted without
IDENTIFY = "ALTER TABLE {kept} REPLICA IDENTITY FULL"
OWN = "ALTER TABLE {kept} OWNER TO {owner}"
ROWS = """
SELECT CAST(ctid AS text) FROM ONLY {table} WHERE ctid >= '({first},0)' AND ctid < '({end},0)' AND {which}
"""
MOVE_THESE = BLOCKS.move.replace("{which}", "{which} AND " + AT)


class _NotWhole(Exception):
    """A trigger or a rule has kept rows from their table, or changed them, without an error."""


def count_left(db: Database) -> int:
    """Rows that a vector can't be made of, or not yet, up to one more than the switch takes: with an index, at once."""
    db.run("SET LOCAL enable_seqscan = off")
    return int(
        db.value("SELECT count(*) FROM (SELECT FROM {table} WHERE " + LEFT + " LIMIT {most}) AS l", most=FEW + 1)
    )


def count(db: Database) -> int:
    """Rows that are in the kept table: of a cutover, or of a run that was interrupted. Raises MigrationError where
    this role may not read them."""
    kept = _oid(db)
    if kept is None:
        return 0
    _require_right(db, kept, to_read=True)
    return int(db.value("SELECT count(*) FROM {kept}"))


def require(ctx: TableContext, rows: int, accept_loss: int = 0) -> int:
    """How many of the `rows` that had left at the switch are no longer there. Raises MigrationError where those are
    more than is accepted."""
    target = ctx.target
    there = count(ctx.db)
    missing = rows - there
    if missing <= accept_loss:
        return max(0, missing)
    line = f"COMMENT ON TABLE {ctx.db.names['kept']} IS {literal(_comment(target, ctx.table))}"
    raise MigrationError(
        f"{rows:,} rows have left {target} at its cutover, and {there:,} of them are in table {quote(target.kept)}",
        detail="What has that name has no comment of this package's, or keeps the rows of another table."
        if taken(ctx)
        else None
        if _oid(ctx.db)
        else "There is no such table.",
        hint=f"If a table of another name has them: ALTER TABLE … RENAME TO {quote(target.kept)}; if it has lost its"
        f" comment: {line}; if nobody needs them: OM_ACCEPT_LOSS={missing}.",
    )


def require_owned(db: Database) -> None:
    """Raises MigrationError where this role can't put the rows back."""
    kept = _oid(db)
    if kept is not None:
        _require_right(db, kept, to_read=False)


def require_none_follows(ctx: Context, parts: Iterable[Part], rows: int) -> None:
    """Raises MigrationError where others' rows would go or change with the rows that leave, or keep them."""
    if found := [text for (text,) in ctx.db.rows(BLOCKS.following, {"tables": [part.oid for part in parts]})]:
        raise MigrationError(
            f"{rows:,} rows have to leave {ctx.target}, but something would follow or keep them: {'; '.join(found)}",
            detail="To leave, a row is deleted here, and undoing the cutover inserts it again.",
            hint="Mend or delete those rows, or drop or disable what is listed until the cutover is done.",
        )


def _require_right(db: Database, kept: int, *, to_read: bool) -> None:
    ((reads, owns, owner, of_table, role),) = db.rows(BLOCKS.rights, {"kept": kept, "table": db.names["table"]})
    if owns or (reads and to_read):
        return
    name = db.names["kept"]
    raise MigrationError(
        f"role {quote(role)} may not read table {name}" if to_read else f"role {quote(role)} does not own table {name}",
        detail=f"It belongs to {quote(owner)}, and has rows that left {db.names['table']} at its cutover.",
        hint=f"ALTER TABLE {name} OWNER TO {quote(of_table)};"
        if owner != of_table
        else f"Connect as {quote(owner)}, or: GRANT {quote(owner)} TO {quote(role)};",
    )


def move_out(ctx: TableContext) -> None:
    """Passes, until no row is left that no vector can hold. Raises MigrationError where one doesn't leave."""
    db, target = ctx.db, ctx.target
    what = f"moving rows of {target} that no vector can hold to {quote(target.kept)}"
    columns = locks.retried(db, ctx.settings.lock_timeout_ms, ctx.table.oid, what, lambda: _ready(ctx))
    unfit = db.sql(UNFIT, size=_size(target, ctx.table))
    moving = _Moving(ctx, what, db.names["kept"], columns, unfit)

    def units() -> Iterator[tuple[Database, int]]:
        with db.transaction():
            leaves = [part.at(db) for part in partitions.leaves(db, ctx.table.oid)]
        for at in leaves:
            with db.transaction():
                found = at.rows(BLOCKS.units, unit=UNIT, which=moving.which)
            yield from ((at, first) for (first,) in found)

    obstacles, left = moving.run(units)
    if left:
        with db.transaction():
            raise _stay(ctx, left, obstacles.summary())
    if moving.moved:
        log.notice(f"{moving.moved:,} rows of {target} that no vector can hold are in {quote(target.kept)} now")


def take_last(ctx: TableContext, left: int) -> None:
    """Moves the few that have come since, inside the transaction of the switch. Raises MigrationError where one of
    those that are `left` doesn't leave."""
    db = ctx.db
    columns, which = _ready(ctx), db.sql(UNFIT, size=_size(ctx.target, ctx.table))
    # what is deferred would be pending, and no column can be renamed then
    db.run("SET CONSTRAINTS ALL IMMEDIATE")
    try:
        ((gone, *_),) = db.rows(
            BLOCKS.move,
            sum=_sum(db, "{source}"),
            origin=db.names["table"],
            which=which,
            to=db.names["kept"],
            columns=columns,
        )
    except DBAPIError as error:
        if not is_a_rows(error):
            raise
        raise MigrationError(
            f"{left:,} rows of {ctx.target} do not leave the table: refused with {reason_of(error)}"
        ) from error
    if gone != left:
        raise _stay(ctx, left - gone, "")


def put_back(ctx: TableContext) -> None:
    """Puts the rows back, then drops the table. Raises MigrationError, naming them, where rows have to stay there."""
    db, target = ctx.db, ctx.target
    with db.transaction():
        kept = _oid(db)
        if kept is None:
            return
        at = db.at({"table": db.names["kept"]})
        pages = pages_of(at)
        columns = _columns(ctx, db.names["kept"], db.names["table"]) if count(db) else {}
    obstacles = Obstacles()
    if columns:
        known = replace(ctx.table, key=tuple(name for name in ctx.table.key if name in columns))
        what = f"putting rows back into {target}"
        moving = _Moving(ctx.with_table(known), what, db.names["table"], _sql(columns), SQL("true"))
        obstacles, _ = moving.run(lambda: ((at, first) for first in range(0, pages, UNIT)))
        if moving.moved:
            log.notice(f"{moving.moved:,} rows that no vector can hold are back in {target}")
    if locks.retried(db, ctx.settings.lock_timeout_ms, kept, f"dropping {quote(target.kept)}", lambda: drop(db)):
        return
    with db.transaction():
        rows = count(db)
    raise MigrationError(
        f"{rows:,} rows of {target} are still in table {quote(target.kept)}",
        detail=f"{obstacles.summary()}." if obstacles.rows else None,
        hint=f"Mend what keeps them out, or delete them there if nobody needs them, then again: {UNDO}."
        + (
            f" A trigger: ALTER TABLE {db.names['table']} DISABLE TRIGGER … for the time of the undo."
            if NOT_WHOLE in obstacles.refused
            else ""
        ),
    )


def taken(ctx: Context) -> bool:
    """Whether something that isn't ours has its name."""
    return catalog.relation_exists(ctx.db, ctx.target.schema, ctx.target.kept) and _oid(ctx.db) is None


def drop(db: Database) -> bool:
    """Drops the table if it is empty; says whether there is none any more."""
    if _oid(db) is None:
        return True
    db.run("LOCK TABLE {kept} IN ACCESS EXCLUSIVE MODE")
    if db.value("SELECT EXISTS (SELECT FROM {kept})"):
        return False
    db.run("DROP TABLE {kept}")
    return True


def _oid(db: Database) -> int | None:
    """Of the table, where it is ours."""
    names = {"name": db.names["kept"], "table": db.names["table"], "comment": KEPT}
    found: int | None = db.value(BLOCKS.kept_tables, names)
    return found


def _comment(target: Target, table: Table) -> str:
    return f"{KEPT}{target}, oid {table.oid}"


class _Moving:
    """Moves rows from one table to another, in smaller batches where something is in the way."""

    def __init__(self, ctx: TableContext, what: str, to: SQL, columns: SQL, which: SQL) -> None:
        db = ctx.db
        self.ctx, self.db, self.table, self.what = ctx, db, ctx.table, what
        self.to, self.columns, self.which = to, columns, which
        self.moved = 0
        with db.transaction():
            self.kept = _oid(db)
            self.lock_timeout = locks.batch_timeout(db, ctx.settings)

    def run(self, units: Callable[[], Iterable[tuple[Database, int]]]) -> tuple[Obstacles, int]:
        """Passes over units of pages, each of a table that holds rows; returns what keeps how many where they are."""

        def once(obstacles: Obstacles) -> tuple[int, int]:
            before, found = self.moved, 0
            for at, first in units():
                with self.db.transaction():
                    self._settle()
                    rows = at.rows(ROWS, first=first, end=first + UNIT, which=self.which)
                found += len(rows)
                self._move(at, [tid for (tid,) in rows], obstacles)
            return self.moved - before, found

        return passes(self.db, self.table.oid, self.what, once)

    def _move(self, at: Database, tids: list[str], obstacles: Obstacles) -> None:
        batch_size = BatchSize(self.db, self.what, BATCH)
        while tids:
            some = tids[: batch_size.rows]
            try:
                self.moved += self._at_once(at, some, batch_size)
            except DBAPIError as error:
                outcome = batch_size.failed(error, len(some))
                if outcome == "again":
                    continue
                obstacles.pass_by(outcome, error, self._names(at, some))
            except _NotWhole:
                if len(some) > 1:
                    batch_size.rows = len(some) // 2
                    continue
                obstacles.refuse_for(NOT_WHOLE, self._names(at, some))
            else:
                batch_size.done()
            tids = tids[len(some) :]

    def _at_once(self, at: Database, tids: list[str], batch_size: BatchSize) -> int:
        with self.db.transaction(batch=True):
            self._settle()
            batch_size.heed()
            self._require_same(at, len(tids))
            names = {"origin": at.sql("ONLY {table}"), "which": self.which, "to": self.to, "columns": self.columns}
            names["sum"] = _sum(at, "{source}")
            self.db.as_host()
            ((gone, lost, *come),) = at.rows(MOVE_THESE, {"values": tids}, **names)
            if lost or (gone and self.to != self.db.names["kept"] and not self._whole(*come)):
                raise _NotWhole
        return int(gone)

    def _whole(self, tables: list[str], places: list[str], sums: list[str]) -> bool:
        """Whether each row that has come back still has its bytes."""
        right = 0
        for table in set(tables):
            here = [number for number, name in enumerate(tables) if name == table]
            of = {"places": [places[i] for i in here], "sums": [sums[i] for i in here]}
            names = {"table": SQL(table), "table_text": SQL(table), "sum": _sum(self.db, "t.{source}")}
            right += self.db.value(BLOCKS.whole, of, **names)
        return right == len(places)

    def _require_same(self, at: Database, rows: int) -> None:
        """Raises MigrationError unless the tables are those that were meant, and the rows can leave; under locks that
        keep it so: who adds a foreign key, a trigger or a partition, or renames a table, waits for the batch."""
        db, tables = self.db, {self.db.names["table"]: self.table.oid, self.db.names["kept"]: self.kept}
        db.run("LOCK TABLE {table}, {kept} IN ROW EXCLUSIVE MODE")
        for (name,) in db.rows(BLOCKS.named, {"names": list(tables), "oids": list(tables.values())}):
            raise Changed(f"another table has got the name {name}")
        if self.to == db.names["kept"]:
            parts = partitions.parts(db, self.table.oid)
            if at.names["table"] not in [part.sql_name for part in parts]:
                raise Changed(f"{at.names['table']} is no partition of {self.ctx.target} any more")
            require_none_follows(self.ctx, parts, rows)

    def _names(self, at: Database, tids: list[str]) -> list[str]:
        with self.db.transaction():
            return keys_at(at, self.table, tids)

    def _settle(self) -> None:
        """What is deferred to a commit is checked with the statement that it is of."""
        self.db.set_local({"application_name": f"{APPLICATION_NAME} moving rows"})
        locks.set_timeout(self.db, self.lock_timeout)
        self.db.run("SET LOCAL enable_seqscan = off")
        self.db.run("SET CONSTRAINTS ALL IMMEDIATE")


def _ready(ctx: TableContext) -> SQL:
    """Makes the table if need be, inside a transaction; returns the columns of a whole row."""
    db = ctx.db
    if drop(db):
        columns = _sql(_types(ctx, db.names["table"]))
        db.run(CREATE, columns=columns)
        db.run(HIDE)
        db.run(IDENTIFY)
        db.run("COMMENT ON TABLE {kept} IS {text}", text=literal(_comment(ctx.target, ctx.table)))
        db.run(OWN, owner=quote(ctx.table.owner))  # who has to be able to undo it
        return columns
    return _sql(_columns(ctx, db.names["table"], db.names["kept"]))


def _columns(ctx: Context, origin: str, to: str) -> dict[str, str]:
    """Those of the rows in one table. Raises MigrationError where the other can't hold them all as they are."""
    here, there = _types(ctx, origin), _types(ctx, to)
    for name, type_ in here.items():
        if there.get(name) != type_:
            has = f"of type {there[name]}" if name in there else "missing"
            raise MigrationError(
                f"column {quote(name)} of type {type_}, which rows of {origin} have, is {has} in {to}",
                detail=f"{quote(ctx.target.kept)} keeps rows of {ctx.target} that no vector can hold, and one of the"
                " two tables was changed since they left.",
                hint="ALTER TABLE … the one that is as it should not be, then the same command again.",
            )
    return here


def _types(ctx: Context, table: str) -> dict[str, str]:
    """Of the columns that a row is made of: neither its vector, of which it has none, nor what the server computes."""
    return {name: type_ for name, type_ in ctx.db.rows(BLOCKS.columns, {"table": table}) if name != ctx.target.vector}


def _sql(columns: Iterable[str]) -> SQL:
    return joined(", ", map(quote, columns))


def _sum(db: Database, value: str) -> SQL:
    return db.sql(SUM.format(it=value))


def _size(target: Target, table: Table) -> Fragment:
    return table.columns[target.vector].dimensions or SQL("NULL")


def _stay(ctx: TableContext, rows: int, refused: str) -> MigrationError:
    keys = [] if refused else keys_where(ctx.db, ctx.table, LEFT)
    return MigrationError(
        f"{rows:,} rows of {ctx.target} have no vector and do not leave the table",
        detail=f"{refused}." if refused else f"Such as {', '.join(keys)}." if keys else None,
        hint="Where a vector can hold the bytes, openmemory-migrations backfill converts them. Otherwise something"
        " keeps the row from being deleted: mend or delete it.",
    )


__all__ = [
    "FEW",
    "count",
    "count_left",
    "move_out",
    "put_back",
    "require",
    "require_none_follows",
    "require_owned",
    "take_last",
    "taken",
]
