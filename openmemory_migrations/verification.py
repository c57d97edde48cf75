"""Compares every row's vector with its bytes, bit by bit, in one snapshot. Read-only.

A row is wrong when its vector isn't what its bytes say. What was wrong in the snapshot is looked at again by its key: a
backfill, or the application, may just have been about to put it right.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from . import codec, dimensions
from .catalog import Extension, Table
from .database import Database
from .leftovers import LOOK_ROWS, NOT_FINITE
from .pairs import Batch, Groups, batches
from .partitions import Part
from .reading import Scan, Window, planned
from .target import Target, quote

Kind = Literal["differs", "missing", "stale"]
MEANING: Mapping[Kind, str] = {
    "differs": "the vector is another than the bytes",
    "missing": "the bytes have no vector",
    "stale": "there is a vector, but the bytes are none (any more)",
}
KEPT = 1000  # wrong rows of each kind whose keys are kept
LOOK_PAGES, MOST_WINDOWS = 64, 64  # to see how many rows a page has; places of one part that a sample is taken from
ROWS = "SELECT count(*) FROM ONLY {table} WHERE {inside}"

# what the pass over both columns leaves out: the vector is missing, or of other dimensions than the bytes
OTHERS = """
SELECT octet_length({source}), {vector} IS NULL, count(*) FROM ONLY {table}
WHERE {inside} AND (octet_length({source}) = 4 * {size} AND {vector} IS NOT NULL) IS NOT TRUE GROUP BY 1, 2
"""
STALE = """
SELECT CAST(ctid AS text) FROM ONLY {table}
WHERE {inside} AND {vector} IS NOT NULL AND octet_length({source}) <> 4 * {size} LIMIT {most}
"""
KEYS = "SELECT {key} FROM {table} WHERE ctid = ANY (CAST(CAST(:tids AS text[]) AS tid[]))"
AGAIN = "SELECT {source}, {ext}.vector_send({vector}) FROM {table} WHERE "

Key = tuple[str, ...]  # the primary key's values as text


@dataclass
class Wrong:
    """Rows that are wrong in one way; `keys` of the first 1,000, or their places where there is no primary key."""

    rows: int = 0
    keys: list[Key] = field(default_factory=list)


@dataclass
class Comparison:
    """`rows` were looked at; `equal` have a vector that is their bytes to the bit; `skipped` can't have one."""

    rows: int = 0
    equal: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    without_source: int = 0  # v is NULL; some of them have a vector all the same, carried over from an adopted column
    sourceless: int = 0
    wrong: dict[Kind, Wrong] = field(default_factory=dict)
    looked_at_again: int = 0  # wrong in the snapshot, and right when looked at a second time
    sampled: bool = False

    @property
    def rows_wrong(self) -> int:
        return sum(wrong.rows for wrong in self.wrong.values())

    @property
    def fine(self) -> bool:
        return not self.rows_wrong


