"""What the tests of the sync trigger share: a table as the first revision leaves it, and one row of it."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from demo.openmemory import TABLE
from tests.support.commands import alembic
from tests.support.databases import Databases
from tests.support.openmemory import Database, create_table, random_rows
from tests.support.states import EXPAND

DIM = 8
FIRST, SECOND, THIRD = (row.v or b"" for row in random_rows(3, DIM))
KEY = ("00000000-0000-4000-8000-000000000001", "semantic")
WHERE = f"WHERE id = '{KEY[0]}' AND sector = '{KEY[1]}'"
INSERT = f"INSERT INTO {TABLE} (id, sector, user_id, v, dim) VALUES ('{KEY[0]}', '{KEY[1]}', 'user', %s, {DIM})"
UPDATE = f"UPDATE {TABLE} SET v = %s {WHERE}"
REPAIR = f"UPDATE {TABLE} SET v = v {WHERE}"


def bits(*patterns: int) -> bytes:
    """The bytes of float32s that have these bits."""
    return struct.pack(f"<{len(patterns)}I", *patterns)


FINITE = {
    "zero": 0,
    "minus zero": 0x80000000,
    "least denormal": 1,
    "least denormal, negative": 0x80000001,
    "greatest denormal": 0x007FFFFF,
    "least normal": 0x00800000,
    "greatest": 0x7F7FFFFF,
    "greatest, negative": 0xFF7FFFFF,
}
NOT_FINITE = {
    "Inf": 0x7F800000,
    "-Inf": 0xFF800000,
    "NaN": 0x7FC00000,
    "-NaN": 0xFFC00000,
    "signalling NaN": 0x7F800001,
    "NaN of all ones": 0xFFFFFFFF,
}
ODD, WITH_NAN = bits(*FINITE.values()), FIRST[4:] + bits(NOT_FINITE["NaN"])


def expanded(database: Database) -> None:
    create_table(database)
    alembic(database, "upgrade", EXPAND, env={"OM_VEC_DIM": str(DIM)})


@pytest.fixture
def table(databases: Databases) -> Iterator[Database]:
    """The table as the first revision leaves it, empty, its column of eight dimensions."""
    with databases.copy(expanded) as database:
        yield database


def stored(database: Database) -> tuple[bytes | None, bytes | None]:
    """`v` of the row with KEY, and what pgvector sends of its v_vector."""
    ((v, sent),) = database.rows(f"SELECT v, vector_send(v_vector) FROM {TABLE} {WHERE}")
    return v if v is None else bytes(v), sent if sent is None else bytes(sent)
