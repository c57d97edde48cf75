"""Compares every row's vector with its bytes, bit by bit, in one snapshot. Read-only.

A row is wrong when its vector isn't what its bytes say. What is right is decided by what was read, never by what wasn't
found: every row that the server counts in the snapshot is accounted for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..backfill.leftovers import LOOK_ROWS, NOT_FINITE
from ..backfill.reader import Scan, Tid, Unreadable, Window, pages_of, planned
from ..db import partitions
from ..db.catalog import Table
from ..db.context import VectorContext
from ..db.database import Database, Seen
from ..db.keys import SHOWN_KEYS, keys_at
from ..db.partitions import Part
from ..encoding import codec, dimensions
from ..encoding.stored import STORED
from ..errors import MigrationError
from ..sql import SQL, Fragment, blocks, fill, joined, quote
from .stream import Batch, Groups, batches, has_bytes

BLOCKS = blocks("verify")

Kind = Literal["differs", "missing", "stale", "sourceless", "unreadable"]
MEANING: Mapping[Kind, str] = {
    "differs": "the vector is another than the bytes",
    "missing": "the bytes have no vector",
    "stale": "there is a vector, but the bytes are none (any more)",
    "sourceless": "there is a vector, but no bytes",
    "unreadable": "the server can't read it",
}
KEPT = 1000  # wrong rows of each kind whose keys are kept
LOOK_PAGES, MOST_WINDOWS = 64, 64  # to see how many rows a page has; places of one part that a sample is taken from
ROWS = "SELECT count(*) FROM ONLY {table} WHERE {inside}"

TIDS = """
SELECT CAST(ctid AS text) FROM ONLY {table} WHERE {inside} AND {vector} IS NOT NULL AND {condition} LIMIT {most}
"""
STALE, SOURCELESS = STORED.not_of("{size}"), "{source} IS NULL"
KEYS = "SELECT {key} FROM {table} WHERE ctid = ANY (CAST(CAST(:tids AS text[]) AS tid[]))"

Key = tuple[str, ...]  # the primary key's values as text


@dataclass
class Wrong:
    """Rows that are wrong in one way; `keys` of the first 1,000, or their places where there is no primary key."""

    rows: int = 0
    keys: list[Key] = field(default_factory=list)


@dataclass
class Comparison:
    """`rows` were there, as the server counts them; `equal` have a vector that is their bytes to the bit; `skipped`
    can't have one."""

    rows: int = 0
    equal: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    without_source: int = 0  # v is NULL
    sourceless: int = 0  # of them, those that have a vector all the same, carried over from an adopted column
    wrong: dict[Kind, Wrong] = field(default_factory=dict)
    looked_at_again: int = 0  # wrong in a first comparison, and no longer in this one
    sampled: bool = False
    left_out: int = 0  # rows that aren't in the sample
    seen: Seen = ()  # for whoever decides by it

    @property
    def rows_wrong(self) -> int:
        return sum(wrong.rows for wrong in self.wrong.values())

    @property
    def not_right(self) -> int:
        return self.rows - self.equal - self.skipped.total() - self.without_source

    @property
    def unseen(self) -> int:
        """Rows that were there, and of which nothing is known."""
        return self.not_right - self.rows_wrong

    @property
    def fine(self) -> bool:
        return not self.rows_wrong and not self.unseen and (self.rows > 0 or not self.left_out)

    def problems(self, table: Table) -> str:
        """What isn't right, with the key of a row of each kind."""
        found = [
            f"{wrong.rows:,}: {MEANING[kind]}" + (f", such as {shown(table, wrong.keys[0])}" if wrong.keys else "")
            for kind, wrong in self.wrong.items()
        ]
        return "; ".join(found + [f"{self.unseen:,}: not looked at"] * bool(self.unseen)) + "."


