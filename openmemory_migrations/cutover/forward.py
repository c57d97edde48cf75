"""From two columns to one: first what takes time, while the application writes, then one short transaction.

What an interrupted run leaves (an index and a constraint by which the switch needn't read the table, a table of kept
bytes) is made anew or used by the next, and goes with the column when the chain is downgraded.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, suppress
from dataclasses import replace

from sqlalchemy.exc import DBAPIError

from .. import (
    building,
    building_tree,
    catalog,
    checks,
    indexes,
    locks,
    log,
    partitions,
    replacing,
    switching,
    synctrigger,
)
from ..building import CannotBuild
from ..catalog import Extension, Index, Table
from ..database import PATIENT_LOCK_TIMEOUT, Database
from ..errors import MigrationError
from ..indexes import INDEX_DIMENSIONS, NoIndex
from ..partitions import Part
from ..settings import Settings
from ..target import Target, quote
from . import backtrigger, gate, kept, mark
from .mark import UNDO, Mark

# WHERE has but half of kept.LEFT: from 17 on the server leaves `v IS NOT NULL` out where the column is NOT NULL; an
# index for both would be of no use to it then, and it would read the table
LEFT_INDEX = "CREATE INDEX CONCURRENTLY {index} ON {table} (({source} IS NOT NULL)) WHERE {vector} IS NULL"
CLEAN_UP_TIMEOUT = "5s"


def upgrade(db: Database, target: Target, settings: Settings) -> None:
    """Raises MigrationError, with nothing changed, unless everything that `gate` asks for holds."""
    mode = gate.require_mode(settings, target)
    with db.reading():
        table = checks.require_table(db, target)
        if found := Mark.of(table, target):
            found.require(mode, target)
            log.notice(f"{found.said(target)}; nothing to do")
            return
        if table.columns[target.source].is_vector:
            log.notice(f"column {quote(target.source)} of {target} is of type vector already, nothing to cut over")
            return
        gate.require(db, target, settings, table)
        extension = catalog.extension(db)
    db.take_over()
    assert extension is not None  # there is a column of its type
    with db.transaction():
        leaves = partitions.leaves(db, table.oid)
    skipped = gate.verify(db, target, settings, table, extension)
    try:
        renamed = _newer_index(db, target, settings, table, extension) if mode == "swap" else None
        _prepare(db, target, settings, table, skipped, mode)
        what = f"the cutover of {target}"

        def switch() -> Mark:
            return _switch(db, target, settings, table, mode, renamed, leaves)

        done = locks.retried(db, settings.lock_timeout_ms, table.oid, what, switch)
    except BaseException:
        if db.usable:
            db.rollback()
            clean_up(db, target, settings, table)
        raise
    log.notice(
        done.said(target),
        detail=f"A writer that still sends bytes to {quote(target.source)} gets an error from now on.",
        hint=f"The way back: {UNDO}.",
    )


def _newer_index(db: Database, target: Target, settings: Settings, table: Table, extension: Extension) -> str | None:
    """Has the index ready that newer OpenMemory makes when it starts, or returns the one that only needs its name.

    For a column of a host's, and with OM_INDEX=none, there is nothing to do.
    """
    newer = target.newer
    if newer.index_name is None or settings.index == "none":
        return None
    size = table.columns[target.vector].dimensions or 0
    if size > INDEX_DIMENSIONS:
        log.warning(
            f"newer OpenMemory can't start on vectors of {size:,} dimensions: the index that it makes takes"
            f" {INDEX_DIMENSIONS:,} at most"
        )
        return None
    wants = replace(settings, index="hnsw", index_metric="cosine", index_halfvec=False)
    with db.transaction(snapshot=True):
        rows = db.value("SELECT count(*) FROM {table} WHERE {vector} IS NOT NULL")
    wanted = indexes.plan(newer, wants, extension, size, rows)
    if isinstance(wanted, NoIndex):
        log.notice(f"no index {quote(newer.index)}: {wanted.reason}", hint=wanted.hint)
        return None
    with db.transaction():
        own = catalog.indexes(db, target.schema, target.index).get(target.index)
        there = catalog.relation_exists(db, target.schema, newer.index)
    if own and own.valid and own.table_oid == table.oid and wanted.matches(own) and not there:
        return own.name
    try:
        if table.kind == "p":
            building_tree.ensure(db, newer, wants, table, extension)
        else:
            building.drop_invalid(db, newer, table.oid)
            building.ensure(db, newer, wants, table.oid, wanted)
    except CannotBuild as problem:
        building.say(problem)
    return None


def _prepare(db: Database, target: Target, settings: Settings, table: Table, skipped: int, mode: str) -> None:
    """What lets the switch look at no row that has its vector."""
    with db.transaction():
        leaves = partitions.leaves(db, table.oid)
    for part in leaves:
        _index_left(db, target, part)
    if skipped:
        what = f"keeping the bytes of {skipped:,} rows of {target}"
        locks.retried(db, settings.lock_timeout_ms, table.oid, what, lambda: kept.fill(db, target, table))
    with db.transaction():
        not_null = switching.attributes(db, target.source).not_null
    if mode == "swap" and not_null:
        switching.prove_not_null(db, target, settings, table, target.vector)


def _index_left(db: Database, target: Target, part: Part) -> None:
    at, name = part.at(db), gate.left_index(target, part)
    found = _found_index(db, part, name)
    if found and found.valid:
        return  # of a run that was interrupted; to drop it would wait for whoever reads the table
    if found:
        _drop_index(db, part, name)
    with at.autocommit():
        at.run(LEFT_INDEX, index=quote(name))


def _found_index(db: Database, part: Part, name: str) -> Index | None:
    with db.transaction():
        found = catalog.indexes(db, part.schema, name).get(name)
    return found if found and found.table_oid == part.oid else None


def _drop_index(db: Database, part: Part, name: str, lock_timeout: str = PATIENT_LOCK_TIMEOUT) -> None:
    building.drop(db.at({"schema": quote(part.schema)}), name, lock_timeout)


def left(db: Database, target: Target, table: Table) -> list[str]:
    """What a run that was killed has prepared and not taken away; in a transaction that is open."""
    newer = target.newer
    found = [f"index {quote(newer.index)}"] if newer.index_name and _is_on(db, target, newer.index, table.oid) else []
    for part in partitions.leaves(db, table.oid):
        name = gate.left_index(target, part)
        if _is_on(db, replace(target, schema=part.schema), name, part.oid):
            found.append(f"index {quote(name)}")
    if switching.has_proof(db, target):
        found.append(f"constraint {quote(target.left)}, which refuses rows without a vector")
    if kept.exists(db, target):
        found.append(f"table {quote(target.kept)}")
    return found


def _is_on(db: Database, target: Target, name: str, table_oid: int) -> bool:
    index = catalog.indexes(db, target.schema, name).get(name)
    return index is not None and index.table_oid == table_oid


def take_back(db: Database, target: Target, settings: Settings, table: Table) -> None:
    """Takes all of that away. Raises MigrationError for what can't be."""
    if target.newer.index_name:
        replacing.drop(db, target.newer, settings, table, replacing.LEFT)
    clean_up(db, target, settings, table)
    with db.transaction():
        still = left(db, target, table)
    if still:
        raise MigrationError(
            f"what a cutover of {target} has left can't be taken away now: {'; '.join(still)}",
            hint="Somebody holds a lock on it, or it belongs to another role. Run the same command again.",
        )


