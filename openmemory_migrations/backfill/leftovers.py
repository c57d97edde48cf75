"""What a backfill leaves: the rows that have bytes and no vector, and why."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from sqlalchemy.exc import DBAPIError

from ..db import partitions
from ..db.catalog import Table
from ..db.context import TableContext
from ..db.database import Database
from ..db.keys import AT, SHOWN_KEYS, keys_at, keys_where
from ..encoding.stored import STORED
from ..sql import Fragment, blocks
from ..target import Target
from .passes import is_a_rows
from .reader import Scan, by_tid, pages_of

BLOCKS = blocks("backfill")

LOOK_ROWS = 1000  # at once, where nothing is written
NOT_FINITE = "NaN or infinite values"

DIFFERS = STORED.not_of("CAST(dim AS bigint)")
NOT_CONVERTED = f"{STORED.of('{size}')} AND {STORED.not_finite}"


@dataclass(frozen=True)
class Counted:
    """Pending rows of one length: those that can be vectors, those that can't, and the first few keys of the latter.

    A row that the server can't read is among the first, since nothing says that it is bad, and named by itself.
    """

    good: int
    bad: int
    keys: list[str]
    unreadable: tuple[str, ...] = ()


@dataclass(frozen=True)
class Leftovers:
    """Rows with bytes and no vector, seen in one snapshot: `reasons` counts those that can't be converted."""

    convertible: int
    reasons: Counter[str]
    examples: dict[str, list[str]]  # reason -> the first few keys
    dim_differs: int  # rows whose column `dim` says something else than the bytes
    in_the_way: str | None = None  # what keeps rows, beside those, from being converted that could be
    kept: int = 0  # so many

    @property
    def skipped(self) -> int:
        return sum(self.reasons.values())

    def summary(self) -> str:
        return "; ".join(
            f"{reason}: {rows:,} (such as {', '.join(self.examples[reason])})"
            if self.examples.get(reason)
            # a row can change its place while we look
            else f"{reason}: {rows:,}"
            for reason, rows in self.reasons.most_common()
        )


def leftovers(ctx: TableContext) -> Leftovers:
    """Looks at every row without a vector, in one snapshot: what moves meanwhile is neither missed nor seen twice."""
    db, table = ctx.db, ctx.table
    fixed = table.columns[ctx.target.vector].dimensions
    reasons: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    convertible = 0
    with db.transaction(snapshot=True):
        lengths: dict[str, list[int]] = {}
        # one pass over the table for all that can be counted: it may be larger than the server's memory
        found = by_length(db, db.sql(DIFFERS) if has_dim(ctx.target, table) else False)
        differs = sum(other for _, _, other in found)
        pending = sorted((octets, number) for octets, number, _ in found if octets is not None)
        for octets, number in pending:
            reason = STORED.problem(octets, fixed)
            if reason:
                reasons[reason] += number
                lengths.setdefault(reason, []).append(octets)
        for reason, values in lengths.items():
            examples[reason] = first_keys(db, table, f"{STORED.length} = ANY (:values)", values)
        for octets, _ in pending:
            if STORED.problem(octets, fixed) is None:
                rows = _looked_at(db, table, STORED.dimensions(octets))
                convertible += rows.good
                if rows.bad:
                    reasons[NOT_FINITE] += rows.bad
                    examples.setdefault(NOT_FINITE, []).extend(rows.keys)
    return Leftovers(convertible, reasons, examples, differs)


def by_length(db: Database, differs: Fragment = False) -> Sequence[tuple[int | None, int, int]]:
    """The rows with bytes: the octets of those without a vector, None for the others, how many, how many `differs`."""
    return db.rows(BLOCKS.count_without, length=db.sql(STORED.length), differs=differs)


def by_reading(db: Database, table: Table, size: int, enough: float = math.inf) -> Counted:
    """Reads the values here: needs no function in the database. No more than `enough`, once one of them is good."""
    parts = partitions.leaves(db, table.oid)
    db.set_local(by_tid("looking at what is left", "0"))
    found = Counted(0, 0, [])
    for part in parts:
        at = part.at(db)
        found = read(at, table, Scan(size, LOOK_ROWS, 0, pages_of(at)), found, enough=enough)
    return found


def read(
    db: Database,
    table: Table,
    scan: Scan,
    found: Counted,
    batch: Callable[[], AbstractContextManager[object]] = nullcontext,
    enough: float = math.inf,
) -> Counted:
    """What `scan` finds in one table that holds rows, added to what was `found`; each batch is read inside `batch`."""
    good, bad, keys, unread = found.good, found.bad, [*found.keys], found.unreadable
    tids: list[str] = []
    while scan.more and not (good and good + bad >= enough):
        with batch():
            rows, unreadable = scan.take(db)
            if unreadable:
                unread += tuple(keys_at(db, table, [place for place, _ in unreadable]))
        good += len(rows.good) + len(unreadable)
        bad += rows.rows_bad
        tids += rows.bad_tids[: SHOWN_KEYS - len(keys) - len(tids)]
    if tids:
        with batch():
            keys += first_keys(db, table, AT, tids)
    return Counted(good, bad, keys, unread)


def _looked_at(db: Database, table: Table, size: int) -> Counted:
    """The values are looked at by the server: only numbers and keys travel."""
    names = {"size": size}
    try:
        with db.attempt():
            ((all_rows, bad),) = db.rows(
                "SELECT count(*), count(*) FILTER (WHERE " + NOT_CONVERTED + ") FROM {table}"
                " WHERE " + STORED.pending("{size}"),
                **names,
            )
    except DBAPIError as error:
        if not is_a_rows(error):
            raise
        return by_reading(db, table, size)  # past the row that can't be read
    return Counted(all_rows - bad, bad, first_keys(db, table, NOT_CONVERTED, [], **names) if bad else [])


def has_dim(target: Target, table: Table) -> bool:
    dim = table.columns.get("dim")
    return target.source == "v" and dim is not None and dim.type in ("smallint", "integer", "bigint")


def first_keys(
    db: Database, table: Table, condition: str, values: list[int] | list[str], **names: Fragment
) -> list[str]:
    """The first few pending rows that meet `condition`."""
    return keys_where(db, table, "{vector} IS NULL AND " + condition, values, SHOWN_KEYS, **names)
