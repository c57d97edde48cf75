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
from ..db.catalog import Index
from ..db.context import Context, TableContext, VectorContext
from ..db.database import Seen
from ..db.signals import TimeUp
from ..encoding import dimensions
from ..errors import Changed, MigrationError
from ..sql import blocks, quote
from . import equality
from .equality import Comparing, Comparison
from .queries import Asked, Choice
from .recall import Measurement, Quality, Tried, fastest
from .search import SESSION, Searched, Searcher, ways
from .stream import Batch, Groups, batches, has_bytes

BLOCKS = blocks("verify")

LOCK_TIMEOUT_MS = 30_000
GLANCE_QUERIES, GLANCE_K = 20, 10
GLANCE_SECONDS = 60.0  # for reading the rows that the true neighbours are among
TELL_AFTER = 3.0  # seconds of reading, from which the whole is estimated
NO_VECTOR = "no row has a vector to ask with"


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


def prove(ctx: VectorContext, asking: Asking, see: See = bool) -> Proof:
    """`see` gets every batch that is read. Raises MigrationError for a table that Citus has spread over shards."""
    require_places(ctx)
    proof = Proof(Comparison() if has_bytes(ctx.table, ctx.target) else None)
    try:
        with ctx.db.stop.within(asking.max_seconds, ctx.db.driver.cancel):
            try:
                _prove(ctx, asking, see, proof)
            except DBAPIError as error:
                # the others can't be compared past them
                bare = ctx.table.columns[ctx.target.vector].dimensions is None
                if not bare or not is_a_rows(error) or not (named := equality.unreadable(ctx)):
                    raise
                raise named from error
    except TimeUp:
        proof.stopped = True
    return proof


def compare(ctx: VectorContext) -> Comparison:
    """Every row with its bytes, and nothing searched."""
    found = prove(ctx, Asking(queries=0)).comparison
    assert found is not None  # there are bytes
    return found


def _prove(ctx: VectorContext, asking: Asking, see: See, proof: Proof) -> None:
    with _snapshot(ctx) as (seen, everything):
        proof.rows = int(ctx.db.value("SELECT count(*) FROM {table}"))
        proof.index = valid_index(ctx)
        chosen, found = everything, proof.comparison
        if found:
            chosen = equality.sample(ctx.db, everything, asking.sample) if asking.sample else everything
            found.rows, found.sampled, found.seen = proof.rows, chosen != everything, seen
        proof.unsearched = "the time is up"
        size, reason = _size(ctx, asking)
        asked, failed = None, None
        try:
            with ctx.db.attempt():
                asked = Choice(ctx, size).ask(asking.queries, asking.k) if size else None
        except DBAPIError as error:
            if not found or not is_a_rows(error):
                raise
            failed = error
        gathering = asked if found and not found.sampled else None
        if found:
            _compare(ctx, chosen, found, gathering, see)
        if failed and found and "unreadable" not in found.wrong:
            raise failed  # else the comparison has come upon it, too, and names it
        if found and "unreadable" in found.wrong:
            reason = "there are rows that the server can't read"
        elif asked and size:
            if gathering is None:
                gather(ctx, everything, size, asked, see=bool if found else see)
            proof.quality = search(ctx, size, proof.index, asked, asking.wanted)
            reason = None if proof.quality else NO_VECTOR
        proof.unsearched = reason
    # a sample knows nothing of the page that a row of it has gone to since
    if found and not found.fine and not found.sampled:
        proof.comparison = _compared_again(ctx, found)


def require_places(ctx: TableContext) -> None:
    """Raises MigrationError for a table whose rows can't be read by their places."""
    with ctx.db.transaction():
        if citus.shards(ctx.db, ctx.table.oid):
            raise MigrationError(f"{ctx.target} is distributed by Citus, where rows can't be read by their places")


def glance(ctx: VectorContext, wanted: float, lock_timeout_ms: int) -> Glance | None:
    """What the index finds by default, and what finds enough, by a few queries; None where none can be asked."""
    size = ctx.table.columns[ctx.target.vector].dimensions
    assert size is not None  # there is an index
    with _snapshot(ctx, lock_timeout_ms) as (_, everything):
        index = valid_index(ctx)
        asked = Choice(ctx, size).ask(GLANCE_QUERIES, GLANCE_K, of_users=False)
        if index is None or not asked.queries:
            return None
        gather(ctx, everything, size, asked, GLANCE_SECONDS)
        searched = _searched(ctx, index)
        searcher = Searcher(ctx.db, ctx.extension, asked.groups, ctx.table.key, size, searched, GLANCE_K + 1)
        measurement = Measurement(searcher, asked, searched)
        session = measurement.one(SESSION)
        tried = measurement.sweep(ways(searched, ctx.extension), wanted)
        defaults = searcher.defaults([name for one in tried for name in one.way.settings])
    return Glance(len(asked.queries), session, fastest(tried, wanted), defaults)


def search(ctx: VectorContext, size: int, index: Index | None, asked: Asked, wanted: float) -> Quality | None:
    """Asks all queries in every way that is worth it; in the snapshot that the true neighbours are of."""
    searched = _searched(ctx, index)
    searcher = Searcher(ctx.db, ctx.extension, asked.groups, ctx.table.key, size, searched, asked.k + 1)
    series = ways(searched, ctx.extension)
    with console.shown(f"searching {ctx.target.table}", 3 + sum(map(len, series)), "ways") as shown:
        done = 0

        def tried(one: Tried) -> None:
            nonlocal done
            done += 1
            shown.to(done, str(one.way))

        return Measurement(searcher, asked, searched, tried).all(series, wanted)


