"""The sync trigger: whatever is written, and however, v_vector follows v to the bit, and no write fails for it."""

from __future__ import annotations

import io
import itertools
import struct
import uuid
from collections.abc import Callable
from contextlib import closing

import hypothesis
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import strategies as st
from psycopg2.extensions import cursor as Cursor

from demo.openmemory import TABLE
from tests.support.commands import alembic
from tests.support.openmemory import Database, Row, create_table, expected, load, mismatches, pack, random_rows
from tests.support.sessions import converted
from tests.support.states import EXPAND
from tests.support.sync_trigger import (
    DIM,
    FINITE,
    FIRST,
    INSERT,
    KEY,
    NOT_FINITE,
    ODD,
    REPAIR,
    SECOND,
    THIRD,
    UPDATE,
    WHERE,
    WITH_NAN,
    bits,
    stored,
    table,
)
from tests.support.writers import UPSERT

__all__ = ["table"]  # a fixture

BAD = {
    "NULL": None,
    "empty": b"",
    "one byte": b"\x01",
    "one byte less": FIRST[:-1],
    "one byte more": FIRST + b"\x01",
    "one dimension less": FIRST[:-4],
    "one dimension more": FIRST + FIRST[:4],
    "twice the dimensions": FIRST + SECOND,
    "16,001 dimensions": pack([1.0]) * 16_001,
    **{f"{name} first": bits(pattern) + FIRST[4:] for name, pattern in NOT_FINITE.items()},
    **{f"{name} last": FIRST[:-4] + bits(pattern) for name, pattern in NOT_FINITE.items()},
}
Write = Callable[[Cursor, bytes], None]


def test_openmemorys_own_write(table: Database) -> None:
    for v in (FIRST, SECOND, FIRST[:-1], None, ODD, WITH_NAN, FIRST, FIRST):
        table.run(UPSERT, *KEY, "user", v, DIM)

        assert stored(table) == (v, expected(v, DIM))


def insert_many(cursor: Cursor, v: bytes) -> None:
    others = [value for i in range(20) for value in (str(uuid.uuid4()), SECOND if i % 2 else b"bad")]
    rows = ", ".join([f"(%s, '{KEY[1]}', 'user', %s, {DIM})"] * 21)
    cursor.execute(f"INSERT INTO {TABLE} (id, sector, user_id, v, dim) VALUES {rows}", [KEY[0], v, *others])


def copy_text(cursor: Cursor, v: bytes) -> None:
    line = "\t".join([*KEY, r"\\x" + v.hex(), str(DIM)])
    cursor.copy_expert(f"COPY {TABLE} (id, sector, v, dim) FROM STDIN", io.StringIO(line + "\n"))


def copy_binary(cursor: Cursor, v: bytes) -> None:
    values = [uuid.UUID(KEY[0]).bytes, KEY[1].encode(), v, struct.pack(">i", DIM)]
    row = struct.pack(">h", len(values)) + b"".join(struct.pack(">i", len(value)) + value for value in values)
    stream = io.BytesIO(b"PGCOPY\n\xff\r\n\0" + bytes(8) + row + struct.pack(">h", -1))
    cursor.copy_expert(f"COPY {TABLE} (id, sector, v, dim) FROM STDIN (FORMAT binary)", stream)


def first(*statements: str) -> Write:
    def write(cursor: Cursor, v: bytes) -> None:
        for statement in statements:
            cursor.execute(statement, {"v": v})

    return write


def later(*statements: str) -> Write:
    """The same, on a row that has another vector already."""

    def write(cursor: Cursor, v: bytes) -> None:
        cursor.execute(INSERT, (SECOND,))
        first(*statements)(cursor, v)

    return write


