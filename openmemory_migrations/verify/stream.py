"""Streams both columns of a table, rows of one length at a time, and compares them bit by bit.

Inside the caller's snapshot, in physical order: each row is read once, and both of its values at the same time. Of a
table without bytes, whose vectors never were any or have been cut over, it streams the vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..backfill.reader import Scan, Tid, Unreadable, Window
from ..db.catalog import Table
from ..db.context import VectorContext
from ..db.database import Database
from ..db.partitions import Part
from ..encoding import codec
from ..encoding.stored import STORED
from ..sql import SQL, fill, joined, literal
from ..target import Target

BATCH_ROWS = 4000

ROWS = """
 FROM ONLY {table} WHERE ctid > '({page},{item})' AND ctid < '({end},0)' AND {with_values} LIMIT {rows}
"""
READ = "SELECT ctid, {sector_number}, {user_number}, {values}" + ROWS
PLACE = "SELECT CAST(ctid AS text)" + ROWS


@dataclass(frozen=True)
class Groups:
    """The sectors and users that are told apart: their columns (None where the table has none) and their names."""

    sector_column: str | None = None
    user_column: str | None = None
    sectors: tuple[str, ...] = ()
    users: tuple[str, ...] = ()

    @property
    def sector_number(self) -> SQL:
        return _number(self.sector_column, self.sectors)

    @property
    def user_number(self) -> SQL:
        return _number(self.user_column, self.users)


@dataclass(frozen=True)
class Batch:
    """`values` (rows, dimensions) float32 from the bytes, or from the vectors where the table has no bytes.

    `differing` are the places of rows whose vector is another, `stale` of those whose bytes can be none any more.
    """

    part: Part
    pages: int  # that are done with, of all windows
    values: npt.NDArray[np.float32]
    sectors: npt.NDArray[np.int64]
    users: npt.NDArray[np.int64]
    differing: list[str]
    stale: list[str]

    def __len__(self) -> int:
        return len(self.values)


def has_bytes(table: Table, target: Target) -> bool:
    """Whether there is a source beside the vectors: not in a native table, nor after a cutover."""
    source = table.columns.get(target.source)
    return source is not None and not source.is_vector


def with_values(ctx: VectorContext, size: int) -> SQL:
    """SQL for the rows that have a vector of `size` dimensions, and bytes of as many where the table has any."""
    conditions = [ctx.db.sql("{vector} IS NOT NULL")]
    if has_bytes(ctx.table, ctx.target):
        conditions.append(ctx.db.sql(STORED.of(size)))
    if ctx.table.columns[ctx.target.vector].dimensions is None:
        conditions.append(ctx.db.sql("{ext}.vector_dims({vector}) = {size}", size=size, **ctx.extension.names()))
    return joined(" AND ", conditions)


def refuse(part: Part, unreadable: Unreadable) -> None:
    """Where a row that is passed by would be missed."""
    for _, error in unreadable:
        raise error


def batches(
    ctx: VectorContext,
    windows: Sequence[Window],
    size: int,
    groups: Groups,
    pass_by: Callable[[Part, Unreadable], None] = refuse,
) -> Iterator[Batch]:
    """All rows `with_values`; without bytes no row is differing. `pass_by` gets those that the server can't read."""
    both = has_bytes(ctx.table, ctx.target)
    names = {
        "sector_number": groups.sector_number,
        "user_number": groups.user_number,
        "values": ctx.db.sql("{source}, {vector}" if both else "{vector}"),
        "with_values": with_values(ctx, size),
    }
    values = [codec.bytes_column("source", size)] * both + [codec.vector_column("vector", size)]
    columns = [("tid", "V6"), ("sector", ">i4"), ("user", ">i4"), *values]
    before = 0
    for window in windows:
        at = window.part.at(ctx.db)
        scan = Scan(size, BATCH_ROWS, window.first, window.end)
        while scan.more:

            def read(at: Database = at, scan: Scan = scan) -> tuple[npt.NDArray[np.void], int, Tid | None]:
                rows = codec.records(at.copy_out(READ, **scan.names, **names), f"{size} dimensions", *columns)
                return rows, len(rows), codec.tid_of(rows["tid"][-1]) if len(rows) else None

            rows, unreadable = scan.take_by(at, read, PLACE, with_values=names["with_values"])
            pass_by(window.part, unreadable)
            if len(rows):
                vectors = rows["vector"]["elements"]
                source = rows["source"] if both else vectors
                wrong = np.flatnonzero((source != vectors).any(axis=1))
                finite = np.isfinite(codec.numbers(source[wrong])).all(axis=1)
                yield Batch(
                    window.part,
                    before + scan.position[0] - window.first,
                    codec.numbers(source),
                    rows["sector"].astype(np.int64),
                    rows["user"].astype(np.int64),
                    [codec.tid_text(tid) for tid in rows["tid"][wrong[finite]]],
                    [codec.tid_text(tid) for tid in rows["tid"][wrong[~finite]]],
                )
        before += window.end - window.first


def _number(column: str | None, names: Sequence[str]) -> SQL:
    """SQL for the number of a row's group, from 1; 0 where it is in none of them."""
    if column is None or not names:
        return SQL("0")
    # a COPY takes no parameters
    return fill(
        "coalesce(array_position(CAST(ARRAY[{names}] AS text[]), CAST({column|ident} AS text)), 0)",
        {"names": joined(", ", map(literal, names)), "column": column},
    )
