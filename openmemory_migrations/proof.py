"""What `verify` proves: every row compared, and the searches measured, all in one snapshot. Read-only."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from . import catalog, citus, console, indexes, log, partitions, verification
from .asking import Asked, Choice
from .catalog import Extension, Index, Table
from .database import Database
from .errors import Changed, MigrationError
from .pairs import Batch, Groups, batches
from .quality import Measurement, Quality, Tried, fastest
from .reading import Window, planned, windows
from .searching import SESSION, Searched, Searcher, ways
from .target import Target, quote
from .verification import Comparing, Comparison

LOCK_TIMEOUT_MS = 30_000
GLANCE_QUERIES, GLANCE_K = 20, 10
GLANCE_SECONDS = 60.0  # for reading the rows that the true neighbours are among

LISTS_OF_LEAVES = """
SELECT max(CAST(substr(option, 7) AS integer))
FROM pg_catalog.pg_partition_tree(CAST(:index AS regclass)) AS t JOIN pg_catalog.pg_class c ON c.oid = t.relid,
     unnest(c.reloptions) AS option
WHERE t.isleaf AND option LIKE 'lists=%'
"""


class TooLong(MigrationError):
    """For a look in passing."""


@dataclass(frozen=True)
class Asking:
    """What is to be measured: so many queries, each for `k` rows; the recall that is wanted; rows to compare."""

    queries: int = 100
    k: int = 10
    wanted: float = 0.95
    sample: int | None = None


@dataclass(frozen=True)
class Proof:
    """`quality` is None where nothing was searched, for the reason in `unsearched`."""

    comparison: Comparison
    index: Index | None
    quality: Quality | None
    unsearched: str | None


@dataclass(frozen=True)
class Glance:
    """`enough` is the fastest way by the index that reaches the wanted recall, if there is one."""

    queries: int
    session: Tried
    enough: Tried | None
    defaults: Mapping[str, str]


See = Callable[[Batch], object]


def prove(db: Database, target: Target, table: Table, extension: Extension, asking: Asking, see: See = bool) -> Proof:
    """`see` gets every batch that is compared. Raises MigrationError for a table that Citus has spread over shards."""
    require_places(db, target, table)
    with _snapshot(db, target, table) as everything:
        chosen = verification.sample(db, everything, asking.sample) if asking.sample else everything
        index = valid_index(db, target, table)
        size, reason = _size(db, target, table, asking)
        asked = Choice(db, target, table, extension, size).ask(asking.queries, asking.k) if size else None
        gathering = asked if chosen == everything else None
        found = _compare(db, target, table, extension, chosen, gathering, see)
        quality = None
        if asked and size:
            if gathering is None:
                gather(db, target, table, extension, everything, size, asked)
            quality = search(db, target, table, extension, size, index, asked, asking.wanted)
            reason = None if quality else "no row has a vector to ask with"
    found.sampled = chosen != everything
    if not found.fine:
        found = _looked_at_again(db, target, table, extension, chosen, found)
    return Proof(found, index, quality, reason)


def require_places(db: Database, target: Target, table: Table) -> None:
    """Raises MigrationError for a table whose rows can't be read by their places."""
    with db.transaction():
        if citus.shards(db, table.oid):
            raise MigrationError(f"{target} is distributed by Citus, where rows can't be read by their places")


def glance(
    db: Database, target: Target, table: Table, extension: Extension, wanted: float, lock_timeout_ms: int
) -> Glance | None:
    """What the index finds by default, and what finds enough, by a few queries; None where none can be asked."""
    size = table.columns[target.vector].dimensions
    assert size is not None  # there is an index
    with _snapshot(db, target, table, lock_timeout_ms) as everything:
        index = valid_index(db, target, table)
        asked = Choice(db, target, table, extension, size).ask(GLANCE_QUERIES, GLANCE_K, of_users=False)
        if index is None or not asked.queries:
            return None
        gather(db, target, table, extension, everything, size, asked, GLANCE_SECONDS)
        searched = _searched(db, target, table, index)
        searcher = Searcher(db, extension, asked.groups, table.key, size, searched, GLANCE_K + 1)
        measurement = Measurement(searcher, asked, searched)
        session = measurement.one(SESSION)
        tried = measurement.sweep(ways(searched, extension), wanted)
        defaults = searcher.defaults([name for one in tried for name in one.way.settings])
    return Glance(len(asked.queries), session, fastest(tried, wanted), defaults)


