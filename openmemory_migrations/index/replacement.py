"""Puts the index that the settings want in the place of the one that is there, while searches go on.

It is built under a name of its own, `…_new`; one short transaction renames the one that is there to `…_old` and the new
one to its name; then the old one goes. At every moment one of them is valid. An interrupted run leaves nothing but
these three names, and they say how far it has come: the next one goes on from there.
"""

from __future__ import annotations

from collections.abc import Iterator

from .. import log
from ..db import catalog, locks, partitions
from ..db.catalog import Index
from ..db.context import Context, TableContext, VectorContext
from ..sql import quote
from . import build, partitioned
from .choice import NoIndex, Plan
from .partitioned import Tree

LEFT = "is left by a run that was interrupted"
REPLACED = "is replaced"
INCOMPLETE = "is not complete"


def replace(ctx: VectorContext, *, rebuild: bool) -> tuple[Plan, bool]:
    """Leaves the wanted index in place and valid; returns its plan, and whether it had to be built.

    With `rebuild` it is built anew where it is as wanted already. Raises CannotBuild where there can be none: then what
    is there stays.
    """
    db, target, table = ctx.db, ctx.target, ctx.table
    wanted = _wanted(ctx)
    if table.kind == "p":
        tree = partitioned.plans(ctx)
    else:
        with db.transaction():
            tree = [(part, wanted) for part in partitions.parts(db, table.oid)]
        build.drop_invalid(ctx, table.oid)
    _require_names(ctx, tree)
    wrong = _wrong(ctx, tree)
    ready = _wrong(ctx.of(target.new), tree) is None
    replaced = any(_named(ctx.of(target.old), tree))
    # a rebuild that has come as far as to leave an old one is over but for that
    built = bool(wrong) or (rebuild and (ready or not replaced))
    if not built:
        build.say_present(target)
    elif wrong == INCOMPLETE and not rebuild and not ready:
        partitioned.ensure(ctx)
    else:
        log.notice(f"index {quote(target.index)} {wrong or 'is to be built anew'}")
        if ready:
            log.notice(f"index {quote(target.new.index)} {LEFT}, is as wanted, and takes its place")
        else:
            _build(ctx.of(target.new), tree)
        drop(ctx.of(target.old), LEFT)
        _swap(ctx)
    drop_left(ctx)
    _drop_left_of_detached(ctx, tree)
    root, plan = tree[0]
    if duplicate := build.duplicate_of(ctx, table.oid, plan):
        if table.kind == "p":
            partitioned.drop_parent(db, ctx.settings, root, quote(target.schema, duplicate))
        else:
            build.drop(db, duplicate)
    return max((plan for _, plan in tree), key=lambda plan: plan.lists), built


def drop_left(ctx: TableContext) -> None:
    """Takes away what replacing an index has left, or what a run has that was interrupted."""
    drop(ctx.of(ctx.target.new), LEFT)
    drop(ctx.of(ctx.target.old), REPLACED)


def _drop_left_of_detached(ctx: TableContext, tree: Tree) -> None:
    """The same on a partition that was detached meanwhile; one with partitions of its own keeps what it has."""
    with ctx.db.transaction():
        here = {part.oid for part in partitions.parts(ctx.db, ctx.table.oid)}
    for part, _ in tree:
        if part.oid not in here and part.parent in here and part.is_leaf:
            for beside in (ctx.target.new, ctx.target.old):
                at = partitioned.own(ctx.of(beside), part)
                build.drop_ours(at, part.oid, f"is of no use to {part}, which was detached")


def _wanted(ctx: VectorContext) -> Plan:
    with ctx.db.transaction(snapshot=True):
        rows = build.count_vectors(ctx.db)
    wanted = build.plan(ctx, rows)
    if isinstance(wanted, NoIndex):
        raise build.none(ctx.target, wanted)
    return wanted


def _require_names(ctx: Context, tree: Tree) -> None:
    """Raises CannotBuild where one of the three names is that of something else, on whatever table of the tree."""
    target = ctx.target
    with ctx.db.transaction():
        for part, _ in tree:
            for beside in (target, target.new, target.old):
                build.require_name(partitioned.own(ctx.of(beside), part), part.oid)


def _wrong(ctx: Context, tree: Tree) -> str | None:
    """What is wrong with the index under the target's name; None where it is valid and as wanted."""
    with ctx.db.transaction():
        found = list(partitioned.attached(ctx, tree))
    if not found:
        return "is to be built"
    root, index = found[0]
    if not index.valid and root.matches(index):
        return INCOMPLETE
    for wanted, index in found:
        if not wanted.matches(index):
            return f"is not as wanted: {wanted.difference(index)}"
        if lists := wanted.outgrown(index):
            return f"is not as wanted: {quote(index.name)} has lists = {lists}, its rows ask for {wanted.lists} now"
    return None


def _named(ctx: Context, tree: Tree) -> Iterator[tuple[Plan, Index]]:
    """Our indexes under the target's name, on each table of the tree, attached or not."""
    with ctx.db.transaction():
        for part, wanted in tree:
            own = partitioned.own(ctx, part).target
            if index := catalog.own_indexes(ctx.db, own, part.oid).get(own.index):
                yield wanted, index


def _build(ctx: VectorContext, tree: Tree) -> None:
    """Builds under the new name, and goes on with what an interrupted run has left there if that is as wanted."""
    if any(index.valid and not wanted.suits(index) for wanted, index in list(_named(ctx, tree))):
        drop(ctx, f"{LEFT} and isn't what is wanted now")
    if ctx.table.kind == "p":
        partitioned.ensure(ctx)
    else:
        build.drop_invalid(ctx, ctx.table.oid)
        build.ensure(ctx, ctx.table.oid, tree[0][1])


def _swap(ctx: TableContext) -> None:
    """Renames, which takes no lock that a search or a write would wait for."""
    db, target, table = ctx.db, ctx.target, ctx.table

    def change() -> None:
        if table.kind == "p":
            # so that no partition goes between being looked at and being renamed
            for part in partitions.parts(db, table.oid):
                if not part.is_leaf:
                    db.run("LOCK TABLE ONLY {parent} IN SHARE UPDATE EXCLUSIVE MODE", parent=part.sql_name)
        for part in partitions.parts(db, table.oid):
            own = partitioned.own(ctx, part).target
            found = catalog.own_indexes(db, own, part.oid, own.index, own.new.index)
            for name, to in ((own.index, own.old.index), (own.new.index, own.index)):
                if name in found:
                    names = {"in_schema": quote(own.schema), "index": quote(name), "to": quote(to)}
                    db.run("ALTER INDEX {in_schema}.{index} RENAME TO {to}", **names)

    what = f"renaming index {quote(target.new.index)} to {quote(target.index)}"
    locks.retried(db, ctx.settings.lock_timeout_ms, table.oid, what, change)
    log.notice(f"index {quote(target.index)} of {target} is the new one from now on")


def drop(ctx: TableContext, why: str) -> None:
    """Takes away the index of the target's name, with those of its partitions."""
    if ctx.table.kind != "p":
        build.drop_ours(ctx, ctx.table.oid, why)
    elif partitioned.drop(ctx):
        log.notice(f"index {quote(ctx.target.index)} of {ctx.target} and its partitions {why}; dropped")