ROW = f"('{KEY[0]}', '{KEY[1]}', 'user', %(v)s, {DIM})"
WRITES: dict[str, Write] = {
    "INSERT": first(f"INSERT INTO {TABLE} VALUES {ROW}"),
    "INSERT of many rows": insert_many,
    "INSERT … SELECT": first(f"INSERT INTO {TABLE} SELECT '{KEY[0]}', '{KEY[1]}', 'user', %(v)s, {DIM}"),
    "COPY": copy_text,
    "COPY binary": copy_binary,
    "UPDATE": later(f"UPDATE {TABLE} SET v = %(v)s"),
    "UPDATE of more columns": later(f"UPDATE {TABLE} SET user_id = 'new', v = %(v)s, dim = 0"),
    "UPDATE twice": later("BEGIN", f"UPDATE {TABLE} SET v = NULL", f"UPDATE {TABLE} SET v = %(v)s", "COMMIT"),
    "UPDATE … FROM": later(f"UPDATE {TABLE} SET v = new.v FROM (VALUES (%(v)s::bytea)) AS new (v)"),
    "ON CONFLICT": later(f"INSERT INTO {TABLE} VALUES {ROW} ON CONFLICT (id, sector) DO UPDATE SET v = EXCLUDED.v"),
    "MERGE": later(
        f"MERGE INTO {TABLE} USING (VALUES (%(v)s::bytea)) AS new (v) ON true WHEN MATCHED THEN UPDATE SET v = new.v"
    ),
    "DELETE, then INSERT": later("BEGIN", f"DELETE FROM {TABLE}", f"INSERT INTO {TABLE} VALUES {ROW}", "COMMIT"),
    "a prepared statement, often": later(
        f"PREPARE change (bytea) AS UPDATE {TABLE} SET v = $1",
        *["EXECUTE change ('\\x00')", f"EXECUTE change ('\\x{SECOND.hex()}')"] * 5,
        "EXECUTE change (%(v)s)",
    ),
}


@pytest.mark.parametrize("write", WRITES)
def test_v_vector_follows_v(table: Database, write: str) -> None:
    for v in (FIRST, ODD, WITH_NAN):
        with closing(table.connect()) as connection, connection.cursor() as cursor:
            WRITES[write](cursor, v)

        assert stored(table) == (v, expected(v, DIM))
        assert mismatches(table) == []
        table.run(f"TRUNCATE {TABLE}")


def test_what_is_no_vector_is_stored_all_the_same_and_gives_null(table: Database) -> None:
    for what, v in BAD.items():
        table.run(INSERT, v)
        assert stored(table) == (v, None), f"INSERT: {what}"
        table.run(UPDATE, FIRST)
        assert stored(table) == (FIRST, expected(FIRST))
        table.run(UPDATE, v)
        assert stored(table) == (v, None), f"UPDATE: {what}"
        table.run(f"TRUNCATE {TABLE}")


def wrong(database: Database, patterns: npt.NDArray[np.uint32]) -> list[tuple[str, str]]:
    """Write vectors of these bits, and return those that don't come out as they should."""
    database.run(f"TRUNCATE {TABLE}")
    vectors = enumerate(patterns.reshape(-1, DIM).astype("<u4"))
    load(database, (Row(str(uuid.UUID(int=i)), "semantic", None, vector.tobytes(), DIM) for i, vector in vectors))
    return mismatches(database)


# one template database for all examples: each begins with an empty table
@hypothesis.settings(max_examples=50, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    raw=st.binary(min_size=64 * 4 * DIM, max_size=64 * 4 * DIM),
    odd=st.lists(
        st.tuples(st.integers(0, 64 * DIM - 1), st.sampled_from([*FINITE.values(), *NOT_FINITE.values()])), max_size=40
    ),
)
def test_any_bits(table: Database, raw: bytes, odd: list[tuple[int, int]]) -> None:
    patterns = np.frombuffer(raw, np.uint32).copy()
    for place, pattern in odd:
        patterns[place] = pattern

    assert wrong(table, patterns) == []


def test_every_exponent_of_both_signs(table: Database) -> None:
    mantissas = [0, 1, 2, 0x3FFFFF, 0x400000, 0x555555, 0x7FFFFE, 0x7FFFFF]
    assert len(mantissas) == DIM  # so that one vector holds all of one exponent
    patterns = [
        sign << 31 | exponent << 23 | mantissa
        for sign, exponent, mantissa in itertools.product((0, 1), range(256), mantissas)
    ]

    assert wrong(table, np.array(patterns, np.uint32)) == []
    assert converted(table) == 2 * 255


