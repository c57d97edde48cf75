"""Chooses the queries of a measurement among the table's own rows, and gathers their true neighbours.

By the hash of their keys, so that two runs ask the same. The truth comes from the bytes, as OpenMemory's search in
memory has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .catalog import Extension, Table
from .database import Database
from .neighbours import Exact, Query
from .pairs import Batch, Groups
from .searching import text_of
from .target import Target, literal, quote

MOST_SECTORS = 50
USERS = 3  # of the largest, and as many of the smallest
QUERIES_A_USER = 5
ALL = "all sectors"

SIZES = """
SELECT CAST({group} AS text), count(*) FROM {table} WHERE {eligible} AND {group} IS NOT NULL
GROUP BY 1 ORDER BY 2 DESC, 1
"""
# by place and not by key, so that a table without one can be asked; values are fetched for the chosen rows only
CHOSEN = """
WITH om_chosen AS (
  SELECT tableoid AS om_part, ctid AS om_place, md5({key}) AS om_hash,
         row_number() OVER (PARTITION BY {group} ORDER BY md5({key})) AS om_number
  FROM {table} WHERE {eligible}{among})
SELECT t.{source}, {sector_number}, {user_number}
FROM om_chosen JOIN {table} AS t ON t.ctid = om_place AND t.tableoid = om_part
WHERE om_number <= :each ORDER BY om_number, om_hash
"""


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

    def see(self, batch: Batch) -> None:
        # bytes that are no vector stand beside one that is stale
        finite = np.isfinite(batch.values).all(axis=1)
        self.exact.add(batch.values[finite], batch.sectors[finite], batch.users[finite])


class Choice:
    """The rows to choose from: those that have a vector of `size` dimensions."""

    def __init__(self, db: Database, target: Target, table: Table, extension: Extension, size: int) -> None:
        self.db = db
        # in another table than OpenMemory's, columns of these names may be anything
        self.columns = {
            name: name if target.source == "v" and name in table.columns else None for name in ("sector", "user_id")
        }
        key = ", ".join(quote(name) for name in table.key) or "ctid"
        eligible = db.sql("{vector} IS NOT NULL AND octet_length({source}) = {octets}", octets=str(4 * size))
        if table.columns[target.vector].dimensions is None:
            eligible += db.sql(" AND {ext}.vector_dims({vector}) = {size}", size=str(size), **extension.names())
        self.names = {"key": f"concat_ws('|', {key})", "eligible": eligible}

    def ask(self, number: int, k: int, *, of_users: bool = True) -> Asked:
        """About `number` queries, as many of each sector, and besides some of the largest and the smallest users."""
        sectors, users = self._sizes("sector")[:MOST_SECTORS], self._sizes("user_id") if of_users else []
        some = min(USERS, len(users) // 2)
        largest, smallest = users[:some], users[len(users) - some :]
        sector, user = self.columns["sector"] if sectors else None, self.columns["user_id"]
        groups = Groups(sector, user, tuple(sectors), tuple(largest + smallest))
        each = -(-number // max(1, len(sectors)))
        named = []
        for query in self._chosen(groups, sector, sectors, each):
            of = (f"sector {sectors[query.sector - 1]}",) if query.sector else ()
            named.append(Named(Query(query.vector, query.sector), (ALL, *of)))
        if user and users:
            for query in self._chosen(groups, user, largest + smallest, QUERIES_A_USER):
                kind = "largest users" if query.user <= len(largest) else "smallest users"
                named.append(Named(query, (kind,)))
        return Asked(named, groups, k)

    def _sizes(self, column: str) -> list[str]:
        """The groups of that column, the largest first."""
        if self.columns[column] is None:
            return []
        return [name for name, _ in self.db.rows(SIZES, group=quote(column), **self.names)]

    def _chosen(self, groups: Groups, column: str | None, among: Sequence[str], each: int) -> list[Query]:
        """So many of each group, each with its own sector and user."""
        group = quote(column) if column else "CAST(NULL AS text)"
        condition = ""
        if column:
            array = "ARRAY[" + ", ".join(map(literal, among)) + "]"
            condition = f" AND CAST({group} AS text) = ANY (CAST({array} AS text[]))"
        names: Mapping[str, str] = {"sector_number": groups.sector_number, "user_number": groups.user_number}
        rows = self.db.rows(CHOSEN, {"each": each}, group=group, among=condition, **names, **self.names)
        queries = [Query(np.frombuffer(bytes(source), "<f4"), sector, user) for source, sector, user in rows]
        # nothing is near to zeros, and a stale vector's bytes may hold anything
        return [query for query in queries if query.vector.any() and np.isfinite(query.vector).all()]