def valid_index(ctx: TableContext) -> Index | None:
    """The vector index that searches can use: under our name, or whatever somebody has called it."""
    found = catalog.indexes_on(ctx.db, ctx.table.oid)
    usable = [i for i in found if i.valid and Searched.fits(i) and i.column == ctx.target.vector]
    names = {name: place for place, name in enumerate((ctx.target.index, ctx.target.mirrored_index))}
    return min(usable, key=lambda index: (names.get(index.name, len(names)), index.name), default=None)


@contextmanager
def _snapshot(ctx: TableContext, lock_timeout_ms: int = LOCK_TIMEOUT_MS) -> Iterator[tuple[Seen, list[Window]]]:
    """One for all statements: what is looked at, and all pages of the table, which nobody can rewrite meanwhile."""
    with ctx.db.transaction(snapshot=True, lock_timeout_ms=lock_timeout_ms) as seen:
        _require_same(ctx)
        yield seen, windows(ctx.db, partitions.leaves(ctx.db, ctx.table.oid))
        # the lock doesn't keep anybody from renaming a schema
        _require_same(ctx)


def _require_same(ctx: TableContext) -> None:
    """By the catalogs as the snapshot has them, and as statements do, which find a table by its name of now."""
    db = ctx.db
    same = db.value(BLOCKS.same, {"names": [db.names["table"]], "oids": [ctx.table.oid]})
    parts = partitions.leaves(db, ctx.table.oid)
    same = same and db.value(
        BLOCKS.same, {"names": [part.sql_name for part in parts], "oids": [part.oid for part in parts]}
    )
    if not same or catalog.table(db, ctx.target.schema, ctx.target.table) != ctx.table:
        raise Changed(f"{ctx.target} was changed just now")


def _searched(ctx: TableContext, index: Index | None) -> Searched:
    if index is None or ctx.table.kind != "p":
        return Searched.by(index)
    name = quote(ctx.target.schema, index.name)
    return Searched.by(index, ctx.db.value(BLOCKS.lists_of_leaves, {"index": name}))


def _size(ctx: VectorContext, asking: Asking) -> tuple[int | None, str | None]:
    """The dimensions that are searched, or why nothing is."""
    if not asking.queries:
        return None, "no queries were asked for"
    if fixed := ctx.table.columns[ctx.target.vector].dimensions:
        return fixed, None
    rows = "FROM {table} WHERE {vector} IS NOT NULL"
    # the length of bytes is known without reading them
    if has_bytes(ctx.table, ctx.target):
        sizes = dimensions.sizes(ctx.db, rows)
    else:
        found = ctx.db.rows("SELECT DISTINCT {ext}.vector_dims({vector}) " + rows, **ctx.extension.names())
        sizes = [size for (size,) in found]
    if len(sizes) == 1:
        return sizes[0], None
    return None, "the vectors have different dimensions" if sizes else NO_VECTOR


@contextmanager
def _read(ctx: Context, doing: str, chosen: list[Window]) -> Iterator[See]:
    """Gives what takes each batch that is read: it shows how far that is, and once how long it is going to take."""
    total = sum(window.end - window.first for window in chosen)
    began, told = time.monotonic(), False

    def take(batch: Batch) -> None:
        nonlocal told
        ctx.db.stop.check()  # a cancel that comes while we compute has no effect
        shown.to(batch.pages)
        seconds = time.monotonic() - began
        if not told and seconds >= TELL_AFTER:
            told = True
            log.notice(
                f"{doing} {ctx.target} takes about {log.duration(seconds * total / max(1, batch.pages))}",
                detail="Until then a snapshot is held: VACUUM doesn't remove what dies meanwhile.",
            )

    with console.shown(f"{doing} {ctx.target.table}", total, "pages") as shown:
        yield take


def _compare(ctx: VectorContext, chosen: list[Window], found: Comparison, asked: Asked | None, see: See) -> None:
    with _read(ctx, "verifying", chosen) as take:

        def pass_on(batch: Batch) -> None:
            take(batch)
            see(batch)
            if asked:
                asked.see(batch)

        Comparing(ctx, chosen, found).run(asked.groups if asked else Groups(), pass_on)


def gather(
    ctx: VectorContext,
    everything: list[Window],
    size: int,
    asked: Asked,
    seconds: float = math.inf,
    see: See = bool,
) -> None:
    """The true neighbours are among all rows, though only some are compared. Raises TooLong after so many seconds."""
    over = time.monotonic() + seconds
    with _read(ctx, "reading", everything) as take, planned(ctx.db, "verifying"):
        for batch in batches(ctx, everything, size, asked.groups):
            if time.monotonic() > over:
                raise TooLong(f"reading all rows takes longer than {log.duration(seconds)}")
            take(batch)
            see(batch)
            asked.see(batch)


def _compared_again(ctx: VectorContext, first: Comparison) -> Comparison:
    """All rows, in a snapshot of its own: a backfill may just have been about to put right what was wrong.

    Not only those that were wrong: a row that isn't found again where it was, or by its key, needn't be gone.
    """
    log.notice(f"{first.not_right:,} rows of {ctx.target} are not right; comparing all rows again, in a new snapshot")
    with _snapshot(ctx) as (seen, everything):
        again = Comparison(rows=int(ctx.db.value("SELECT count(*) FROM {table}")), seen=seen)
        _compare(ctx, everything, again, None, bool)
    again.looked_at_again = max(0, first.rows_wrong - again.rows_wrong)
    return again
