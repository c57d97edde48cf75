"""What a cutover prepares for its switch, and how that is taken back where it didn't come to it.

That is an index and a constraint by which the switch needn't read the table, and rows that have left it. The next run
uses them, or makes them anew.
"""

from __future__ import annotations

from sqlalchemy.exc import DBAPIError

from .. import log
from ..columns import guard, properties
from ..columns.cutover_mark import Mark
from ..db import catalog, locks, partitions
from ..db.catalog import Index
from ..db.context import Context, TableContext
from ..db.database import PATIENT_LOCK_TIMEOUT, Database
from ..db.partitions import Part
from ..db.sqlerrors import as_migration_error
from ..errors import MigrationError
from ..index import build, replacement
from ..marks import KEPT
from ..sql import blocks, joined, quote
from . import gate, kept

BLOCKS = blocks("cutover")

LEFT_INDEX = "CREATE INDEX CONCURRENTLY {index} ON {table} (({source} IS NOT NULL)) WHERE {vector} IS NULL"
CLEAN_UP_TIMEOUT = "5s"


def index_left(ctx: Context, leaves: list[Part]) -> None:
    """Has the index on the rows without a vector ready on each table that holds rows."""
    for part in leaves:
        at, name = part.at(ctx.db), gate.left_index(ctx.target, part)
        found = _found_index(ctx.db, part, name)
        if found and found.valid:
            continue  # of a run that was interrupted; to drop it would wait for whoever reads the table
        if found:
            _drop_index(ctx.db, part, name)
        with at.autocommit():
            at.run(LEFT_INDEX, index=quote(name))


def drop_left(ctx: Context, leaves: list[Part], lock_timeout: str = PATIENT_LOCK_TIMEOUT) -> None:
    """Takes it away where it is."""
    for part in leaves:
        name = gate.left_index(ctx.target, part)
        if _found_index(ctx.db, part, name):
            _drop_index(ctx.db, part, name, lock_timeout)


def drop_left_at_once(ctx: Context, parts: list[Part]) -> None:
    """The same inside the transaction of the switch, in one statement for all."""
    names = {part.oid: gate.left_index(ctx.target, part) for part in parts if part.is_leaf}
    found = ctx.db.rows(BLOCKS.find_left, {"tables": list(names), "names": list(names.values())})
    if found:
        ctx.db.run("DROP INDEX {them}", them=joined(", ", (quote(schema, name) for schema, name in found)))


def left(ctx: TableContext) -> list[str]:
    """What a run that was killed has prepared and not taken away; in a transaction that is open."""
    target = ctx.target
    newer = target.newer
    named = [(target.schema, newer.index, ctx.table.oid)] if newer.index_name else []
    named += [
        (part.schema, gate.left_index(target, part), part.oid) for part in partitions.leaves(ctx.db, ctx.table.oid)
    ]
    found = [f"index {quote(name)}" for schema, name, oid in named if _index(ctx.db, schema, name, oid)]
    if properties.has_proof(ctx):
        found.append(f"constraint {quote(target.left)}, which refuses rows without a vector")
    if rows := kept.count(ctx.db):
        found.append(f"table {quote(target.kept)}, with {rows:,} rows that have left {target}")
    return found + [text for text, _ in _strayed(ctx)]


def _strayed(ctx: TableContext) -> list[tuple[str, str]]:
    target = ctx.target
    names = {
        "schema": target.schema,
        "table": target.table,
        "kept": target.kept,
        "left": target.left,
        "vector": target.vector,
    }
    return [tuple(row) for row in ctx.db.rows(BLOCKS.strayed, {**names, "oid": str(ctx.table.oid), "comment": KEPT})]


def require_names(ctx: TableContext) -> None:
    """Raises MigrationError for a table that got another name, or schema, after a run was killed: nothing would find
    what that has left."""
    if found := _strayed(ctx):
        raise MigrationError(
            f"an interrupted cutover of {ctx.target}, which had another name then, has left"
            f" {'; '.join(text for text, _ in found)}",
            hint=f"{'; '.join(line for _, line in found)}; then the same command again.",
        )


def take_back(ctx: TableContext) -> None:
    """Leaves the table as it was before a cutover that has not come to its switch. Raises MigrationError."""
    db = ctx.db
    with db.transaction():
        require_names(ctx)
        guarded = guard.there(db)
    if guarded:
        what = f"dropping trigger {', '.join(guarded)} of {ctx.target}"
        locks.retried(db, ctx.settings.lock_timeout_ms, ctx.table.oid, what, lambda: guard.drop(db))
    unprove(ctx)
    if ctx.target.newer.index_name:
        replacement.drop(ctx.of(ctx.target.newer), replacement.LEFT)
    with db.transaction():
        leaves = partitions.leaves(db, ctx.table.oid)
    drop_left(ctx, leaves)
    # last, as some may have to stay away
    kept.put_back(ctx)


def rows_back(ctx: TableContext) -> None:
    """Without the index, which goes with the column. Raises MigrationError where rows have to stay away."""
    with ctx.db.transaction():
        require_names(ctx)
    unprove(ctx)
    kept.put_back(ctx)


def unprove(ctx: TableContext) -> None:
    """Drops the constraint, which refuses rows without a vector: what the application writes, and those that come
    back."""
    with ctx.db.transaction():
        proof = properties.has_proof(ctx)
    if proof:
        what = f"dropping constraint {quote(ctx.target.left)} of {ctx.target}"
        locks.retried(
            ctx.db, ctx.settings.lock_timeout_ms, ctx.table.oid, what, lambda: properties.unprove_not_null(ctx.db)
        )


def clean_up(ctx: TableContext) -> None:
    """After a run that failed, not at the price of waiting for others: what is left is of use to the next."""
    db, target = ctx.db, ctx.target

    def unprove_at_once() -> None:
        with db.transaction():
            if properties.has_proof(ctx):
                locks.set_timeout(db, f"{ctx.settings.lock_timeout_ms}ms")
                properties.unprove_not_null(db)

    try:
        with db.transaction():
            now = catalog.table(db, target.schema, target.table)
            leaves = partitions.leaves(db, ctx.table.oid)
        if now and Mark.of(now, target):
            return  # what failed came after the switch
    except (MigrationError, DBAPIError):
        return
    for step in (
        unprove_at_once,
        lambda: kept.put_back(ctx),
        lambda: drop_left(ctx, leaves, CLEAN_UP_TIMEOUT),
    ):
        try:
            step()
        except (MigrationError, DBAPIError) as error:
            if not db.usable:
                return
            problem = error if isinstance(error, MigrationError) else as_migration_error(error, f"cleaning up {target}")
            log.warning(problem.message, detail=problem.detail, hint=problem.hint)


def _found_index(db: Database, part: Part, name: str) -> Index | None:
    with db.transaction():
        return _index(db, part.schema, name, part.oid)


def _index(db: Database, schema: str, name: str, table_oid: int) -> Index | None:
    found = catalog.indexes(db, schema, name).get(name)
    return found if found and found.table_oid == table_oid else None


def _drop_index(db: Database, part: Part, name: str, lock_timeout: str = PATIENT_LOCK_TIMEOUT) -> None:
    build.drop(db.at({"schema": quote(part.schema)}), name, lock_timeout)


__all__ = [
    "LEFT_INDEX",
    "clean_up",
    "drop_left",
    "drop_left_at_once",
    "index_left",
    "left",
    "require_names",
    "rows_back",
    "take_back",
    "unprove",
]
