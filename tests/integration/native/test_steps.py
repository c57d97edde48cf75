"""Tables that newer OpenMemory made: `v`, a vector itself, gets its dimensions and its index, and loses them again."""

from __future__ import annotations

import pytest
from psycopg2.errors import DataException

from demo.openmemory import TABLE
from tests.support.commands import alembic
from tests.support.native import INDEX, NEWER, SEARCH, START, UPSERT, create_newer, filenode, text, wrong
from tests.support.openmemory import Database, random_rows
from tests.support.states import (
    BACKFILL,
    EXPAND,
    HEAD,
    column_type,
    indexes,
    refused,
    snapshot,
    stamp,
    without_extension,
)

NAME = f'"public.{TABLE}"'
DIM8 = {"OM_VEC_DIM": "8"}
AS_OPENMEMORY = (
    f"CREATE INDEX {INDEX} ON public.{TABLE} USING hnsw (v vector_cosine_ops) WITH (m='16', ef_construction='64')"
)


def comment(database: Database) -> str | None:
    found = "SELECT col_description(attrelid, attnum) FROM pg_attribute WHERE attrelid = %s::regclass AND attname = 'v'"
    text: str | None = database.value(found, TABLE)
    return text


def test_an_empty_table_of_a_fresh_installation(database: Database) -> None:
    create_newer(database)
    database.run(f"COMMENT ON COLUMN {TABLE}.v IS 'what it means'; ALTER TABLE {TABLE} ALTER v SET STORAGE MAIN")
    before = snapshot(database)

    alembic(database, "upgrade", EXPAND, env=DIM8)

    assert column_type(database, "v") == "vector(8)"
    database.run(START)
    (row,) = random_rows(1, 8)
    database.run(UPSERT, row.id, row.sector, "user1", None, text(row.v), 8)
    assert database.rows(SEARCH, text(row.v), row.sector, text(row.v)) == [(row.id, pytest.approx(1))]
    up = alembic(database, "upgrade", "head", env=DIM8)
    assert f'index "{INDEX}" exists already and is as wanted' in up.stderr
    assert "ORDER BY" in up.stderr
    assert stamp(database) == [HEAD]
    database.run(f"DELETE FROM {TABLE}")
    rewritten = filenode(database)
    alembic(database, "downgrade", "base", env=DIM8)
    assert filenode(database) == rewritten
    assert without_extension(snapshot(database)) == without_extension(before)
    assert comment(database) == "what it means"


def test_rows(database: Database) -> None:
    rows = random_rows(500, 8)
    create_newer(database, rows)
    database.run(
        f"""
        INSERT INTO {TABLE} VALUES (gen_random_uuid(), 'semantic', 'user1', NULL, NULL, 8);
        COMMENT ON COLUMN {TABLE}.v IS 'what it means';
        ALTER TABLE {TABLE} ALTER v SET DEFAULT '[1,2,3,4,5,6,7,8]', ALTER v SET STORAGE MAIN, ALTER v SET STATISTICS 7;
        GRANT SELECT (v), UPDATE (v) ON {TABLE} TO pg_monitor WITH GRANT OPTION;
        """
    )
    database.run(f"DELETE FROM {TABLE} WHERE v IS NULL")
    database.run(f"ALTER TABLE {TABLE} ALTER v SET NOT NULL")
    before = attributes(database)

    alembic(database, "upgrade", EXPAND)
    assert (column_type(database, "v"), column_type(database, "v_typed")) == ("vector", "vector(8)")
    alembic(database, "upgrade", BACKFILL)
    assert (column_type(database, "v"), column_type(database, "v_typed")) == ("vector(8)", None)
    assert (snapshot(database)["triggers"], snapshot(database)["functions"]) == ([], [])
    up = alembic(database, "upgrade", "head")

    assert "searches use index" in up.stderr
    assert "true neighbours" not in up.stderr
    assert wrong(database, rows) == []
    assert indexes(database) == {INDEX: (AS_OPENMEMORY, True)}
    assert attributes(database) == before
    database.run(START)
    assert "nothing to do" not in alembic(database, "upgrade", "head").stderr
    rewritten = filenode(database)
    alembic(database, "downgrade", "base")
    assert filenode(database) == rewritten
    assert (column_type(database, "v"), comment(database)) == ("vector", "what it means")
    assert attributes(database) == before
    alembic(database, "upgrade", "head")
    assert wrong(database, rows) == []
    assert attributes(database) == before
    assert comment(database) == "openmemory_migrations: dimensions given; what it means"


