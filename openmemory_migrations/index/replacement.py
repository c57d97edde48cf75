"""Puts the index that the settings want in the place of the one that is there, while searches go on.

It is built under a name of its own, `…_new`; one short transaction renames the one that is there to `…_old` and the new
one to its name; then the old one goes. At every moment one of them is valid. An interrupted run leaves nothing but
these three names, and they say how far it has come: the next one goes on from there.
"""

from __future__ import annotations

from collections.abc import Iterator

from .. import log
from ..db import catalog, locks, partitions
from ..db.catalog import Extension, Index, Table
from ..db.database import Database
from ..settings import Settings
from ..target import Target, quote
from . import build, partitioned
from .choice import NoIndex, Plan, of_all_rows
from .partitioned import Tree

LEFT = "is left by a run that was interrupted"
REPLACED = "is replaced"
INCOMPLETE = "is not complete"


def replace(
    db: Database, target: Target, settings: Settings, table: Table, extension: Extension, *, rebuild: bool
) -> tuple[Plan, bool]:
    """Leaves the wanted index in place and valid; returns its plan, and whether it had to be built.

    With `rebuild` it is built anew where it is as wanted already. Raises CannotBuild where there can be none: then what
    is there stays.
    """
    wanted = _wanted(db, target, settings, table, extension)
    if table.kind == "p":
        tree = partitioned.plans(db, target, settings, table, extension)
    else:
        with db.transaction():
            tree = [(part, wanted) for part in partitions.parts(db, table.oid)]
        build.drop_invalid(db, target, table.oid)
    _require_names(db, target, tree)
    wrong = _wrong(db, target, tree)
    ready = _wrong(db, target.new, tree) is None
    replaced = any(_named(db, target.old, tree))
    # a rebuild that has come as far as to leave an old one is over but for that
    built = bool(wrong) or (rebuild and (ready or not replaced))
    if not built:
        log.notice(f"index {quote(target.index)} exists already and is as wanted")
    elif wrong == INCOMPLETE and not rebuild and not ready:
        partitioned.ensure(db, target, settings, table, extension)
    else:
        log.notice(f"index {quote(target.index)} {wrong or 'is to be built anew'}")
        if ready:
            log.notice(f"index {quote(target.new.index)} {LEFT}, is as wanted, and takes its place")
        else:
            _build(db, target.new, settings, table, extension, tree)
        drop(db, target.old, settings, table, LEFT)
        _swap(db, target, settings, table)
    drop_left(db, target, settings, table)
    _drop_left_of_detached(db, target, table, tree)
    root, plan = tree[0]
    if duplicate := build.duplicate_of(db, target, table.oid, plan):
        if table.kind == "p":
            partitioned.drop_parent(db, settings, root, f"{quote(target.schema)}.{quote(duplicate)}")
        else:
            build.drop(db, duplicate)
    return max((plan for _, plan in tree), key=lambda plan: plan.lists), built


def drop_left(db: Database, target: Target, settings: Settings, table: Table) -> None:
    """Takes away what replacing an index has left, or what a run has that was interrupted."""
    drop(db, target.new, settings, table, LEFT)
    drop(db, target.old, settings, table, REPLACED)


def _drop_left_of_detached(db: Database, target: Target, table: Table, tree: Tree) -> None:
    """The same on a partition that was detached meanwhile; one with partitions of its own keeps what it has."""
    with db.transaction():
        here = {part.oid for part in partitions.parts(db, table.oid)}
    for part, _ in tree:
        if part.oid not in here and part.parent in here and part.is_leaf:
            for beside in (target.new, target.old):
                at, own = partitioned.own_target(db, beside, part)
                build.drop_ours(at, own, part.oid, f"is of no use to {part}, which was detached")


def _wanted(db: Database, target: Target, settings: Settings, table: Table, extension: Extension) -> Plan:
    with db.transaction(snapshot=True):
        rows = db.value("SELECT count(*) FROM {table} WHERE {vector} IS NOT NULL")
    wanted = build.plan(db, target, settings, table, extension, rows)
    if isinstance(wanted, NoIndex):
        raise build.none(target, wanted)
    return wanted


def _require_names(db: Database, target: Target, tree: Tree) -> None:
    """Raises CannotBuild where one of the three names is that of something else, on whatever table of the tree."""
    with db.transaction():
        for part, _ in tree:
            for at in (target, target.new, target.old):
                _, own = partitioned.own_target(db, at, part)
                present = catalog.indexes(db, own.schema, own.index).get(own.index)
                build.require_name(own, part.oid, present, catalog.relation_exists(db, own.schema, own.index))
                if present and not of_all_rows(present, target.vector):
                    raise build.other(own, present)


def _wrong(db: Database, target: Target, tree: Tree) -> str | None:
    """What is wrong with the index under the target's name; None where it is valid and as wanted."""
    with db.transaction():
        found = list(partitioned.attached(db, target, tree))
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


def _named(db: Database, target: Target, tree: Tree) -> Iterator[tuple[Plan, Index]]:
    """Our indexes under the target's name, on each table of the tree, attached or not."""
    with db.transaction():
        for part, wanted in tree:
            _, own = partitioned.own_target(db, target, part)
            index = catalog.indexes(db, own.schema, own.index).get(own.index)
            if index and _ours(index, part.oid, target.vector):
                yield wanted, index


def _ours(index: Index, table_oid: int, column: str) -> bool:
    return index.table_oid == table_oid and of_all_rows(index, column)


def _build(db: Database, new: Target, settings: Settings, table: Table, extension: Extension, tree: Tree) -> None:
    """Builds under the new name, and goes on with what an interrupted run has left there if that is as wanted."""
    if any(index.valid and not wanted.suits(index) for wanted, index in list(_named(db, new, tree))):
        drop(db, new, settings, table, f"{LEFT} and isn't what is wanted now")
    if table.kind == "p":
        partitioned.ensure(db, new, settings, table, extension)
    else:
        build.drop_invalid(db, new, table.oid)
        build.ensure(db, new, settings, table.oid, tree[0][1])


def _swap(db: Database, target: Target, settings: Settings, table: Table) -> None:
    """Renames, which takes no lock that a search or a write would wait for."""

    def change() -> None:
        if table.kind == "p":
            # so that no partition goes between being looked at and being renamed
            for part in partitions.parts(db, table.oid):
                if not part.is_leaf:
                    db.run("LOCK TABLE ONLY {parent} IN SHARE UPDATE EXCLUSIVE MODE", parent=part.sql_name)
        for part in partitions.parts(db, table.oid):
            _, own = partitioned.own_target(db, target, part)
            found = catalog.indexes(db, own.schema, own.index, own.new.index)
            for name, to in ((own.index, own.old.index), (own.new.index, own.index)):
                if name in found and _ours(found[name], part.oid, target.vector):
                    names = {"in_schema": quote(own.schema), "index": quote(name), "to": quote(to)}
                    db.run("ALTER INDEX {in_schema}.{index} RENAME TO {to}", **names)

    what = f"renaming index {quote(target.new.index)} to {quote(target.index)}"
    locks.retried(db, settings.lock_timeout_ms, table.oid, what, change)
    log.notice(f"index {quote(target.index)} of {target} is the new one from now on")


def drop(db: Database, beside: Target, settings: Settings, table: Table, why: str) -> None:
    """Takes away the index of that target, with those of its partitions."""
    if table.kind != "p":
        build.drop_ours(db, beside, table.oid, why)
    elif partitioned.drop(db, beside, table, settings):
        log.notice(f"index {quote(beside.index)} of {beside} and its partitions {why}; dropped")