def test_every_bit_by_itself(table: Database) -> None:
    patterns = [[1 << bit] + [0x3F800000] * (DIM - 1) for bit in range(32)]

    assert wrong(table, np.array(patterns, np.uint32)) == []
    assert converted(table) == 32


def test_update_to_itself_repairs_a_row(table: Database) -> None:
    table.run(INSERT, FIRST)
    for damage in ("NULL", "'[1,2,3,4,5,6,7,8]'"):
        table.run(f"UPDATE {TABLE} SET v_vector = {damage}")
        assert stored(table) != (FIRST, expected(FIRST))

        table.run(REPAIR)

        assert stored(table) == (FIRST, expected(FIRST))


def test_an_update_of_other_columns_leaves_v_vector(table: Database) -> None:
    table.run(INSERT, FIRST)
    table.run(f"UPDATE {TABLE} SET v_vector = '[1,2,3,4,5,6,7,8]'")

    table.run(f"UPDATE {TABLE} SET user_id = 'other', dim = 7, sector = sector")

    assert stored(table) == (FIRST, expected(pack(range(1, 9))))


def test_a_writer_that_sets_v_vector_itself_is_respected(table: Database) -> None:
    one, two = "[1,2,3,4,5,6,7,8]", "[8,7,6,5,4,3,2,1]"
    both = f"INSERT INTO {TABLE} (id, sector, v, dim, v_vector) VALUES ('{KEY[0]}', '{KEY[1]}', %s, {DIM}, %s)"
    table.run(both, FIRST, one)
    assert stored(table) == (FIRST, expected(pack(range(1, 9))))

    table.run(f"UPDATE {TABLE} SET v = %s, v_vector = %s", SECOND, two)
    assert stored(table) == (SECOND, expected(pack(range(8, 0, -1))))

    replace = " ON CONFLICT (id, sector) DO UPDATE SET v = EXCLUDED.v, v_vector = EXCLUDED.v_vector"
    table.run(both + replace, THIRD, one)
    assert stored(table) == (THIRD, expected(pack(range(1, 9))))

    table.run(f"UPDATE {TABLE} SET v_vector = %s", two)
    assert stored(table) == (THIRD, expected(pack(range(8, 0, -1))))

    # what it set is not set once more by a write that knows nothing of it
    table.run(UPSERT, *KEY, "user", FIRST, DIM)
    assert stored(table) == (FIRST, expected(FIRST))


def test_a_vector_that_differs_in_nothing_but_the_sign_of_a_zero_was_set(table: Database) -> None:
    table.run(INSERT, bits(*[FINITE["zero"]] * DIM))

    table.run(f"UPDATE {TABLE} SET v = %s, v_vector = '[-0,0,0,0,0,0,0,0]' {WHERE}", FIRST)

    assert stored(table) == (FIRST, expected(bits(FINITE["minus zero"], *[0] * (DIM - 1))))


@pytest.mark.parametrize("v", [random_rows(1, 1536)[0].v, bytes(4 * 1536)], ids=["out of line", "compressed"])
def test_values_that_are_not_stored_in_the_row(database: Database, v: bytes) -> None:
    create_table(database)
    alembic(database, "upgrade", EXPAND, env={"OM_VEC_DIM": "1536"})
    database.run(INSERT, v)
    for statement in (REPAIR, f"UPDATE {TABLE} SET user_id = 'other'", f"UPDATE {TABLE} SET v_vector = NULL", REPAIR):
        database.run(statement)
        assert stored(database) == (v, None if "NULL" in statement else expected(v))


def test_a_column_without_dimensions_takes_any(database: Database) -> None:
    create_table(database)
    alembic(database, "upgrade", EXPAND)
    for v in (FIRST, FIRST + SECOND, pack([1.0]), pack([1.0]) * 16_000, pack([1.0]) * 16_001, WITH_NAN, b"", b"123"):
        database.run(UPSERT, *KEY, "user", v, DIM)

        assert stored(database) == (v, expected(v))
