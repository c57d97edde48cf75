"""The vector index of a partitioned table, without blocking anybody: one of its own for each leaf.

PostgreSQL can't build an index on a partitioned table CONCURRENTLY. So the parents get theirs first, ON ONLY them: that
is quick and leaves it invalid. Each leaf gets one CONCURRENTLY, which is then attached, and with the last of them the
parents' are valid. A partition that is made meanwhile, or later, gets its index from them by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from sqlalchemy.exc import DBAPIError

from .. import log
from ..db import catalog, locks, partitions
from ..db.catalog import Index
from ..db.context import Context, TableContext, VectorContext
from ..db.database import Database
from ..db.keys import SHOWN_KEYS
from ..db.partitions import Part
from ..db.sqlerrors import UNDEFINED_TABLE, sqlstate
from ..errors import INDEX_ANEW, MigrationError
from ..settings import Settings
from ..sql import SQL, blocks, quote
from ..target import NEWER_INDEX, derived
from . import build, choice
from .build import CannotBuild
from .choice import NoIndex, Plan

BLOCKS = blocks("index")

Tree = list[tuple[Part, Plan]]  # from the root down: what index each of the tables is to have
ROUNDS = 5  # one is enough unless partitions come while the index is built
ROWS = "SELECT CAST(tableoid AS bigint), count(*) FROM {table} WHERE {vector} IS NOT NULL GROUP BY 1"
# a partition that is no longer there, or no longer one
GONE = (UNDEFINED_TABLE, "55000")


def plans(ctx: VectorContext) -> Tree:
    """What each table of the tree, as it is now, is to have.

    Each leaf's has as many lists as its own rows ask for. The parents' have one: a partition that is made from them
    has no rows to learn more lists from, and with one list a search misses nothing.
    """
    db, settings = ctx.db, ctx.settings
    size = ctx.table.columns[ctx.target.vector].dimensions
    parent_settings = settings if settings.index_lists else replace(settings, index_lists=1)
    parent_plan = choice.plan(ctx.target, parent_settings, ctx.extension, size, 0)
    assert isinstance(parent_plan, Plan)  # or there would be none for the whole table
    with db.transaction(snapshot=True):
        rows = dict(db.rows(ROWS))
        tree = partitions.parts(db, ctx.table.oid)
        memory_kb = build.most_memory(db, settings)

    def wanted(part: Part) -> Plan:
        if not part.is_leaf:
            return parent_plan
        found = choice.plan(ctx.target, settings, ctx.extension, size, rows.get(part.oid, 0), memory_kb)
        if isinstance(found, NoIndex):
            if found.wanted:
                raise CannotBuild(f"no index on {part}: {found.reason}", hint=found.hint)
            return parent_plan
        return found

    return [(part, wanted(part)) for part in tree]


def ensure(ctx: VectorContext) -> Plan:
    """Leaves an index on the table and all its partitions; returns that of the largest. Raises CannotBuild."""
    target = ctx.target
    for _ in range(ROUNDS):
        tree = plans(ctx)
        root, parent_plan = tree[0]
        names: dict[int, SQL] = {}  # of the index on each part
        without: dict[str, CannotBuild] = {}  # leaves that keep nobody else from theirs
        for part, wanted in tree:
            try:
                names[part.oid] = _ensure_part(ctx, part, names.get(part.parent or 0), root, wanted)
            except CannotBuild as error:
                build.say(error)
                without[str(part)] = error
                if not part.is_leaf:
                    break
            except (MigrationError, DBAPIError) as error:
                if not _gone(ctx, part, error):
                    raise
        if without:
            few = list(without)[:SHOWN_KEYS]
            raise CannotBuild(
                f"index {quote(target.index)} on {target} is not complete: {len(without):,} of its tables have none,"
                f" such as {', '.join(few)}",
                detail=f"{without[few[0]].message}.",
                hint=f"When that is mended: {INDEX_ANEW}.",
            )
        with ctx.db.transaction():
            found = catalog.indexes(ctx.db, target.schema, target.index)
        if found[target.index].valid:
            log.notice(f"index {quote(target.index)} on {target} is valid on all {len(tree):,} tables of the tree")
            if duplicate := build.duplicate_of(ctx, ctx.table.oid, parent_plan):
                drop_parent(ctx.db, ctx.settings, root, quote(target.schema, duplicate))
            return max((wanted for _, wanted in tree), key=lambda plan: plan.lists)
    raise MigrationError(
        f"index {quote(target.index)} on {target} is still not valid after {ROUNDS} rounds",
        hint="Partitions keep coming; run the same command again.",
    )


def attached(ctx: Context, tree: Tree) -> Iterator[tuple[Plan, Index]]:
    """The target's index on the root, and those that are attached to it, each with what is wanted in its place."""
    target = ctx.target
    names: dict[int, SQL] = {}
    for part, wanted in tree:
        above = names.get(part.parent or 0)
        for schema, name in ctx.db.rows(BLOCKS.attached, {"part": part.oid, "parent": above}) if above else ():
            names[part.oid] = quote(schema, name)
            yield wanted, catalog.indexes(ctx.db, schema, name)[name]
        if part.parent is None:
            names[part.oid] = quote(target.schema, target.index)
            if found := catalog.own_indexes(ctx.db, target, part.oid).get(target.index):
                yield wanted, found


