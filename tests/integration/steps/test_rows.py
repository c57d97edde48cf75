"""Dimensions that are told, agreed or in dispute; rows that can't become vectors."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest

from demo.openmemory import TABLE
from tests.support.bad_rows import BAD, BAD_COUNT, CONFIGURED, NAN, ZEROS, with_v
from tests.support.commands import alembic
from tests.support.openmemory import Database, Row, checksum, create_table, load, mismatches, pack, random_rows
from tests.support.states import EXPAND, HEAD, column_type, follows, indexes, refused, stamp

NAME = f'"public.{TABLE}"'


def with_bad(database: Database) -> dict[str, list[Row]]:
    """Create the table with 60 good rows, every bad kind, and two rows without `v`; return the bad ones by reason."""
    bad: dict[str, list[Row]] = {}
    for i, (reason, values) in enumerate(BAD.items()):
        rows = random_rows(len(values), 8, seed=100 + i)
        bad[reason] = [row._replace(v=v) for row, v in zip(rows, values, strict=True)]
    good = random_rows(60, 8)
    create_table(database)
    load(database, [*good[:30], *(row for rows in bad.values() for row in rows), *with_v(None, 2, 99), *good[30:]])
    return bad


def test_every_kind_of_bad_row_is_skipped_counted_and_named(database: Database) -> None:
    bad = with_bad(database)
    v = checksum(database)

    result = alembic(database, "upgrade", "head", env=CONFIGURED | {"BACKFILL_BATCH": "7"})

    assert mismatches(database, dim=8) == []
    assert database.value(f"SELECT count(v_vector) FROM {TABLE}") == 60
    assert checksum(database) == v
    assert stamp(database) == [HEAD]
    assert f"WARNING:  {BAD_COUNT} rows of {NAME} can't be converted and were skipped" in result.stderr
    for reason, rows in bad.items():
        found = re.search(rf"DETAIL:  .*{reason}: {len(rows)} \(such as (.*?\))\)", result.stderr)
        assert found, reason
        named = set(re.findall(r"\(id=([-0-9a-f]+), sector=(\w+)\)", found[1]))
        assert len(named) == min(5, len(rows))
        assert named <= {(row.id, row.sector) for row in rows}


def test_a_bad_value_written_later_never_fails_the_write(database: Database) -> None:
    create_table(database)
    values = [v for values in BAD.values() for v in values]
    load(database, random_rows(len(values) + 60, 8))
    alembic(database, "upgrade", "head")

    keys = database.rows(f"SELECT id FROM {TABLE}")
    for (id,), v in zip(keys, values, strict=False):
        database.run(f"UPDATE {TABLE} SET v = %s WHERE id = %s", v, id)
    load(database, [row._replace(v=v) for row, v in zip(random_rows(len(values), 8, 1), values, strict=True)])

    assert mismatches(database, dim=8) == []
    assert database.value(f"SELECT count(v_vector) FROM {TABLE}") == 60


def test_bad_rows_fail_the_backfill_if_told_to_after_the_rest_and_until_mended(database: Database) -> None:
    bad = with_bad(database)
    v = checksum(database)
    env = CONFIGURED | {"OM_ON_BAD_ROWS": "fail"}

    result = alembic(database, "upgrade", "head", env=env, check=False)

    assert result.returncode != 0
    assert f"FAILED: {BAD_COUNT} rows of {NAME} can't be converted" in result.log
    assert all(f"{reason}: {len(rows)} (such as" in result.log for reason, rows in bad.items())
    assert "Traceback" not in result.log
    assert stamp(database) == [EXPAND]
    assert database.value(f"SELECT count(v_vector) FROM {TABLE}") == 60
    assert mismatches(database, dim=8) == []
    assert checksum(database) == v

    mended = [row for rows in bad.values() for row in rows]
    for row, good in zip(mended, random_rows(BAD_COUNT, 8, seed=7), strict=True):
        database.run(f"UPDATE {TABLE} SET v = %s WHERE id = %s", good.v, row.id)
    alembic(database, "upgrade", "head", env=env)
    assert stamp(database) == [HEAD]
    assert database.value(f"SELECT count(v_vector) FROM {TABLE}") == 60 + BAD_COUNT
    assert mismatches(database, dim=8) == []


def test_a_dim_that_disagrees_is_counted_and_the_bytes_decide(database: Database) -> None:
    create_table(database)
    load(database, [row._replace(dim=1536 if i < 7 else 8) for i, row in enumerate(random_rows(60, 8))])

    result = alembic(database, "upgrade", "head")

    assert f"disagrees with the bytes in 7 rows of {NAME}" in result.stderr
    assert column_type(database) == "vector(8)"
    assert mismatches(database, dim=8) == []


@pytest.mark.parametrize("dim", [1, 16_000])
def test_the_least_and_the_most_dimensions(database: Database, dim: int) -> None:
    create_table(database)
    load(database, random_rows(60, dim))

    alembic(database, "upgrade", "head")

    assert column_type(database) == f"vector({dim})"
    assert mismatches(database, dim=dim) == []
    assert follows(database, dim)


def mixed(database: Database) -> None:
    """Create the table with 60 rows of 8 dimensions, 20 of 4, two of three bytes and one without `v`."""
    create_table(database)
    load(database, [*random_rows(60, 8), *random_rows(20, 4), *with_v(b"abc", 2, 1), *with_v(None, 1, 2)])


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({}, "the rows hold vectors of different dimensions"),
        ({"OM_VEC_DIM": "16"}, "no row holds a vector of 16 dimensions"),
        ({"OM_TIER": "deep"}, "no row holds a vector of 1,536 dimensions"),
    ],
)
def test_a_dispute_about_dimensions_is_an_error_with_the_histogram(
    database: Database, env: Mapping[str, str], said: str
) -> None:
    mixed(database)

    refused(database, said, "3 bytes: 2; 4 dimensions: 20; 8 dimensions: 60", "OM_VEC_DIM", env=env)

    assert stamp(database) is None


def test_only_bad_rows_are_rows_without_the_configured_dimension(database: Database) -> None:
    create_table(database)
    load(database, with_v(b"abc", 3, 1))

    refused(database, "no row holds a vector of 8 dimensions", "3 bytes: 3", env=CONFIGURED)


@pytest.mark.parametrize("dim", [4, 8])
def test_configured_dimensions_end_the_dispute(database: Database, dim: int) -> None:
    mixed(database)

    result = alembic(database, "upgrade", "head", env={"OM_VEC_DIM": str(dim)})

    assert column_type(database) == f"vector({dim})"
    assert mismatches(database, dim=dim) == []
    assert f"other dimension: {60 if dim == 4 else 20} (such as" in result.stderr


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([], id="no rows"),
        pytest.param(with_v(None, 3, 1), id="v is NULL"),
        pytest.param(with_v(b"abc", 3, 1), id="all bad"),
    ],
)
def test_without_any_dimensions_the_column_takes_all_and_has_no_index(database: Database, rows: list[Row]) -> None:
    create_table(database)
    load(database, rows)

    result = alembic(database, "upgrade", "head")

    assert column_type(database) == "vector"
    assert f"NOTICE:  no row of {NAME} says how many dimensions" in result.stderr
    assert re.search("^WARNING:  no index on .* has no dimensions$", result.stderr, re.MULTILINE)
    assert "OM_VEC_DIM" in result.stderr
    assert indexes(database) == {}
    load(database, [*random_rows(60, 8), *random_rows(5, 3)])
    assert mismatches(database, dim=-1) == []
    assert database.value(f"SELECT count(v_vector) FROM {TABLE}") == 65

    # the hint's way out
    alembic(database, "downgrade", "base")
    alembic(database, "upgrade", "head", env=CONFIGURED)
    assert column_type(database) == "vector(8)"
    assert mismatches(database, dim=8) == []
    assert len(indexes(database)) == 1


@pytest.mark.parametrize("rows", [pytest.param([], id="no rows"), pytest.param(with_v(None, 3, 1), id="v is NULL")])
def test_configured_dimensions_need_no_row(database: Database, rows: list[Row]) -> None:
    create_table(database)
    load(database, rows)

    alembic(database, "upgrade", "head", env=CONFIGURED)

    assert column_type(database) == "vector(8)"
    assert follows(database, 8)


def test_rows_of_nan_alone_still_tell_the_dimensions(database: Database) -> None:
    create_table(database)
    load(database, with_v(pack([NAN]) + ZEROS, 3, 1))

    alembic(database, "upgrade", "head")

    assert column_type(database) == "vector(8)"
    assert mismatches(database, dim=8) == []


def test_other_dimensions_than_the_column_has_are_an_error_later_on(database: Database) -> None:
    create_table(database)
    load(database, random_rows(60, 8))
    alembic(database, "upgrade", EXPAND)

    refused(database, f'"v_vector" of {NAME} has 8 dimensions', "4 are configured", env={"OM_VEC_DIM": "4"})