def search(
    db: Database,
    target: Target,
    table: Table,
    extension: Extension,
    size: int,
    index: Index | None,
    asked: Asked,
    wanted: float,
) -> Quality | None:
    """Asks all queries in every way that is worth it; in the snapshot that the true neighbours are of."""
    searched = _searched(db, target, table, index)
    searcher = Searcher(db, extension, asked.groups, table.key, size, searched, asked.k + 1)
    series = ways(searched, extension)
    with console.shown(f"searching {target.table}", 3 + sum(map(len, series)), "ways") as shown:
        done = 0

        def tried(one: Tried) -> None:
            nonlocal done
            done += 1
            shown.to(done, str(one.way))

        return Measurement(searcher, asked, searched, tried).all(series, wanted)


def valid_index(db: Database, target: Target, table: Table) -> Index | None:
    """The vector index that searches can use: under our name, or whatever somebody has called it."""
    found = catalog.indexes_on(db, table.oid)
    usable = [i for i in found if i.valid and Searched.fits(i) and indexes.is_on(i, target.vector)]
    names = {name: place for place, name in enumerate((target.index, target.mirrored_index))}
    return min(usable, key=lambda index: (names.get(index.name, len(names)), index.name), default=None)


@contextmanager
def _snapshot(
    db: Database, target: Target, table: Table, lock_timeout_ms: int = LOCK_TIMEOUT_MS
) -> Iterator[list[Window]]:
    """One for all statements, with all pages of the table, which nobody can drop or rewrite meanwhile."""
    with db.transaction(snapshot=True, lock_timeout_ms=lock_timeout_ms):
        if catalog.table(db, target.schema, target.table) != table:
            raise Changed(f"{target} was changed just now")
        yield windows(db, partitions.leaves(db, table.oid))


def _searched(db: Database, target: Target, table: Table, index: Index | None) -> Searched:
    if index is None or table.kind != "p":
        return Searched.by(index)
    name = f"{quote(target.schema)}.{quote(index.name)}"
    return Searched.by(index, db.value(LISTS_OF_LEAVES, {"index": name}))


def _size(db: Database, target: Target, table: Table, asking: Asking) -> tuple[int | None, str | None]:
    """The dimensions that are searched, or why nothing is."""
    if not asking.queries:
        return None, "no queries were asked for"
    if fixed := table.columns[target.vector].dimensions:
        return fixed, None
    rows = db.rows("SELECT DISTINCT octet_length({source}) FROM {table} WHERE {vector} IS NOT NULL")
    sizes = [octets // 4 for (octets,) in rows if octets and octets % 4 == 0]
    if len(sizes) == 1:
        return sizes[0], None
    return None, "the vectors have different dimensions" if sizes else "no row has a vector"


def _compare(
    db: Database,
    target: Target,
    table: Table,
    extension: Extension,
    chosen: list[Window],
    asked: Asked | None,
    see: See,
) -> Comparison:
    total = sum(window.end - window.first for window in chosen)
    with console.shown(f"verifying {target.table}", total, "pages") as shown:

        def pass_on(batch: Batch) -> None:
            db.stop.check()  # a cancel that comes while we compute has no effect
            shown.to(batch.pages)
            see(batch)
            if asked:
                asked.see(batch)

        comparing = Comparing(db, target, table, extension, chosen)
        return comparing.run(asked.groups if asked else Groups(), pass_on)


def gather(
    db: Database,
    target: Target,
    table: Table,
    extension: Extension,
    everything: list[Window],
    size: int,
    asked: Asked,
    seconds: float = math.inf,
) -> None:
    """The true neighbours are among all rows, though only some are compared. Raises TooLong after so many seconds."""
    over = time.monotonic() + seconds
    fixed = table.columns[target.vector].dimensions is not None
    total = sum(window.end for window in everything)
    with console.shown(f"reading {target.table}", total, "pages") as shown, planned(db, "verifying"):
        for batch in batches(db, everything, size, fixed=fixed, groups=asked.groups, ext=quote(extension.schema)):
            db.stop.check()
            if time.monotonic() > over:
                raise TooLong(f"reading all rows takes longer than {log.duration(seconds)}")
            shown.to(batch.pages)
            asked.see(batch)


def _looked_at_again(
    db: Database, target: Target, table: Table, extension: Extension, chosen: list[Window], found: Comparison
) -> Comparison:
    """Without a key for every row that is wrong, all rows are."""
    if verification.can_look_again(table, found):
        with db.transaction():
            verification.look_again(db, target, table, extension, found)
        return found
    with _snapshot(db, target, table) as everything:
        # a row that has been updated may be in a page that wasn't there before
        now = chosen if found.sampled else everything
        again = _compare(db, target, table, extension, now, None, bool)
    again.sampled = found.sampled
    again.looked_at_again = max(0, found.rows_wrong - again.rows_wrong)
    return again
