"""The chain on OpenMemory's table: up, down and up again, from every point and at every edge of a batch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import pytest
from psycopg2.sql import SQL, Identifier

from demo.openmemory import TABLE
from tests.support.commands import alembic
from tests.support.openmemory import (
    Database,
    Row,
    checksum,
    create_table,
    load,
    mismatches,
    pack,
    random_rows,
    real_rows,
)
from tests.support.states import (
    BACKFILL,
    EXPAND,
    HEAD,
    INDEX,
    IVFFLAT,
    column_type,
    follows,
    indexes,
    nearest,
    plan,
    snapshot,
    stamp,
    without_extension,
)

HNSW = f"CREATE INDEX {INDEX} ON public.{TABLE} USING hnsw (v_vector vector_l2_ops) WITH (m='16', ef_construction='64')"
BATCH = 10
NAN = float("nan")


def filled(database: Database, rows: list[Row]) -> str:
    create_table(database)
    load(database, rows)
    return checksum(database)


def assert_migrated(database: Database, dim: int, v: str, definition: str = IVFFLAT) -> None:
    """All that has to be true after `alembic upgrade head`, on whatever way it was reached."""
    assert column_type(database) == f"vector({dim})"
    assert mismatches(database, dim=dim) == []
    assert checksum(database) == v
    assert indexes(database) == {INDEX: (definition, True)}
    assert f"Index Scan using {INDEX}" in plan(database, nearest(dim))
    assert follows(database, dim)
    assert stamp(database) == [HEAD]
    assert database.value("SELECT to_regclass('alembic_version')") is None


@pytest.mark.parametrize(
    ("rows", "dim", "env", "definition"),
    [
        pytest.param(real_rows(256), 256, {}, IVFFLAT, id="real 256"),
        pytest.param(real_rows(1536), 1536, {"OM_TIER": "deep"}, IVFFLAT, id="real 1536"),
        pytest.param(random_rows(2500, 48), 48, {}, IVFFLAT.replace("'1'", "'2'"), id="random, two lists"),
        pytest.param(random_rows(700, 384), 384, {"OM_TIER": "smart", "OM_INDEX": "hnsw"}, HNSW, id="random, hnsw"),
    ],
)
def test_up_down_up(database: Database, rows: list[Row], dim: int, env: Mapping[str, str], definition: str) -> None:
    v = filled(database, rows)
    before = snapshot(database)

    alembic(database, "upgrade", "head", env=env)
    assert_migrated(database, dim, v, definition)

    alembic(database, "downgrade", "base", env=env)
    assert without_extension(snapshot(database)) == before
    assert stamp(database) == []

    alembic(database, "upgrade", "head", env=env)
    assert_migrated(database, dim, v, definition)


@pytest.mark.slow
@pytest.mark.parametrize("revision", [EXPAND, BACKFILL])
def test_down_from_the_middle(database: Database, revision: str) -> None:
    v = filled(database, random_rows(120, 8))
    before = snapshot(database)

    alembic(database, "upgrade", revision)
    assert stamp(database) == [revision]
    alembic(database, "downgrade", "base")
    assert without_extension(snapshot(database)) == before
    assert stamp(database) == []

    alembic(database, "upgrade", "head")
    assert_migrated(database, 8, v)


@pytest.mark.slow
@pytest.mark.parametrize("revision", [EXPAND, BACKFILL])
def test_down_to_the_middle_and_up_again(database: Database, revision: str) -> None:
    v = filled(database, random_rows(120, 8))
    alembic(database, "upgrade", "head")

    alembic(database, "downgrade", revision)
    assert stamp(database) == [revision]
    assert indexes(database) == {}
    assert mismatches(database, dim=8) == []
    assert follows(database, 8)

    alembic(database, "upgrade", "head")
    assert_migrated(database, 8, v)


@pytest.mark.slow
def test_one_revision_at_a_time_is_the_same(database: Database) -> None:
    v = filled(database, random_rows(120, 8))

    alembic(database, "upgrade", "+1")
    assert column_type(database) == "vector(8)"
    assert database.value(f"SELECT count(v_vector) FROM {TABLE}") == 0
    assert follows(database, 8)
    alembic(database, "upgrade", "+1")
    assert mismatches(database, dim=8) == []
    assert indexes(database) == {}
    alembic(database, "upgrade", "+1")

    assert_migrated(database, 8, v)


def test_a_second_upgrade_finds_nothing_to_do(database: Database) -> None:
    filled(database, random_rows(120, 8))
    alembic(database, "upgrade", "head")
    before = snapshot(database)

    alembic(database, "upgrade", "head")

    assert snapshot(database) == before
    assert stamp(database) == [HEAD]


@pytest.mark.parametrize("count", [0, 1, BATCH - 1, BATCH, BATCH + 1, 2 * BATCH])
def test_every_edge_of_a_batch(database: Database, count: int) -> None:
    v = filled(database, random_rows(count, 3))

    alembic(database, "upgrade", "head", env={"BACKFILL_BATCH": str(BATCH), "OM_VEC_DIM": "3"})

    assert mismatches(database, dim=3) == []
    assert checksum(database) == v
    # one transaction a batch, so a row's xmin tells its batch
    batches = database.rows(f"SELECT count(*) FROM {TABLE} GROUP BY xmin::text")
    assert len(batches) >= math.ceil(count / BATCH)
    assert all(rows <= BATCH for (rows,) in batches)


def test_holes_and_dead_rows_leave_no_gap(database: Database) -> None:
    filled(database, random_rows(3000, 16))
    database.run(f"DELETE FROM {TABLE} WHERE sector IN ('semantic', 'emotional') OR ctid < '(40,0)'")
    database.run(f"VACUUM {TABLE}")
    load(database, random_rows(500, 16, seed=1))
    database.run(f"UPDATE {TABLE} SET user_id = 'moved' WHERE sector = 'procedural'")
    v = checksum(database)

    alembic(database, "upgrade", "head", env={"BACKFILL_BATCH": "100"})

    assert_migrated(database, 16, v)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        pytest.param("DROP COLUMN user_id", id="OpenMemory 1.2.0, no user_id"),
        pytest.param("DROP COLUMN dim", id="no dim"),
        pytest.param(f"DROP CONSTRAINT {TABLE}_pkey", id="no primary key"),
        pytest.param("ADD v_old bytea, ADD note text NOT NULL DEFAULT '', ALTER v SET NOT NULL", id="more than usual"),
    ],
)
def test_tables_of_another_shape(database: Database, change: str) -> None:
    filled(database, random_rows(120, 8))
    database.run(f"UPDATE {TABLE} SET v = %s WHERE sector = 'semantic'", pack([NAN] * 8))
    database.run(f"ALTER TABLE {TABLE} {change}")
    v, before = checksum(database), snapshot(database)

    result = alembic(database, "upgrade", "head")

    assert_migrated(database, 8, v)
    key = r"ctid=\(\d+,\d+\)" if "pkey" in change else "id=[-0-9a-f]{36}, sector=semantic"
    assert re.search(rf"NaN or infinite values: 24 \(such as \({key}\)", result.stderr)
    alembic(database, "downgrade", "base")
    assert without_extension(snapshot(database)) == before


@pytest.mark.parametrize("table", ["select", "t" * 63, 'a "quoted" 100 % :name'])
def test_any_name_of_schema_and_table(database: Database, table: str) -> None:
    schema = "Om-Test"
    create_table(database, table, schema)
    load(database, random_rows(120, 8), table, schema)
    host = [Identifier(home, "alembic_version") for home in ("public", schema)]
    for name in host:
        database.run(SQL("CREATE TABLE {} (version_num varchar(32) PRIMARY KEY)").format(name))
        database.run(SQL("INSERT INTO {} VALUES ('of the host')").format(name))
    v, before = checksum(database, table, schema=schema), snapshot(database)
    env = {"OM_PG_SCHEMA": schema, "OM_VECTOR_TABLE": table}

    alembic(database, "upgrade", "head", env=env)

    assert mismatches(database, table, schema) == []
    assert checksum(database, table, schema=schema) == v
    assert follows(database, 8, table, schema)
    ((index, (_, valid)),) = indexes(database, table, schema).items()
    assert valid
    # EXPLAIN prints it quoted, with what is a quote inside doubled
    quoted = '"' + index.replace('"', '""') + '"' if '"' in index else index
    assert f"Index Scan using {quoted}" in plan(database, nearest(8), table, schema)
    assert stamp(database, schema) == [HEAD]
    assert stamp(database) is None
    assert all(database.rows(SQL("SELECT * FROM {}").format(name)) == [("of the host",)] for name in host)
    alembic(database, "downgrade", "base", env=env)
    assert without_extension(snapshot(database)) == before
    assert stamp(database, schema) == []


@pytest.mark.slow
def test_two_tables_share_a_database(database: Database) -> None:
    v = filled(database, random_rows(120, 8))
    create_table(database, schema="other")
    load(database, random_rows(60, 4), schema="other")
    alembic(database, "upgrade", "head")
    first = snapshot(database)

    alembic(database, "upgrade", "head", env={"OM_PG_SCHEMA": "other"})
    assert mismatches(database, schema="other", dim=4) == []
    alembic(database, "downgrade", "base", env={"OM_PG_SCHEMA": "other"})

    assert snapshot(database) == first
    assert_migrated(database, 8, v)
