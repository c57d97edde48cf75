"""Tables, stamps and databases that can't be migrated, or needn't be: said clearly, and nothing is changed."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from demo.openmemory import TABLE
from tests.support.commands import alembic
from tests.support.openmemory import Database, create_table, load, mismatches, random_rows
from tests.support.states import BACKFILL, EXPAND, HEAD, column_type, indexes, refused, snapshot, stamp

NAME = f'"public.{TABLE}"'
COLUMNS = "id uuid, sector text, v bytea, dim integer NOT NULL"
NEWER = "CREATE EXTENSION vector; CREATE TABLE {} (id uuid, sector text, v {}, dim integer, PRIMARY KEY (id, sector))"


@pytest.mark.parametrize(
    ("setup", "said"),
    [
        pytest.param("SELECT 1", f"table {NAME} does not exist", id="no table"),
        pytest.param(f"CREATE TABLE {TABLE} (id uuid, vector bytea)", f'table {NAME} has no column "v"', id="no v"),
        pytest.param(f"CREATE TABLE {TABLE} (v text)", f'column "v" of {NAME} is of type text', id="v is text"),
        pytest.param(
            f"CREATE TABLE {TABLE} (v bytea[])", f'column "v" of {NAME} is of type bytea[]', id="v is an array"
        ),
        pytest.param(
            f"CREATE TABLE rows ({COLUMNS}); CREATE VIEW {TABLE} AS SELECT * FROM rows",
            f"{NAME} is a view",
            id="view",
        ),
        pytest.param(
            f"CREATE TABLE rows ({COLUMNS}); CREATE MATERIALIZED VIEW {TABLE} AS SELECT * FROM rows",
            f"{NAME} is a materialized view",
            id="materialized view",
        ),
        pytest.param(
            f"CREATE TABLE rows ({COLUMNS}) PARTITION BY LIST (sector);"
            f"CREATE TABLE {TABLE} PARTITION OF rows FOR VALUES IN ('semantic')",
            f"{NAME} is a partition",
            id="partition",
        ),
        pytest.param(
            f"CREATE TABLE {TABLE} ({COLUMNS}); CREATE TABLE heir () INHERITS ({TABLE})",
            f"{NAME} is a table that others inherit from",
            id="inherited from",
        ),
    ],
)
def test_a_table_that_cannot_be_migrated_is_named(database: Database, setup: str, said: str) -> None:
    database.run(setup)

    refused(database, said, "HINT:  ")

    assert stamp(database) is None


def test_a_schema_that_is_not_there_is_named(database: Database) -> None:
    create_table(database)

    refused(database, 'schema "nowhere" does not exist', "OM_PG_SCHEMA", env={"OM_PG_SCHEMA": "nowhere"})


def test_v_that_is_a_vector_already_and_has_its_dimensions_gets_an_index_only(database: Database) -> None:
    database.run(NEWER.format(TABLE, "vector(8)"))
    database.run(f"INSERT INTO {TABLE} SELECT gen_random_uuid(), 'semantic', '[1,2,3,4,5,6,7,8]', 8")
    before = snapshot(database)

    up = alembic(database, "upgrade", "head")

    assert f'NOTICE:  column "v" of {NAME} is of type vector(8) already, nothing to do' in up.stderr
    after = snapshot(database)
    assert [what for what in before if before[what] != after[what]] == ["relations", "indexes"]
    assert stamp(database) == [HEAD]
    alembic(database, "upgrade", "head")
    alembic(database, "downgrade", "base")
    assert snapshot(database) == before
    assert stamp(database) == []


@pytest.fixture
def migrated(database: Database) -> Database:
    """A database at head whose configuration will name another table, `vectors`."""
    create_table(database)
    load(database, random_rows(60, 8))
    alembic(database, "upgrade", "head")
    database.run(f"CREATE TABLE vectors (LIKE {TABLE} INCLUDING ALL); ALTER TABLE vectors DROP v_vector")
    return database


OTHER = {"OM_VECTOR_TABLE": "vectors"}


def test_a_stamp_made_for_another_table_is_an_error_that_names_both(migrated: Database) -> None:
    refused(migrated, "stamped", HEAD, '"public.vectors"', "HINT:  ", env=OTHER)


def test_a_stamp_made_for_a_table_that_is_gone_is_an_error(migrated: Database) -> None:
    refused(migrated, '"public.nothing"', env={"OM_VECTOR_TABLE": "nothing"})


@pytest.mark.slow
def test_the_stamp_can_be_looked_at_and_mended_while_it_does_not_fit(migrated: Database) -> None:
    assert HEAD in alembic(migrated, "current", env=OTHER).stdout
    alembic(migrated, "stamp", "head", env=OTHER)
    assert stamp(migrated) == [HEAD]
    alembic(migrated, "stamp", BACKFILL, env=OTHER)
    assert stamp(migrated) == [BACKFILL]
    alembic(migrated, "stamp", "base", env=OTHER)
    assert stamp(migrated) == []
    load(migrated, random_rows(60, 4), "vectors")

    alembic(migrated, "upgrade", "head", env=OTHER)

    assert mismatches(migrated, "vectors", dim=4) == []


@pytest.mark.parametrize("revision", [EXPAND, BACKFILL, HEAD])
def test_a_stamp_made_by_hand_is_an_error_that_names_it_and_the_table(database: Database, revision: str) -> None:
    create_table(database)
    load(database, random_rows(60, 8))
    alembic(database, "stamp", revision)

    refused(database, "stamped", revision, NAME, "HINT:  ")

    assert stamp(database) == [revision]


@pytest.mark.slow
def test_what_the_hint_for_a_stamp_made_by_hand_says_works(database: Database) -> None:
    create_table(database)
    load(database, random_rows(60, 8))
    alembic(database, "stamp", "head")
    result = refused(database, "HINT:  ")
    assert "alembic stamp base" in result.log

    alembic(database, "stamp", "base")
    alembic(database, "upgrade", "head")

    assert mismatches(database, dim=8) == []


def test_a_stamp_that_does_not_fit_can_be_downgraded(database: Database) -> None:
    create_table(database)
    load(database, random_rows(60, 8))
    before = snapshot(database)
    alembic(database, "stamp", "head")

    alembic(database, "downgrade", "base")

    assert snapshot(database) == before
    assert stamp(database) == []


def test_without_the_trigger_no_function_is_made_and_the_log_says_what_that_means(database: Database) -> None:
    create_table(database)
    load(database, random_rows(60, 8))
    before = snapshot(database)

    result = alembic(database, "upgrade", "head", env={"OM_SYNC_TRIGGER": "off"})

    after = snapshot(database)
    assert (after["triggers"], after["functions"]) == ([], [])
    assert mismatches(database) == []
    assert column_type(database) == "vector(8)"
    assert indexes(database)
    assert f'WARNING:  nothing keeps "v_vector" of {NAME} in step with "v"' in result.stderr
    assert "OM_SYNC_TRIGGER=on" in result.stderr

    alembic(database, "downgrade", "base", env={"OM_SYNC_TRIGGER": "off"})
    assert snapshot(database)["columns"] == before["columns"]


def test_sqlite_has_nothing_to_do_and_is_stamped(tmp_path: Path) -> None:
    file = tmp_path / "openmemory.sqlite"
    env = {"OM_DATABASE_URL": f"sqlite:///{file}"}

    up = alembic(None, "upgrade", "head", env=env)

    assert [up.stderr.count(f"NOTICE:  {step}: SQLite") for step in ("expand", "backfill", "finalize")] == [1, 1, 1]
    connection = sqlite3.connect(file)
    try:
        version = "SELECT version_num FROM openmemory_alembic_version"
        assert connection.execute(version).fetchall() == [(HEAD,)]
        alembic(None, "downgrade", "base", env=env)
        assert connection.execute(version).fetchall() == []
        assert connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall() == [
            ("openmemory_alembic_version",)
        ]
    finally:
        connection.close()


def test_a_sqlite_backend_without_a_url_connects_to_nothing(database: Database) -> None:
    result = alembic(None, "upgrade", "head", env={"OM_METADATA_BACKEND": "sqlite", "OM_PG_HOST": "/nonexistent"})

    assert result.stderr.count("NOTICE:  ") == 1
    assert stamp(database) is None
