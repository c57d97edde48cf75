"""`openmemory-migrations verify`: every row compared to the bit, and each that is wrong named by its key."""

from __future__ import annotations

import pytest

from demo.openmemory import TABLE
from tests.support.commands import om
from tests.support.openmemory import Database, create_table, load, pack, random_rows, real_rows
from tests.support.states import EXPAND, snapshot
from tests.support.sync_trigger import bits
from tests.support.verification import (
    DIM,
    ROWS,
    UNSEARCHED,
    behind_its_back,
    compared,
    forget,
    key,
    keys,
    set_both,
    set_v,
    table,
    verify,
)

__all__ = ["table"]  # a fixture

ROW, OTHER, THIRD, FOURTH = ROWS[0], ROWS[1234], ROWS[4321], ROWS[-1]
REST = (ROW.v or b"")[4:]
NAN = pack([1.0] * (DIM - 1) + [float("nan")])
NO_VECTORS = {
    "empty": b"",
    "length not a multiple of 4": b"\1\2\3",
    "other dimension": pack([1.0] * (DIM + 1)),
    "NaN or infinite values": NAN,
}


@pytest.mark.parametrize("dim", [256, pytest.param(1536, marks=pytest.mark.slow)])
def test_rows_of_a_real_server_are_right(database: Database, dim: int) -> None:
    rows = real_rows(dim)
    create_table(database)
    load(database, rows)
    assert om(database, "upgrade").returncode == 0

    found = verify(database, 0)

    assert found["comparison"] == {
        "rows": len(rows),
        "equal": len(rows),
        "skipped": {},
        "without_source": 0,
        "sourceless": 0,
        "sampled": False,
        "looked_at_again": 0,
        "wrong": [],
    }
    assert found["search"]["every_row"]["recall"] == 1


