"""Chooses the queries of a measurement among the table's own rows, and gathers their true neighbours.

By the hash of their keys, so that two runs ask the same. The truth comes from the bytes, as OpenMemory's search in
memory has it, and from the vectors themselves where there are no bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..db.context import VectorContext
from ..encoding.stored import STORED
from ..sql import SQL, blocks, fill, joined, quote
from .neighbours import Exact, Query
from .search import text_of
from .stream import Batch, Groups, has_bytes, with_values

BLOCKS = blocks("verify")

MOST_SECTORS = 50
USERS = 3  # of the largest, and as many of the smallest
QUERIES_A_USER = 5
ALL = "all sectors"

LARGEST, SMALLEST = "2 DESC, 1", "2, 1 DESC"  # of as many the ones first that are last otherwise
SPARE = 5  # times as many as are wanted, below the bound


@dataclass(frozen=True)
class Named:
    """A query with the names of the groups that it stands for in the result."""

    query: Query
    names: tuple[str, ...]


class Asked:
    """The queries of one measurement, and their true neighbours while they are being gathered."""

    def __init__(self, named: Sequence[Named], groups: Groups, k: int) -> None:
        self.groups, self.k = groups, k
        self.queries = [one.query for one in named]
        self.texts = [text_of(query) for query in self.queries]
        self.names: dict[str, list[int]] = {}
        for number, one in enumerate(named):
            for name in one.names:
                self.names.setdefault(name, []).append(number)
        self.exact = Exact(self.queries, k + 1)  # a row's own is among them
        self.rows = 0  # that have passed by

    def see(self, batch: Batch) -> None:
        self.rows += len(batch)
        # bytes that are no vector stand beside one that is stale
        finite = np.isfinite(batch.values).all(axis=1)
        self.exact.add(batch.values[finite], batch.sectors[finite], batch.users[finite])


class Choice:
    """The rows to choose from: those that have a vector of `size` dimensions."""

    def __init__(self, ctx: VectorContext, size: int) -> None:
        self.db = ctx.db
        # in another table than OpenMemory's, columns of these names may be anything
        self.columns = {
            name: name if ctx.target.source == "v" and name in ctx.table.columns else None
            for name in ("sector", "user_id")
        }
        key = joined(", ", map(quote, ctx.table.key or ())) or SQL("ctid")
        self.bytes = has_bytes(ctx.table, ctx.target)
        value = (
            ctx.db.sql("t.{source}")
            if self.bytes
            else ctx.db.sql("{ext}.vector_send(t.{vector})", **ctx.extension.names())
        )
        eligible = with_values(ctx, size)
        self.names = {
            "hash": fill("pg_catalog.hashtextextended(concat_ws('|', {key}) COLLATE \"C\", 0)", {"key": key}),
            "eligible": eligible,
            "value": value,
        }

    def ask(self, number: int, k: int, *, of_users: bool = True) -> Asked:
        """About `number` queries, as many of each sector, and besides some of the largest and the smallest users."""
        sectors = self._sizes("sector", LARGEST, MOST_SECTORS)
        # whoever has one row has nothing that could be found beside it
        largest = self._sizes("user_id", LARGEST, USERS, least=1) if of_users else {}
        few = self._sizes("user_id", SMALLEST, USERS, least=1) if of_users else {}
        smallest = {name: rows for name, rows in few.items() if name not in largest}
        sector, user = self.columns["sector"] if sectors else None, self.columns["user_id"] if largest else None
        groups = Groups(sector, user, tuple(sectors), (*largest, *smallest))
        named = []
        for query in self._chosen(groups, sector, sectors, -(-number // max(1, len(sectors)))):
            of = (f"sector {groups.sectors[query.sector - 1]}",) if query.sector else ()
            named.append(Named(Query(query.vector, query.sector), (ALL, *of)))
        if user:
            for query in self._chosen(groups, user, largest | smallest, QUERIES_A_USER):
                kind = "largest users" if query.user <= len(largest) else "smallest users"
                named.append(Named(query, (kind,)))
        return Asked(named, groups, k)

    def _sizes(self, column: str, order: str, most: int, least: int = 0) -> dict[str, int]:
        """The rows of the groups of that column, the largest or the smallest groups first."""
        if self.columns[column] is None:
            return {}
        found = self.db.rows(BLOCKS.sizes, group=quote(column), order=SQL(order), most=most, least=least, **self.names)
        return {str(name): int(rows) for name, rows in found}

    def _chosen(self, groups: Groups, column: str | None, among: Mapping[str, int], each: int) -> list[Query]:
        """So many of each group, each with its own sector and user; `among` are the groups' rows."""
        names = {"sector_number": groups.sector_number, "user_number": groups.user_number}
        if column is None:
            rows = int(self.db.value("SELECT count(*) FROM {table} WHERE {eligible}", **self.names))
            names |= {"group": SQL("CAST(NULL AS text)"), "bound": _bound(each, rows)}
        else:
            number = groups.sector_number if column == groups.sector_column else groups.user_number
            bounds = joined(", ", (_bound(each, rows) for rows in among.values()))
            # NULL, and so no row, where the group is none of these
            bound = "(CAST(ARRAY[{bounds}] AS bigint[]))[{number}]"
            names |= {"group": quote(column), "bound": fill(bound, {"bounds": bounds, "number": number})}
        found = self.db.rows(BLOCKS.chosen, {"each": each}, **names, **self.names)
        # what vector_send() gives begins with int16 dimensions and int16 zero
        at, kind = (0, STORED.number) if self.bytes else (4, ">f4")
        queries = [
            Query(np.frombuffer(bytes(value), kind, offset=at).astype("<f4"), sector, user)
            for value, sector, user in found
        ]
        # nothing is near to zeros, and a stale vector's bytes may hold anything
        return [query for query in queries if query.vector.any() and np.isfinite(query.vector).all()]


def _bound(wanted: int, rows: int) -> SQL:
    """Below it are about `SPARE` times as many hashes, of `rows`, as are wanted; all where there are no more."""
    share = SPARE * (wanted + 1) / max(1, rows)
    return SQL(f"CAST('{min(int(share * 2**64), 2**64 - 1) - 2**63}' AS bigint)")
