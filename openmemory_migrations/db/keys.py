"""Rows by name, for the log: their primary key, or their place where there is none; never what else they hold."""

from __future__ import annotations

from collections.abc import Sequence

from ..sql import SQL, Fragment, fill, joined
from .catalog import Table
from .database import Database

SHOWN_KEYS = 5
PLACE = "pg_catalog.concat('ctid=', ctid)"
AT = "ctid = ANY (CAST(CAST(:values AS text[]) AS tid[]))"

SUM = "pg_catalog.encode(pg_catalog.sha256({it}), 'hex')"  # of bytes, to be compared with those of another version


def keys_where(
    db: Database,
    table: Table,
    condition: str,
    values: Sequence[int] | Sequence[str] = (),
    most: int = SHOWN_KEYS,
    **names: Fragment,
) -> list[str]:
    """The first few rows that meet `condition`, in which `:values` are bound."""
    columns = [
        fill("pg_catalog.concat({what|literal}, {name|ident})", {"what": name + "=", "name": name})
        for name in table.key
    ]
    shown = fill("pg_catalog.concat_ws(', ', {columns})", {"columns": joined(", ", columns)}) if columns else SQL(PLACE)
    rows = db.rows(
        "SELECT {shown} FROM {table} WHERE " + condition + " LIMIT {most}",
        {"values": list(values)} if ":values" in condition else {},
        shown=shown,
        most=most,
        **names,
    )
    return [f"({row[0]})" for row in rows]


def keys_at(db: Database, table: Table, tids: Sequence[str]) -> list[str]:
    """Those at these places of one table that holds rows; by the place itself where a row has gone from there."""
    found = keys_where(db, table, AT, tids, most=len(tids))
    return found if len(found) == len(tids) else [f"(ctid={tid})" for tid in tids]
