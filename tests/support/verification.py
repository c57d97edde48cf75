"""What the tests of `verify` share: the command, tables that are migrated already, and ways to make rows wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

from demo.openmemory import TABLE
from tests.support.commands import NOTHING, om
from tests.support.databases import Databases
from tests.support.openmemory import Database, Row, create_table, load, random_rows

ROWS, DIM = random_rows(5000, 16), 16
UNSEARCHED = ("--queries", "0")


def verify(database: Database, code: int, *args: str, env: Mapping[str, str] = NOTHING) -> dict[str, Any]:
    done = om(database, "verify", "--json", *args, env=env)
    assert done.returncode == code, done.log
    assert "Traceback" not in done.log
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["fine"] == (code == 0)
    return found


def compared(
    database: Database, code: int, *args: str, env: Mapping[str, str] = NOTHING
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """What comes out of the comparison alone, and of the wrong rows the keys, sorted."""
    found = verify(database, code, *UNSEARCHED, *args, env=env)["comparison"]
    assert all(one["rows"] == len(one["keys"]) for one in found["wrong"])
    return found, {one["kind"]: sorted(one["keys"]) for one in found["wrong"]}


def key(row: Row) -> str:
    return f"(id={row.id}, sector={row.sector})"


def keys(*rows: Row) -> list[str]:
    return sorted(map(key, rows))


def migrated(database: Database) -> None:
    create_table(database)
    load(database, ROWS)
    assert om(database, "upgrade").returncode == 0


@pytest.fixture
def table(databases: Databases) -> Iterator[Database]:
    """ROWS, all of them converted, with trigger and index."""
    with databases.copy(migrated) as database:
        yield database


@contextmanager
def behind_its_back(database: Database, table: str = TABLE) -> Iterator[None]:
    """Without the trigger: what is written to `v` isn't followed."""
    database.run(f"ALTER TABLE {table} DISABLE TRIGGER USER")
    yield
    database.run(f"ALTER TABLE {table} ENABLE TRIGGER USER")


def set_v(database: Database, row: Row, v: bytes | None) -> None:
    database.run(f"UPDATE {TABLE} SET v = %s WHERE id = %s AND sector = %s", v, row.id, row.sector)


def forget(database: Database, *rows: Row) -> None:
    """Takes the rows' vectors away; without `v` among the columns that are set the trigger keeps out of it."""
    for row in rows:
        database.run(f"UPDATE {TABLE} SET v_vector = NULL WHERE id = %s AND sector = %s", row.id, row.sector)


def set_both(database: Database, row: Row, v: bytes, vector: bytes) -> None:
    """Gives the row a vector of exactly these bits, and other bytes."""
    set_v(database, row, vector)
    with behind_its_back(database):
        set_v(database, row, v)