def sample(db: Database, windows: Sequence[Window], rows: int) -> list[Window]:
    """As many pages, evenly spread over all, as hold about so many rows; all of them if there are no more."""
    # not the first ones: after a backfill, and until a vacuum, those hold nothing but dead rows
    some = spread(windows, LOOK_PAGES)
    seen = sum(int(window.part.at(db).value(ROWS, inside=_inside(window))) for window in some)
    wanted = -(-rows * sum(window.end - window.first for window in some) // max(1, seen))
    return list(windows) if wanted >= sum(window.end for window in windows) else spread(windows, wanted)


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
    """One pass in the snapshot that is open; `see` gets every batch of rows with both values."""

    def __init__(
        self, db: Database, target: Target, table: Table, extension: Extension, windows: Sequence[Window]
    ) -> None:
        self.db, self.target, self.table, self.windows = db, target, table, windows
        self.ext = quote(extension.schema)
        self.fixed = table.columns[target.vector].dimensions
        self.size = str(self.fixed) if self.fixed else f"{self.ext}.vector_dims({db.names['vector']})"
        self.found = Comparison()

    def run(self, groups: Groups, see: Callable[[Batch], None]) -> Comparison:
        with planned(self.db, "verifying"):
            for size in self._sizes():
                for batch in batches(
                    self.db, self.windows, size, fixed=self.fixed is not None, groups=groups, ext=self.ext
                ):
                    self.found.rows += len(batch)
                    self.found.equal += len(batch) - len(batch.differing) - len(batch.stale)
                    self._wrong("differs", batch.part, len(batch.differing), batch.differing)
                    self._wrong("stale", batch.part, len(batch.stale), batch.stale)
                    see(batch)
            for window in self.windows:
                self._others(window)
        return self.found

    def _sizes(self) -> list[int]:
        if self.fixed:
            return [self.fixed]
        found: set[int] = set()
        for window in self.windows:
            rows = window.part.at(self.db).rows(
                "SELECT DISTINCT octet_length({source}) FROM ONLY {table} WHERE {inside} AND {vector} IS NOT NULL",
                inside=_inside(window),
            )
            found |= {octets // 4 for (octets,) in rows if octets and dimensions.problem(octets, None) is None}
        return sorted(found)

    def _others(self, window: Window) -> None:
        at = window.part.at(self.db)
        stale = 0
        for octets, no_vector, rows in at.rows(OTHERS, inside=_inside(window), size=self.size):
            self.found.rows += rows
            if octets is None:
                self.found.without_source += rows
                self.found.sourceless += 0 if no_vector else rows
            elif not no_vector:
                stale += rows
            elif problem := dimensions.problem(octets, self.fixed):
                self.found.skipped[problem] += rows
            else:
                self._pending(window, octets // 4)
        if stale:
            tids = at.rows(STALE, inside=_inside(window), size=self.size, most=str(KEPT))
            self._wrong("stale", window.part, stale, [tid for (tid,) in tids])

    def _pending(self, window: Window, size: int) -> None:
        """Rows without a vector: only their values tell whether they can have one."""
        at = window.part.at(self.db)
        scan = Scan(size, LOOK_ROWS, window.first, window.end)
        while scan.more:
            rows = scan.read(at)
            scan.advance(rows.rows_read, rows.last_tid)
            if rows.rows_bad:
                self.found.skipped[NOT_FINITE] += rows.rows_bad
            if len(rows.good):
                tids = [codec.tid_text(tid) for tid in rows.good["tid"][:KEPT]]
                self._wrong("missing", window.part, len(rows.good), tids)

    def _wrong(self, kind: Kind, part: Part, rows: int, tids: Sequence[str]) -> None:
        if not rows:
            return
        wrong = self.found.wrong.setdefault(kind, Wrong())
        wrong.rows += rows
        if tids := list(tids[: KEPT - len(wrong.keys)]):
            key = ", ".join(f"CAST({quote(name)} AS text)" for name in self.table.key) or "CAST(ctid AS text)"
            found = part.at(self.db).rows(KEYS, {"tids": tids}, key=key)
            wrong.keys += [tuple(row) for row in found]


def can_look_again(table: Table, found: Comparison) -> bool:
    """Whether every row that is wrong can be found by its key."""
    return bool(table.key) and all(wrong.rows == len(wrong.keys) for wrong in found.wrong.values())


def look_again(db: Database, target: Target, table: Table, extension: Extension, found: Comparison) -> None:
    """Takes out of `found` what is right by now, or gone; in a transaction that sees what is new."""
    for wrong in found.wrong.values():
        still = [key for key in wrong.keys if not _right(db, table, extension, target.vector, key)]
        mended = len(wrong.keys) - len(still)
        wrong.rows -= mended
        wrong.keys = still
        found.looked_at_again += mended


def _right(db: Database, table: Table, extension: Extension, vector: str, key: Key) -> bool:
    condition = " AND ".join(f"{{column{i}}} = CAST(:key{i} AS {{type{i}}})" for i in range(len(key)))
    columns = {f"column{i}": quote(name) for i, name in enumerate(table.key)}
    types = {f"type{i}": table.columns[name].type for i, name in enumerate(table.key)}
    row: Any = db.run(
        AGAIN + condition,
        {f"key{i}": value for i, value in enumerate(key)},
        ext=quote(extension.schema),
        **columns,
        **types,
    ).one_or_none()
    if row is None or row[0] is None:
        return True  # gone, or without bytes that a vector could be compared with
    return _sent(bytes(row[0]), table.columns[vector].dimensions) == (row[1] if row[1] is None else bytes(row[1]))


def _sent(source: bytes, size: int | None) -> bytes | None:
    """What vector_send() gives for the vector of these bytes, or None where they can't be one (src/vector.c)."""
    if dimensions.problem(len(source), size):
        return None
    values = np.frombuffer(source, "<f4")
    if not np.isfinite(values).all():
        return None
    return struct.pack(">hh", len(values), 0) + values.view("<u4").astype(">u4").tobytes()


def _inside(window: Window) -> str:
    return f"ctid >= '({window.first},0)' AND ctid < '({window.end},0)'"


def shown(table: Table, key: Key) -> str:
    """As the log shows a row: (id=…, sector=…)."""
    return "(" + ", ".join(f"{name}={value}" for name, value in zip(table.key or ["ctid"], key, strict=True)) + ")"
