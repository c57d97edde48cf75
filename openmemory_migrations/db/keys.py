"""Rows by name, for the log: their primary key, or their place where there is none; never what else they hold."""

from __future__ import annotations

from collections.abc import Sequence

from ..target import literal, quote
from .catalog import Table
from .database import Database

SHOWN_KEYS = 5
AT = "ctid = ANY (CAST(CAST(:values AS text[]) AS tid[]))"
# the newest version of each row that was at one of these places when this transaction had written it
NEWEST = """(SELECT w.tid, pg_catalog.currtid2(CAST(:table AS text), w.tid) AS newest
 FROM unnest(CAST(CAST(:values AS text[]) AS tid[])) AS w (tid) OFFSET 0) AS w"""

SUM = "pg_catalog.encode(pg_catalog.sha256({it}), 'hex')"  # of bytes, to be compared with those of another version


def keys_where(
    db: Database,
    table: Table,
    condition: str,
    values: Sequence[int] | Sequence[str] = (),
    most: int = SHOWN_KEYS,
    **names: str,
) -> list[str]:
    """The first few rows that meet `condition`, in which `:values` are bound."""
    columns = [f"concat({literal(name + '=')}, {quote(name)})" for name in table.key]
    shown = f"concat_ws(', ', {', '.join(columns)})" if columns else "concat('ctid=', ctid)"
    rows = db.rows(
        "SELECT {shown} FROM {table} WHERE " + condition + " LIMIT {most}",
        {"values": list(values)} if ":values" in condition else {},
        shown=shown,
        most=str(most),
        **names,
    )
    return [f"({row[0]})" for row in rows]


def keys_at(db: Database, table: Table, tids: Sequence[str]) -> list[str]:
    """Those at these places of one table that holds rows; by the place itself where a row has gone from there."""
    found = keys_where(db, table, AT, tids, most=len(tids))
    return found if len(found) == len(tids) else [f"(ctid={tid})" for tid in tids]
