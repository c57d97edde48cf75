"""The checks that other tests lean on: they do find what they look for."""

from __future__ import annotations

import struct
import uuid

import numpy as np
import pytest

from tests.support.openmemory import (
    Database,
    Row,
    checksum,
    create_table,
    expected,
    load,
    mismatches,
    pack,
    random_rows,
    real_rows,
)

NAN, INF = float("nan"), float("inf")


def test_expected_is_what_the_server_sends(database: Database) -> None:
    database.run("CREATE EXTENSION vector")
    v = random_rows(1, 16)[0].v
    assert v is not None
    literal = str(np.frombuffer(v, "<f4").tolist())

    sent = database.value("SELECT vector_send(%s::vector)", literal)

    assert bytes(sent) == expected(v) == expected(v, 16)


@pytest.mark.parametrize("v", [None, b"", b"123", pack([1, NAN]), pack([INF]), pack([0.0]) * 16_001])
def test_nothing_is_expected_of_what_is_no_vector(v: bytes | None) -> None:
    assert expected(v) is None


def test_nothing_is_expected_of_another_dimension() -> None:
    assert expected(pack([1, 2]), 2) == struct.pack(">HHff", 2, 0, 1, 2)
    assert expected(pack([1, 2]), 3) is None


@pytest.mark.parametrize("schema", ["public", 'Om "Test"'])
def test_mismatches_are_found(database: Database, schema: str) -> None:
    database.run("CREATE SCHEMA extensions; CREATE EXTENSION vector SCHEMA extensions")
    create_table(database, "select", schema)
    good, zero, stale, missing, extra = random_rows(5, 3)
    good, zero = good._replace(v=pack([1, 2, 3])), zero._replace(v=pack([0, -0.0, 1e-45]))
    load(database, [good, zero, stale, missing, extra._replace(v=pack([1, NAN, 2]))], "select", schema)
    quoted = '"public"."select"' if schema == "public" else '"Om ""Test"""."select"'
    database.run(f"ALTER TABLE {quoted} ADD v_vector extensions.vector(3)")
    for row, literal in [(good, "[1,2,3]"), (zero, "[0,-0,1e-45]"), (stale, "[1,2,3]"), (extra, "[1,0,2]")]:
        database.run(f"UPDATE {quoted} SET v_vector = %s WHERE id = %s", literal, row.id)

    found = mismatches(database, "select", schema)

    assert sorted(found) == sorted((row.id, row.sector) for row in [stale, missing, extra])


def test_checksum_sees_one_bit_a_null_and_a_missing_row(database: Database) -> None:
    create_table(database)
    load(
        database,
        [Row(str(uuid.UUID(int=i)), "semantic", None, b"", 1) for i in range(3)],
    )
    seen = [checksum(database)]
    for change in ["v = '\\x00'", "v = '\\x01'", "v = NULL"]:
        database.run(f"UPDATE openmemory_vectors SET {change} WHERE id::text LIKE '%1'")
        seen.append(checksum(database))
    database.run("DELETE FROM openmemory_vectors WHERE v IS NULL")
    seen.append(checksum(database))

    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("user_id", [True, False])
def test_rows_arrive_as_they_were(database: Database, user_id: bool) -> None:
    create_table(database, user_id=user_id)
    rows = [
        *random_rows(2500, 8),
        Row(str(uuid.UUID(int=0)), "tab\tslash\\n", None, None, 0),
    ]
    load(database, rows, user_id=user_id)

    columns = "id, sector, user_id, v, dim" if user_id else "id, sector, NULL, v, dim"
    stored = database.rows(f"SELECT {columns} FROM openmemory_vectors")

    arrived = {Row(id, sector, user, v and bytes(v), dim) for id, sector, user, v, dim in stored}
    assert arrived == {row if user_id else row._replace(user_id=None) for row in rows}


@pytest.mark.parametrize(("dim", "count"), [(256, 413), (1536, 332)])
def test_real_rows_are_whole(dim: int, count: int) -> None:
    rows = real_rows(dim)

    assert len(rows) == len({(row.id, row.sector) for row in rows}) == count
    assert len({row.id for row in rows}) < count
    assert all(expected(row.v, dim) for row in rows)


def test_random_rows_hold_the_odd_values_and_differ_by_seed() -> None:
    values = np.frombuffer(b"".join(row.v or b"" for row in random_rows(100, 8)), "<u4")

    assert {0x00000000, 0x80000000, 0x00000001, 0x80000001} <= set(values.tolist())
    assert random_rows(1, 8) == random_rows(1, 8) != random_rows(1, 8, seed=1)
