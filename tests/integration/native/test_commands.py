"""What the console script says of a `v` that is a vector itself, and does to it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from demo.openmemory import TABLE
from tests.support.commands import alembic, om
from tests.support.native import INDEX, START, create_newer, wrong
from tests.support.openmemory import Database, random_rows
from tests.support.preflight import finding, severities, unchanged
from tests.support.states import BACKFILL, EXPAND, column_type, indexes

DIM8 = {"OM_VEC_DIM": "8"}


def status(database: Database, code: int, **env: str) -> dict[str, Any]:
    done = om(database, "status", "--json", env=env)
    assert done.returncode == code, done.log
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_status_and_check_at_each_step(database: Database) -> None:
    create_newer(database, random_rows(100, 8))
    found = unchanged(database, 0)
    assert found["verdict"] == "can be migrated"
    assert severities(found) == {"already-vector": "notice"}
    assert "an upgrade gives it 8 dimensions, by a column beside it" in finding(found, "already-vector")["message"]
    assert found["index"]["opclass"] == "vector_cosine_ops"
    before = status(database, 1)
    assert before["next"] == "openmemory-migrations upgrade"
    assert (before["rows"]["converted"], before["rows"]["pending"]) == (0, 100)

    alembic(database, "upgrade", EXPAND)
    lines = om(database, "status").stdout
    assert '"v" vector()\n' in lines
    assert "0 converted (0 %), 100 pending" in lines
    assert "trigger:  on\n" in lines
    assert lines.endswith("next:     openmemory-migrations upgrade\n")

    alembic(database, "upgrade", "head")
    lines = om(database, "status").stdout
    assert f'"{INDEX}", hnsw with vector_cosine_ops' in lines
    assert lines.endswith(" nothing\n")
    assert "trigger" not in lines
    assert "OpenMemory 1.x" not in lines
    status(database, 0)
    assert unchanged(database, 0)["verdict"] == "nothing to migrate"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_status_where_nothing_says_how_many_dimensions(database: Database) -> None:
    create_newer(database)
    assert status(database, 1)["next"] == "set OM_VEC_DIM or OM_TIER; openmemory-migrations upgrade"
    assert severities(unchanged(database, 0)) == {"already-vector": "notice", "no-dimensions": "warning"}
    alembic(database, "upgrade", "head")
    assert status(database, 1)["next"].startswith("set OM_VEC_DIM or OM_TIER; alembic downgrade")

    assert status(database, 1, **DIM8)["next"].startswith("alembic downgrade om_20240107_pgvector-1, then")
    assert "at once" not in om(database, "check").stdout


@pytest.mark.slow
def test_check_finds_what_an_upgrade_would_refuse(database: Database) -> None:
    create_newer(database, [*random_rows(5, 8), *random_rows(2, 9)])
    assert finding(unchanged(database, 1), "dimensions")["detail"] == "Rows by dimensions: 8: 5; 9: 2."

    database.run(f"DELETE FROM {TABLE} WHERE dim = 9; ALTER TABLE {TABLE} ADD v_typed text")
    database.run(f"CREATE VIEW shown AS SELECT v FROM {TABLE}")
    found = unchanged(database, 1)
    assert severities(found) == {"already-vector": "notice", "column-taken": "error", "dependents": "error"}
    assert "view public.shown" in finding(found, "dependents")["message"]
    assert finding(unchanged(database, 1, env={"OM_VEC_DIM": "9"}), "dimensions")["message"].startswith("no row of")


@pytest.mark.slow
def test_the_index_command(database: Database) -> None:
    rows = random_rows(100, 8)
    create_newer(database, rows)
    assert '"v" has no dimensions' in om(database, "index").stderr
    alembic(database, "upgrade", BACKFILL)
    database.run(START)

    done = om(database, "index")
    assert done.returncode == 0, done.log
    assert "exists already and is as wanted" in done.stderr
    done = om(database, "index", "--json", env={"OM_INDEX": "ivfflat"})
    assert json.loads(done.stdout)["query"] == 'ORDER BY "v" OPERATOR("public".<=>) $1'
    assert "USING ivfflat (v vector_cosine_ops) WITH (lists='1')" in indexes(database)[INDEX][0]
    assert status(database, 1, OM_INDEX="hnsw")["indexes"][0]["method"] == "ivfflat"
    assert om(database, "index", env={"OM_INDEX": "none"}).returncode == 0
    assert indexes(database) == {}
    assert wrong(database, rows) == []


@pytest.mark.slow
def test_there_are_no_bytes_to_convert_or_to_compare(database: Database) -> None:
    create_newer(database, random_rows(20, 8))
    done = om(database, "backfill")
    assert done.returncode == 0, done.log
    assert "is of type vector already, nothing to do" in done.stderr
    assert "alembic upgrade head gives it the dimensions" in done.stderr
    done = om(database, "verify")
    assert done.returncode == 0, done.log
    assert "20; none compared: there are no bytes" in done.stdout
    done = om(database, "tune")
    assert done.returncode == 1
    assert 'column "v" of' in done.stderr
    assert om(database, "report").returncode == 1
    assert column_type(database, "v") == "vector"