def sample(db: Database, windows: Sequence[Window], rows: int) -> list[Window]:
    """Pages evenly spread over all that hold so many rows or some more; all of them where there are no more rows."""
    some = spread(windows, LOOK_PAGES)
    pages = -(-rows * sum(window.end - window.first for window in some) // max(1, _rows_in(db, some)))
    while pages < sum(window.end for window in windows):
        chosen = spread(windows, pages)
        # pages needn't be alike: after a backfill, and until a vacuum, the first hold nothing but dead rows
        if _rows_in(db, chosen) >= rows:
            return chosen
        pages *= 2
    return list(windows)


def _rows_in(db: Database, windows: Sequence[Window]) -> int:
    return sum(int(window.part.at(db).value(ROWS, inside=_inside(window))) for window in windows)


def spread(windows: Sequence[Window], pages: int) -> list[Window]:
    """About so many pages of whole parts, at places that are evenly far from each other; none of them twice. Pure."""
    total = sum(window.end for window in windows)
    each = -(-pages // MOST_WINDOWS)
    chosen = []
    for window in windows:
        if not window.end:
            continue
        number = -(-window.end * pages // (total * each))
        firsts = [i * window.end // number for i in range(number)]
        chosen += [
            Window(window.part, first, min(first + each, following))
            for first, following in zip(firsts, [*firsts[1:], window.end], strict=True)
            if first < following
        ]
    return chosen


class Comparing:
    """One pass in the snapshot that is open, which fills `found`; `see` gets every batch of rows with both values.

    A vector without bytes is right only in a column that is kept equal to them, where it was carried over from an
    adopted one. After a cutover, as it is undone, every vector has its bytes.
    """

    def __init__(self, ctx: VectorContext, windows: Sequence[Window], found: Comparison) -> None:
        self.ctx, self.db, self.windows = ctx, ctx.db, windows
        self.ext = quote(ctx.extension.schema)
        self.fixed = ctx.table.columns[ctx.target.vector].dimensions
        self.size: Fragment = self.fixed or ctx.db.sql("{ext}.vector_dims({vector})", ext=self.ext)
        self.carried_over = ctx.table.columns[ctx.target.vector].ours
        self.found = found

    def run(self, groups: Groups, see: Callable[[Batch], None]) -> None:
        if self.found.sampled:
            everything, self.found.rows = self.found.rows, _rows_in(self.db, self.windows)
            self.found.left_out = everything - self.found.rows
        with planned(self.db, "verifying"):
            for size in self._sizes():
                for batch in batches(self.ctx, self.windows, size, groups, self._unreadable):
                    self.found.equal += len(batch) - len(batch.differing) - len(batch.stale)
                    self._wrong("differs", batch.part, len(batch.differing), batch.differing)
                    self._wrong("stale", batch.part, len(batch.stale), batch.stale)
                    see(batch)
            for window in self.windows:
                self._others(window)

    def _sizes(self) -> list[int]:
        if self.fixed:
            return [self.fixed]
        found: set[int] = set()
        for window in self.windows:
            rows = "FROM ONLY {table} WHERE {inside} AND {vector} IS NOT NULL"
            found |= set(dimensions.sizes(window.part.at(self.db), rows, inside=_inside(window)))
        return sorted(found)

    def _others(self, window: Window) -> None:
        at = window.part.at(self.db)
        stale = sourceless = 0
        for octets, no_vector, rows in at.rows(
            BLOCKS.others,
            inside=_inside(window),
            length=at.sql(STORED.length),
            of_size=at.sql(STORED.of("{size}"), size=self.size),
        ):
            if octets is None and (no_vector or self.carried_over):
                self.found.without_source += rows
                self.found.sourceless += 0 if no_vector else rows
            elif octets is None:
                sourceless += rows
            elif not no_vector:
                stale += rows
            elif problem := STORED.problem(octets, self.fixed):
                self.found.skipped[problem] += rows
            else:
                self._pending(window, STORED.dimensions(octets))
        kinds: list[tuple[Kind, int, str]] = [("stale", stale, STALE), ("sourceless", sourceless, SOURCELESS)]
        for kind, rows, condition in kinds:
            if rows:
                wrong = at.sql(condition, size=self.size)
                tids = at.rows(TIDS, inside=_inside(window), condition=wrong, most=KEPT)
                self._wrong(kind, window.part, rows, [tid for (tid,) in tids])

    def _pending(self, window: Window, size: int) -> None:
        """Rows without a vector: only their values tell whether they can have one."""
        at = window.part.at(self.db)
        scan = Scan(size, LOOK_ROWS, window.first, window.end)
        while scan.more:
            rows, unreadable = scan.take(at)
            self._unreadable(window.part, unreadable)
            if rows.rows_bad:
                self.found.skipped[NOT_FINITE] += rows.rows_bad
            if len(rows.good):
                tids = [codec.tid_text(tid) for tid in rows.good["tid"][:KEPT]]
                self._wrong("missing", window.part, len(rows.good), tids)

    def _unreadable(self, part: Part, unreadable: Unreadable) -> None:
        self._wrong("unreadable", part, len(unreadable), [place for place, _ in unreadable])

    def _wrong(self, kind: Kind, part: Part, rows: int, tids: Sequence[str]) -> None:
        if not rows:
            return
        wrong = self.found.wrong.setdefault(kind, Wrong())
        wrong.rows += rows
        if tids := list(tids[: KEPT - len(wrong.keys)]):
            columns = [fill("CAST({name|ident} AS text)", {"name": name}) for name in self.ctx.table.key]
            key = joined(", ", columns or [SQL("CAST(ctid AS text)")])
            found = part.at(self.db).rows(KEYS, {"tids": tids}, key=key)
            wrong.keys += [tuple(row) for row in found]


def unreadable(ctx: VectorContext) -> MigrationError | None:
    """Names the vectors that the server can't read, of a column without dimensions, where no row can be told apart
    without reading its vector."""
    db = ctx.db
    names: list[str] = []
    with db.transaction(snapshot=True):
        for part in partitions.leaves(db, ctx.table.oid):
            at = part.at(db)
            scan = Scan(1, LOOK_ROWS, 0, pages_of(at))
            with planned(db, "verifying"):
                while scan.more:

                    def read(at: Database = at, scan: Scan = scan) -> tuple[None, int, Tid | None]:
                        ((tid, rows, _),) = at.rows(BLOCKS.dims, **scan.names, **ctx.extension.names())
                        page, item = (tid or "(0,0)").strip("()").split(",")
                        return None, rows, (int(page), int(item))

                    _, bad = scan.take_by(at, read, BLOCKS.next)
                    names += keys_at(at, ctx.table, [place for place, _ in bad]) if bad else []
    if not names:
        return None
    return MigrationError(
        f"{len(names):,} vectors of {ctx.target} can't be read by the server, so nothing is verified",
        detail=f"Such as {', '.join(names[:SHOWN_KEYS])}.",
        hint=f"Set {quote(ctx.target.vector)} to NULL in those rows, then: openmemory-migrations backfill."
        if has_bytes(ctx.table, ctx.target)
        else None,
    )


def _inside(window: Window) -> SQL:
    return SQL(f"ctid >= '({window.first},0)' AND ctid < '({window.end},0)'")


def shown(table: Table, key: Key) -> str:
    """As the log shows a row: (id=…, sector=…)."""
    return "(" + ", ".join(f"{name}={value}" for name, value in zip(table.key or ["ctid"], key, strict=True)) + ")"