def clean_up(db: Database, target: Target, settings: Settings, table: Table) -> None:
    """After a run that failed: what it has prepared is of no use to anybody but the next."""
    with _suppressed(), db.transaction():
        now = catalog.table(db, target.schema, target.table)
        if now and Mark.of(now, target):
            return  # what failed came after the switch
        kept.drop(db, target)
    with _suppressed(), db.transaction():
        if switching.has_proof(db, target):
            locks.set_timeout(db, f"{settings.lock_timeout_ms}ms")
            switching.unprove_not_null(db)
    with _suppressed():
        with db.transaction():
            leaves = partitions.leaves(db, table.oid)
        for part in leaves:
            name = gate.left_index(target, part)
            if _found_index(db, part, name):
                _drop_index(db, part, name, CLEAN_UP_TIMEOUT)


def _suppressed() -> AbstractContextManager[None]:
    return suppress(MigrationError, DBAPIError)


def _switch(
    db: Database,
    target: Target,
    settings: Settings,
    table: Table,
    mode: str,
    renamed: str | None,
    compared: list[Part],
) -> Mark:
    """The one transaction in which anything is different for others."""
    db.run("LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
    if catalog.table(db, target.schema, target.table) != table:
        raise MigrationError(f"{target} was changed during the cutover", hint="Run the same command again.")
    gate.require_trigger(db, target, table)
    partitions.refuse_others(db, target, table.oid, compared)
    left = kept.count_left(db)
    gate.require_accepted(target, settings, table, left)
    if left:
        kept.fill(db, target, table)
    parts = partitions.parts(db, table.oid)
    source, vector = switching.attributes(db, target.source), switching.attributes(db, target.vector)
    dimensions = table.columns[target.vector].dimensions
    synctrigger.drop_trigger(db)
    for part in parts:
        index = gate.left_index(target, part)
        if part.is_leaf and index in catalog.indexes(db, part.schema, index):
            db.run("DROP INDEX {in_schema}.{index}", in_schema=quote(part.schema), index=quote(index))
    grants = [(part, switching.attributes(part.at(db), target.source).grants) for part in parts]
    if mode == "drop":
        of_parts = {part.sql_name: theirs for part, theirs in grants if theirs and part.parent is not None}
        found = Mark("drop", source, vector, parts=of_parts, dimensions=dimensions)
        db.run("ALTER TABLE {table} DROP COLUMN {source}")
        switching.comment(db, target.vector, found.text)
        return found
    found = Mark("swap", source, vector, renamed, dimensions=dimensions)
    of_vector = [switching.attributes(part.at(db), target.vector).grants for part in parts]
    if source.not_null:
        switching.require(db, target.source, not_null=False)
    if source.default is not None:
        switching.set_default(db, target.source, None)
    db.run("ALTER TABLE {table} RENAME COLUMN {source} TO {archive}")
    db.run("ALTER TABLE {table} RENAME COLUMN {vector} TO {source}")
    for (part, theirs), ours in zip(grants, of_vector, strict=True):
        switching.grant(part.at(db), target.source, theirs)
        switching.grant(part.at(db), target.archive, ours)
    if source.not_null:
        switching.require(db, target.source, not_null=True)
    switching.unprove_not_null(db)
    switching.comment(db, target.source, found.text)
    backtrigger.forget(db.at(mark.names(target.swapped)))
    if renamed:
        db.run("ALTER INDEX {schema}.{index} RENAME TO {to}", index=quote(renamed), to=quote(target.newer.index))
    return found
