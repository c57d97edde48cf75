"""Streams both columns of a table, rows of one length at a time, and compares them bit by bit.

Inside the caller's snapshot, in physical order: each row is read once, and both of its values at the same time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from . import codec
from .database import Database
from .partitions import Part
from .reading import Scan, Window
from .target import literal, quote

BATCH_ROWS = 4000

READ = """
SELECT ctid, {sector_number}, {user_number}, {source}, {vector} FROM ONLY {table}
WHERE ctid > '({page},{item})' AND ctid < '({end},0)'
  AND {vector} IS NOT NULL AND octet_length({source}) = {octets}{sized}
LIMIT {rows}
"""


@dataclass(frozen=True)
class Groups:
    """The sectors and users that are told apart: their columns (None where the table has none) and their names."""

    sector_column: str | None = None
    user_column: str | None = None
    sectors: tuple[str, ...] = ()
    users: tuple[str, ...] = ()

    @property
    def sector_number(self) -> str:
        return _number(self.sector_column, self.sectors)

    @property
    def user_number(self) -> str:
        return _number(self.user_column, self.users)


@dataclass(frozen=True)
class Batch:
    """`values` (rows, dimensions) float32 from the bytes.

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


def batches(
    db: Database, windows: Sequence[Window], dimensions: int, *, fixed: bool, groups: Groups, ext: str
) -> Iterator[Batch]:
    """All rows that have both values, of `dimensions` each; a column of `fixed` dimensions needn't be asked."""
    sized = "" if fixed else f" AND {ext}.vector_dims({db.names['vector']}) = {dimensions}"
    names = {"sector_number": groups.sector_number, "user_number": groups.user_number, "sized": sized}
    before = 0
    for window in windows:
        at = window.part.at(db)
        scan = Scan(dimensions, BATCH_ROWS, window.first, window.end)
        while scan.more:
            rows = codec.records(
                at.copy_out(READ, **scan.names, **names),
                f"{dimensions} dimensions",
                ("tid", "V6"),
                ("sector", ">i4"),
                ("user", ">i4"),
                ("source", "<u4", (dimensions,)),
                ("vector", np.dtype([("size", ">i2"), ("unused", ">i2"), ("elements", ">u4", (dimensions,))])),
            )
            scan.advance(len(rows), codec.tid_of(rows["tid"][-1]) if len(rows) else None)
            if len(rows):
                # as integers: NaN equals nothing, and -0 is not 0
                wrong = rows[(rows["source"] != rows["vector"]["elements"]).any(axis=1)]
                finite = np.isfinite(wrong["source"].view("<f4")).all(axis=1)
                yield Batch(
                    window.part,
                    before + scan.position[0] - window.first,
                    rows["source"].view("<f4"),
                    rows["sector"].astype(np.int64),
                    rows["user"].astype(np.int64),
                    [codec.tid_text(tid) for tid in wrong["tid"][finite]],
                    [codec.tid_text(tid) for tid in wrong["tid"][~finite]],
                )
        before += window.end - window.first


def _number(column: str | None, names: Sequence[str]) -> str:
    """SQL for the number of a row's group, from 1; 0 where it is in none of them."""
    if column is None or not names:
        return "0"
    array = "ARRAY[" + ", ".join(literal(name) for name in names) + "]"
    return f"coalesce(array_position(CAST({array} AS text[]), CAST({quote(column)} AS text)), 0)"