def drop(ctx: TableContext) -> bool:
    """Takes the indexes away, those of the leaves that were never attached too; says whether there were any."""
    db = ctx.db
    dropped = False
    with db.transaction():
        tree = partitions.parts(db, ctx.table.oid)
    for part in tree:
        at = own(ctx, part)
        with db.transaction():
            found = catalog.own_indexes(db, at.target, part.oid)
        for index in found.values():
            if part.is_leaf:
                build.drop(at.db, index.name)
            else:
                drop_parent(db, ctx.settings, part, quote(part.schema, index.name))
            dropped = True
    return dropped


def drop_parent(db: Database, settings: Settings, part: Part, index: SQL) -> None:
    """A parent's, and with it those that are attached; not CONCURRENTLY, which PostgreSQL doesn't have for these."""

    def drop() -> None:
        db.run("DROP INDEX IF EXISTS {index}", index=index)

    what = f"dropping index {index} of {part}"
    locks.retried(db, settings.lock_timeout_ms, part.oid, what, drop)


def own(ctx: Context, part: Part) -> Context:
    """With the part as a target of its own, so that its index has a name like any table's."""
    named = ctx.target.index_name
    if part.parent is not None:
        named = derived(part.name, "_hnsw_idx") if named == NEWER_INDEX else None
    target = replace(ctx.target, schema=part.schema, table=part.name, index_name=named)
    return Context(ctx.db.at(target.names()), target, ctx.settings)


def _ensure_part(ctx: Context, part: Part, above: SQL | None, root: Part, wanted: Plan) -> SQL:
    """The name of the part's index, which is attached to that of the part `above`. Raises CannotBuild."""
    db = ctx.db
    at = own(ctx, part)
    if above:
        with db.transaction():
            for schema, name in db.rows(BLOCKS.attached, {"part": part.oid, "parent": above}):
                return quote(schema, name)
    if part.is_leaf:
        build.drop_invalid(at, part.oid)
        build.ensure(at, part.oid, wanted)
    else:
        _ensure_parent(at, part, wanted)
    index = quote(part.schema, at.target.index)
    if above:

        def attach() -> None:
            # or a writer that is in two partitions, and another that waits for its rows, wait for us as we for them
            db.run("LOCK TABLE ONLY {root} IN SHARE ROW EXCLUSIVE MODE", root=root.sql_name)
            db.run("ALTER INDEX {above} ATTACH PARTITION {index}", above=above, index=index)

        locks.retried(db, ctx.settings.lock_timeout_ms, root.oid, f"attaching index {index} to {above}", attach)
    return index


def _gone(ctx: TableContext, part: Part, error: MigrationError | DBAPIError) -> bool:
    """Whether an error is that of a partition that has been dropped or detached; says so, and cleans up behind it."""
    db = ctx.db
    cause = error if isinstance(error, DBAPIError) else error.__cause__
    if not isinstance(cause, DBAPIError) or sqlstate(cause) not in GONE or not db.usable:
        return False
    db.rollback()
    with db.transaction():
        if part.oid in {one.oid for one in partitions.parts(db, ctx.table.oid)}:
            return False
    log.notice(f"partition {part} of {ctx.target} is gone: going on without it")
    at = own(ctx, part)
    with db.transaction():
        left = catalog.own_indexes(db, at.target, part.oid).get(at.target.index)
    if left and part.is_leaf:
        build.drop(at.db, left.name)
    return True


def _ensure_parent(ctx: Context, part: Part, wanted: Plan) -> None:
    db, own, settings = ctx.db, ctx.target, ctx.settings
    with db.transaction():
        there = catalog.own_indexes(db, own, part.oid).get(own.index)
    if there and not there.valid and not wanted.matches(there):
        log.notice(f"index {quote(own.index)} is invalid and not as wanted now; dropping it")
        drop_parent(db, settings, part, quote(own.schema, own.index))
    if not build.present(ctx, part.oid, wanted):
        locks.retried(
            db,
            settings.lock_timeout_ms,
            part.oid,
            f"creating index {quote(own.index)} on only {part}",
            lambda: build.create(db, wanted, own.index, only="ONLY "),
        )
        build.mark(ctx, part.oid)