@pytest.mark.parametrize(
    ("source", "vector"),
    [
        pytest.param(0x3F800000, 0x3F800001, id="the last bit", marks=pytest.mark.slow),
        pytest.param(0x3F800000, 0xBF800000, id="the sign", marks=pytest.mark.slow),
        pytest.param(0x00000000, 0x80000000, id="the sign of zero"),
        pytest.param(0x80000000, 0x00000000, id="minus zero", marks=pytest.mark.slow),
        pytest.param(0x00000000, 0x00000001, id="zero and the least denormal", marks=pytest.mark.slow),
        pytest.param(0x007FFFFF, 0x007FFFFE, id="denormals", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("first", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_one_bit_in_one_vector_of_thousands(table: Database, source: int, vector: int, first: bool) -> None:
    v, other = (bits(one) + REST if first else REST + bits(one) for one in (source, vector))
    set_both(table, OTHER, v, other)

    found, wrong = compared(table, 1)

    assert (found["rows"], found["equal"]) == (len(ROWS), len(ROWS) - 1)
    assert wrong == {"differs": [key(OTHER)]}


def test_each_wrong_row_is_named_by_its_key_under_what_is_wrong(table: Database) -> None:
    set_both(table, ROW, ROW.v or b"", OTHER.v or b"")
    with behind_its_back(table):
        set_v(table, OTHER, b"\1\2\3")
    forget(table, THIRD, FOURTH)

    found, wrong = compared(table, 1)

    assert wrong == {"differs": [key(ROW)], "stale": [key(OTHER)], "missing": keys(THIRD, FOURTH)}
    assert (found["rows"], found["equal"]) == (len(ROWS), len(ROWS) - 4)
    text = om(table, "verify", *UNSEARCHED)
    assert text.returncode == 1
    for said in (
        f"{len(ROWS):,} looked at; {len(ROWS) - 4:,} equal to the bit",
        f"1: the vector is another than the bytes: {key(ROW)}\n",
        f"1: there is a vector, but the bytes are none (any more): {key(OTHER)}\n",
        "2: the bytes have no vector: (id=",
        "NOT right",
    ):
        assert said in text.stdout, text.stdout


@pytest.mark.slow
@pytest.mark.parametrize("reason", NO_VECTORS)
def test_bytes_that_are_no_vector_any_more_leave_a_stale_one(table: Database, reason: str) -> None:
    with behind_its_back(table):
        set_v(table, ROW, NO_VECTORS[reason])
    set_v(table, OTHER, NO_VECTORS[reason])

    found, wrong = compared(table, 1)

    assert wrong == {"stale": [key(ROW)]}
    assert found["skipped"] == {reason: 1}
    assert found["equal"] == len(ROWS) - 2


@pytest.mark.slow
def test_rows_that_can_have_no_vector_are_counted_and_no_failure(table: Database) -> None:
    for number, v in enumerate([*NO_VECTORS.values(), NAN]):
        set_v(table, ROWS[100 * number], v)
    for row in ROWS[1:3]:
        set_v(table, row, None)
    table.run(f"UPDATE {TABLE} SET v_vector = %s WHERE id = %s", str([1.5] * DIM), ROWS[2].id)

    found, _ = compared(table, 0)

    assert found["skipped"] == dict.fromkeys(NO_VECTORS, 1) | {"NaN or infinite values": 2}
    assert (found["without_source"], found["sourceless"]) == (2, 1)
    assert (found["rows"], found["equal"]) == (len(ROWS), len(ROWS) - 7)
    text = om(table, "verify", *UNSEARCHED).stdout
    assert "2 skipped: NaN or infinite values\n" in text
    assert "2 without bytes, 1 of them with a vector\n" in text
    assert "wrong:" in text
    assert "NOT right" not in text


@pytest.mark.slow
def test_of_very_many_wrong_rows_all_are_counted_and_a_thousand_named(table: Database) -> None:
    wrong = ROWS[::2]
    with behind_its_back(table):
        table.run(
            f"UPDATE {TABLE} SET v = set_byte(v, 3, get_byte(v, 3) # 1) WHERE id = ANY (%s::uuid[])",
            [row.id for row in wrong],
        )

    (found,) = verify(table, 1, *UNSEARCHED)["comparison"]["wrong"]

    assert (found["kind"], found["rows"]) == ("differs", len(wrong))
    assert len(set(found["keys"])) == 1000
    assert set(found["keys"]) < set(map(key, wrong))


@pytest.mark.slow
def test_before_the_backfill_every_vector_is_missing(database: Database) -> None:
    create_table(database)
    load(database, random_rows(3000, DIM))
    assert om(database, "upgrade", EXPAND).returncode == 0

    (found,) = verify(database, 1)["comparison"]["wrong"]

    assert (found["kind"], found["rows"], len(found["keys"])) == ("missing", 3000, 1000)
    assert om(database, "backfill").returncode == 0
    verify(database, 0)


@pytest.mark.slow
def test_it_changes_nothing_and_needs_no_more_than_select(table: Database) -> None:
    set_both(table, OTHER, ROW.v or b"", OTHER.v or b"")
    versions = f"SELECT ctid, xmin FROM {TABLE} ORDER BY 1"
    role = f"reader_of_{table.name}"
    table.run(f"CREATE ROLE {role} LOGIN; GRANT SELECT ON {TABLE} TO {role}")
    table.run("REVOKE ALL ON pg_stat_activity FROM PUBLIC")
    before, rows = snapshot(table), table.rows(versions)

    verify(Database(table.name, table.url.replace("postgres@", f"{role}@")), 1, "--queries", "10")

    assert snapshot(table) == before
    assert table.rows(versions) == rows
    table.run(f"DROP OWNED BY {role}; DROP ROLE {role}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--sample", "0"), "--sample is 0"),
        (("--sample", "-5"), "--sample is -5"),
        (("--sample", "many"), "invalid int value"),
        (("--k", "0"), "--k is 0"),
        (("--k", "1001"), "from 1 to 1,000"),
        (("--queries", "-1"), "--queries is -1"),
        (("--recall", "1.01"), "--recall is 1.01"),
        (("--recall", "nan"), "--recall is nan"),
        (("--fail-under", "95"), "--fail-under is 95"),
        (("--fail-under", "0.9", "--queries", "0"), "--queries is 0, and this needs searches"),
        (("--nonsense",), "unrecognized arguments"),
    ],
)
def test_what_can_not_be_meant_is_refused_before_anything_is_connected(args: tuple[str, ...], said: str) -> None:
    done = om(None, "verify", *args, env={"OM_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/nothing"})

    assert (done.returncode, done.stdout) == (2, ""), done.log
    assert said in done.stderr
    assert "Traceback" not in done.stderr
