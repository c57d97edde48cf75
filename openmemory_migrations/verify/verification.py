"""What `verify` proves: every row compared, and the searches measured, all in one snapshot. Read-only."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy.exc import DBAPIError

from .. import console, log
from ..backfill.passes import is_a_rows
from ..backfill.reader import Window, planned, windows
from ..db import catalog, citus, partitions
from ..db.catalog import Extension, Index, Table
from ..db.database import Database, Seen
from ..db.signals import TimeUp
from ..errors import Changed, MigrationError
from ..index import choice
from ..target import Target, quote
from . import equality
from .equality import Comparing, Comparison
from .queries import Asked, Choice
from .recall import Measurement, Quality, Tried, fastest
from .search import SESSION, Searched, Searcher, ways
from .stream import Batch, Groups, batches, has_bytes

LOCK_TIMEOUT_MS = 30_000
GLANCE_QUERIES, GLANCE_K = 20, 10
GLANCE_SECONDS = 60.0  # for reading the rows that the true neighbours are among
TELL_AFTER = 3.0  # seconds of reading, from which the whole is estimated
NO_VECTOR = "no row has a vector to ask with"

SAME = """
SELECT coalesce(bool_and(CAST(to_regclass(t.name) AS oid) IS NOT DISTINCT FROM t.oid), true)
FROM unnest(CAST(:names AS text[]), CAST(:oids AS oid[])) AS t (name, oid)
"""
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
    max_seconds: float | None = None


@dataclass
class Proof:
    """What is known so far: all of it, unless `stopped` by the seconds that there were.

    `comparison` is None where the table has no bytes to compare with; `quality` where nothing was searched, for the
    reason in `unsearched`. `rows` are in the table.
    """

    comparison: Comparison | None = None
    rows: int = 0
    index: Index | None = None
    quality: Quality | None = None
    unsearched: str | None = None
    stopped: bool = False

    @property
    def looked(self) -> bool:
        """Whether anything was: without bytes there is nothing to compare, and a search is all that reads vectors."""
        return bool(self.comparison or self.quality or not self.rows) or self.unsearched == NO_VECTOR

    @property
    def fine(self) -> bool:
        return not self.stopped and (self.comparison is None or self.comparison.fine)


@dataclass(frozen=True)
class Glance:
    """`enough` is the fastest way by the index that reaches the wanted recall, if there is one."""

    queries: int
    session: Tried
    enough: Tried | None
    defaults: Mapping[str, str]


See = Callable[[Batch], object]


def prove(db: Database, target: Target, table: Table, extension: Extension, asking: Asking, see: See = bool) -> Proof:
    """`see` gets every batch that is read. Raises MigrationError for a table that Citus has spread over shards."""
    require_places(db, target, table)
    proof = Proof(Comparison() if has_bytes(table, target) else None)
    try:
        with db.stop.within(asking.max_seconds, db.driver.cancel):
            try:
                _prove(db, target, table, extension, asking, see, proof)
            except DBAPIError as error:
                # the others can't be compared past them
                bare = table.columns[target.vector].dimensions is None
                if not bare or not is_a_rows(error) or not (named := equality.unreadable(db, target, table, extension)):
                    raise
                raise named from error
    except TimeUp:
        proof.stopped = True
    return proof


def compare(db: Database, target: Target, table: Table, extension: Extension) -> Comparison:
    """Every row with its bytes, and nothing searched."""
    found = prove(db, target, table, extension, Asking(queries=0)).comparison
    assert found is not None  # there are bytes
    return found


def _prove(
    db: Database, target: Target, table: Table, extension: Extension, asking: Asking, see: See, proof: Proof
) -> None:
    with _snapshot(db, target, table) as (seen, everything):
        proof.rows = int(db.value("SELECT count(*) FROM {table}"))
        proof.index = valid_index(db, target, table)
        chosen, found = everything, proof.comparison
        if found:
            chosen = equality.sample(db, everything, asking.sample) if asking.sample else everything
            found.rows, found.sampled, found.seen = proof.rows, chosen != everything, seen
        proof.unsearched = "the time is up"
        size, reason = _size(db, target, table, extension, asking)
        asked = None
        try:
            with db.attempt():
                asked = Choice(db, target, table, extension, size).ask(asking.queries, asking.k) if size else None
        except DBAPIError as error:
            if not found or not is_a_rows(error):
                raise  # else the comparison comes upon it, too, and names it
        gathering = asked if found and not found.sampled else None
        if found:
            _compare(db, target, table, extension, chosen, found, gathering, see)
        if found and "unreadable" in found.wrong:
            reason = "there are rows that the server can't read"
        elif asked and size:
            if gathering is None:
                gather(db, target, table, extension, everything, size, asked, see=bool if found else see)
            proof.quality = search(db, target, table, extension, size, proof.index, asked, asking.wanted)
            reason = None if proof.quality else NO_VECTOR
        proof.unsearched = reason
    # a sample knows nothing of the page that a row of it has gone to since
    if found and not found.fine and not found.sampled:
        proof.comparison = _compared_again(db, target, table, extension, found)


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
    with _snapshot(db, target, table, lock_timeout_ms) as (_, everything):
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
    usable = [i for i in found if i.valid and Searched.fits(i) and choice.is_on(i, target.vector)]
    names = {name: place for place, name in enumerate((target.index, target.mirrored_index))}
    return min(usable, key=lambda index: (names.get(index.name, len(names)), index.name), default=None)


@contextmanager
def _snapshot(
    db: Database, target: Target, table: Table, lock_timeout_ms: int = LOCK_TIMEOUT_MS
) -> Iterator[tuple[Seen, list[Window]]]:
    """One for all statements: what is looked at, and all pages of the table, which nobody can rewrite meanwhile."""
    with db.transaction(snapshot=True, lock_timeout_ms=lock_timeout_ms) as seen:
        _require_same(db, target, table)
        yield seen, windows(db, partitions.leaves(db, table.oid))
        # the lock doesn't keep anybody from renaming a schema
        _require_same(db, target, table)


def _require_same(db: Database, target: Target, table: Table) -> None:
    """By the catalogs as the snapshot has them, and as statements do, which find a table by its name of now."""
    same = db.value(SAME, {"names": [db.names["table"]], "oids": [table.oid]})
    parts = partitions.leaves(db, table.oid)
    same = same and db.value(SAME, {"names": [part.sql_name for part in parts], "oids": [part.oid for part in parts]})
    if not same or catalog.table(db, target.schema, target.table) != table:
        raise Changed(f"{target} was changed just now")


def _searched(db: Database, target: Target, table: Table, index: Index | None) -> Searched:
    if index is None or table.kind != "p":
        return Searched.by(index)
    name = f"{quote(target.schema)}.{quote(index.name)}"
    return Searched.by(index, db.value(LISTS_OF_LEAVES, {"index": name}))


def _size(
    db: Database, target: Target, table: Table, extension: Extension, asking: Asking
) -> tuple[int | None, str | None]:
    """The dimensions that are searched, or why nothing is."""
    if not asking.queries:
        return None, "no queries were asked for"
    if fixed := table.columns[target.vector].dimensions:
        return fixed, None
    # the length of bytes is known without reading them
    size = "octet_length({source}) / 4.0" if has_bytes(table, target) else "{ext}.vector_dims({vector})"
    rows = db.rows(f"SELECT DISTINCT {size} FROM {{table}} WHERE {{vector}} IS NOT NULL", **extension.names())
    sizes = [int(size) for (size,) in rows if size and size == int(size)]
    if len(sizes) == 1:
        return sizes[0], None
    return None, "the vectors have different dimensions" if sizes else NO_VECTOR


@contextmanager
def _read(db: Database, target: Target, doing: str, chosen: list[Window]) -> Iterator[See]:
    """Gives what takes each batch that is read: it shows how far that is, and once how long it is going to take."""
    total = sum(window.end - window.first for window in chosen)
    began, told = time.monotonic(), False

    def take(batch: Batch) -> None:
        nonlocal told
        db.stop.check()  # a cancel that comes while we compute has no effect
        shown.to(batch.pages)
        seconds = time.monotonic() - began
        if not told and seconds >= TELL_AFTER:
            told = True
            log.notice(
                f"{doing} {target} takes about {log.duration(seconds * total / max(1, batch.pages))}",
                detail="Until then a snapshot is held: VACUUM doesn't remove what dies meanwhile.",
            )

    with console.shown(f"{doing} {target.table}", total, "pages") as shown:
        yield take


def _compare(
    db: Database,
    target: Target,
    table: Table,
    extension: Extension,
    chosen: list[Window],
    found: Comparison,
    asked: Asked | None,
    see: See,
) -> None:
    with _read(db, target, "verifying", chosen) as take:

        def pass_on(batch: Batch) -> None:
            take(batch)
            see(batch)
            if asked:
                asked.see(batch)

        Comparing(db, target, table, extension, chosen, found).run(asked.groups if asked else Groups(), pass_on)


def gather(
    db: Database,
    target: Target,
    table: Table,
    extension: Extension,
    everything: list[Window],
    size: int,
    asked: Asked,
    seconds: float = math.inf,
    see: See = bool,
) -> None:
    """The true neighbours are among all rows, though only some are compared. Raises TooLong after so many seconds."""
    over = time.monotonic() + seconds
    with _read(db, target, "reading", everything) as take, planned(db, "verifying"):
        for batch in batches(db, target, table, extension, everything, size, asked.groups):
            if time.monotonic() > over:
                raise TooLong(f"reading all rows takes longer than {log.duration(seconds)}")
            take(batch)
            see(batch)
            asked.see(batch)


def _compared_again(db: Database, target: Target, table: Table, extension: Extension, first: Comparison) -> Comparison:
    """All rows, in a snapshot of its own: a backfill may just have been about to put right what was wrong.

    Not only those that were wrong: a row that isn't found again where it was, or by its key, needn't be gone.
    """
    log.notice(f"{first.not_right:,} rows of {target} are not right; comparing all rows again, in a new snapshot")
    with _snapshot(db, target, table) as (seen, everything):
        again = Comparison(rows=int(db.value("SELECT count(*) FROM {table}")), seen=seen)
        _compare(db, target, table, extension, everything, again, None, bool)
    again.looked_at_again = max(0, first.rows_wrong - again.rows_wrong)
    return again