def attributes(database: Database) -> list[tuple[object, ...]]:
    return database.rows(
        """
        SELECT attnotnull, attstorage, attstattarget, attacl::text, pg_get_expr(adbin, adrelid)
        FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
        WHERE attrelid = %s::regclass AND attname = 'v'
        """,
        TABLE,
    )


@pytest.mark.slow
def test_a_value_of_other_dimensions_fails_its_write_meanwhile(database: Database) -> None:
    rows = random_rows(20, 8)
    create_newer(database, rows)
    alembic(database, "upgrade", EXPAND)

    with pytest.raises(DataException, match="expected 8 dimensions, not 3"):
        database.run(UPSERT, rows[0].id, rows[0].sector, "user1", None, "[1,2,3]", 3)
    alembic(database, "upgrade", "head")

    assert wrong(database, rows) == []


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({}, "3 rows of "),
        pytest.param({"OM_VEC_DIM": "8"}, "3 rows of ", marks=pytest.mark.slow),
        pytest.param({"OM_TIER": "fast"}, "no row of ", marks=pytest.mark.slow),
    ],
)
def test_rows_that_disagree_are_an_error_before_any_change(database: Database, env: dict[str, str], said: str) -> None:
    create_newer(database, [*random_rows(20, 8), *random_rows(2, 9), *random_rows(1, 10)])

    refused(database, said, "Rows by dimensions: 8: 20; 9: 2; 10: 1.", "HINT:  ", env=env)

    assert stamp(database) is None


@pytest.mark.slow
@pytest.mark.exhaustive
def test_nothing_says_how_many_dimensions(database: Database) -> None:
    create_newer(database)
    before = snapshot(database)

    up = alembic(database, "upgrade", "head")

    assert "has no dimensions, without which newer OpenMemory can't start" in up.stderr
    assert "HINT:  Set OM_VEC_DIM" in up.stderr
    assert stamp(database) == [HEAD]
    assert snapshot(database) == before
    refused(database, f"stamped {HEAD}", "downgrade om_20240107_pgvector-1", env=DIM8)
    alembic(database, "downgrade", "base")
    assert snapshot(database) == before


@pytest.mark.slow
@pytest.mark.exhaustive
def test_what_its_hint_says_works(database: Database) -> None:
    create_newer(database)
    alembic(database, "upgrade", "head")
    alembic(database, "downgrade", "om_20240107_pgvector-1")

    alembic(database, "upgrade", "head", env=DIM8)

    assert column_type(database, "v") == "vector(8)"
    assert indexes(database) == {INDEX: (AS_OPENMEMORY, True)}


@pytest.mark.slow
@pytest.mark.parametrize("index", [None, START], ids=["no index", "with its index"])
def test_a_v_that_has_its_dimensions_keeps_them(database: Database, index: str | None) -> None:
    create_newer(database, random_rows(20, 8), NEWER.replace("v vector", "v vector(8)"))
    refused(database, "has 8 dimensions, but 9 are configured", "Set OM_VEC_DIM=8", env={"OM_VEC_DIM": "9"})
    before = snapshot(database)
    if index:
        database.run(index)

    alembic(database, "upgrade", "head")

    assert list(indexes(database)) == [INDEX]
    alembic(database, "downgrade", "base")
    assert snapshot(database) == before
