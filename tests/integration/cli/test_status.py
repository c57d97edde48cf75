"""`openmemory-migrations status`: where the migration stands, at every point of its way, and what to do next."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from typing import Any

import psycopg2
import pytest

from demo.openmemory import TABLE
from tests.support.commands import NOTHING, alembic, om, result, start_alembic, start_om
from tests.support.openmemory import Database, create_table, load, pack, random_rows
from tests.support.sessions import converted, eventually
from tests.support.states import EXPAND, HEAD, INDEX, INVALIDATE

ROWS, DIM = 1000, 16


@pytest.fixture
def table(database: Database) -> Database:
    create_table(database)
    load(database, random_rows(ROWS, DIM))
    return database


def status(database: Database, code: int, *args: str, env: Mapping[str, str] = NOTHING) -> dict[str, Any]:
    done = om(database, "status", "--json", *args, env=env)
    assert done.returncode == code, done.log
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["fine"] == (code == 0)
    return found


def test_from_the_beginning_to_the_end(table: Database) -> None:
    found = status(table, 1)
    assert found["revisions"] is None
    assert found["column"]["type"] is None
    assert found["rows"] is None
    assert found["next"] == "openmemory-migrations upgrade"

    alembic(table, "upgrade", EXPAND)
    found = status(table, 1)
    assert found["revisions"] == [EXPAND]
    assert found["column"] == {"name": "v_vector", "type": "vector", "dimensions": DIM, "ours": True}
    assert found["rows"] == {"total": ROWS, "converted": 0, "pending": ROWS, "skipped": {}, "without_source": 0}
    assert found["trigger"] is True
    assert found["next"] == "openmemory-migrations upgrade"

    alembic(table, "upgrade", "head")
    found = status(table, 0)
    assert found["revisions"] == [HEAD]
    assert found["at_head"] is True
    assert found["rows"]["converted"] == ROWS
    (index,) = found["indexes"]
    assert (index["name"], index["method"], index["valid"]) == (INDEX, "ivfflat", True)
    assert index["bytes"] > 8192
    assert found["next"] == "nothing"

    alembic(table, "downgrade", "base")
    found = status(table, 1)
    assert found["revisions"] == []
    assert found["next"] == "openmemory-migrations upgrade"


@pytest.mark.slow
def test_rows_by_what_they_are(table: Database) -> None:
    alembic(table, "upgrade", "head")
    table.run(f"ALTER TABLE {TABLE} DISABLE TRIGGER USER")
    table.run(f"UPDATE {TABLE} SET v = %s, v_vector = NULL WHERE user_id = 'user1'", pack([float("nan")] * DIM))
    table.run(f"UPDATE {TABLE} SET v = %s, v_vector = NULL WHERE user_id = 'user2'", b"\1\2\3")
    table.run(f"UPDATE {TABLE} SET v = NULL WHERE user_id = 'user3'")
    table.run(f"UPDATE {TABLE} SET v_vector = NULL WHERE user_id = 'user4'")

    found = status(table, 1)

    share = ROWS // 20
    assert found["rows"] == {
        "total": ROWS,
        "converted": ROWS - 3 * share,
        "pending": share,
        "skipped": {"NaN or infinite values": share, "length not a multiple of 4": share},
        "without_source": share,
    }
    assert found["trigger"] is False
    assert found["next"] == "openmemory-migrations backfill"

    assert om(table, "backfill").returncode == 0
    found = status(table, 1)
    assert found["rows"]["pending"] == 0
    assert found["next"].endswith("is disabled: openmemory-migrations repair")
    status(table, 0, env={"OM_SYNC_TRIGGER": "off"})
    assert om(table, "repair").returncode == 0
    assert status(table, 0)["next"] == "nothing"


@pytest.mark.slow
def test_an_index_that_is_wanted_and_one_that_is_not(table: Database) -> None:
    alembic(table, "upgrade", "head", env={"OM_INDEX": "none"})

    status(table, 0, env={"OM_INDEX": "none"})
    assert status(table, 0, "-x", "index=none")["indexes"] == []
    assert status(table, 1)["next"] == "openmemory-migrations index"

    assert om(table, "index").returncode == 0
    assert status(table, 0)["next"] == "nothing"
    table.run(INVALIDATE)
    found = status(table, 1)
    assert found["indexes"][0]["valid"] is False
    assert found["next"] == "openmemory-migrations index"
    assert "INVALID" in om(table, "status").stdout


@pytest.mark.slow
def test_an_index_that_is_not_as_the_settings_want_it_is_fine_with_a_remark(table: Database) -> None:
    alembic(table, "upgrade", "head")

    found = status(table, 0, "-x", "index=hnsw")
    assert found["next"] == "nothing; openmemory-migrations index makes it hnsw (m = 16, ef_construction = 64)"
    assert "valid, but not as the settings want it" in om(table, "status", "-x", "index=hnsw").stdout
    assert status(table, 0, "-x", "index=none")["next"] == "nothing; openmemory-migrations index drops it"

    assert om(table, "index", "-x", "index=hnsw").returncode == 0
    assert status(table, 0, "-x", "index=hnsw")["next"] == "nothing"
    table.run(f"CREATE INDEX {INDEX}_old ON {TABLE} USING hnsw (v_vector vector_ip_ops)")
    found = status(table, 1, "-x", "index=hnsw")
    assert [index["name"] for index in found["indexes"]] == [INDEX, f"{INDEX}_old"]
    assert f"clears up {INDEX}_old, which an interrupted run has left" in found["next"]


@pytest.mark.slow
@pytest.mark.parametrize("rows", [0, 1])
def test_a_table_with_hardly_a_row(database: Database, rows: int) -> None:
    create_table(database)
    load(database, random_rows(rows, DIM))
    alembic(database, "upgrade", "head", env={"OM_VEC_DIM": str(DIM)})

    found = status(database, 0)

    assert found["rows"]["total"] == found["rows"]["converted"] == rows
    assert "ivfflat needs 50 rows" in om(database, "status").stdout


@pytest.mark.slow
def test_while_a_run_is_going_on(table: Database) -> None:
    alembic(table, "upgrade", EXPAND)
    process = start_alembic(table, "upgrade", "head", env={"BACKFILL_BATCH": "10", "OM_BACKFILL_PAUSE_MS": "150"})
    eventually(lambda: converted(table) > 20)

    found = status(table, 1)

    assert 0 < found["rows"]["converted"] < ROWS
    assert any(run["application_name"].startswith("openmemory-migrations") for run in found["runs"])
    assert found["next"] == "wait for what is running; openmemory-migrations upgrade"
    assert "running:" in om(table, "status").stdout
    assert result(process).returncode == 0
    status(table, 0)


@pytest.mark.slow
def test_what_an_application_finds(table: Database) -> None:
    alembic(table, "upgrade", "head")

    found = status(table, 0)

    assert found["found_by_application"] is False
    assert table.rows(found["detection"]) == [("vector",)]


@pytest.mark.slow
def test_in_a_hosts_chain_the_stamp_is_where_only_the_host_knows(table: Database) -> None:
    alembic(table, "upgrade", "head")
    table.run("DROP TABLE openmemory_alembic_version")

    found = status(table, 0)

    assert found["revisions"] is None
    assert "a host's chain" in om(table, "status").stdout


@pytest.mark.slow
def test_v_that_is_a_vector_already(database: Database) -> None:
    database.run(f"CREATE EXTENSION vector; CREATE TABLE {TABLE} (id uuid, sector text, v vector(3), dim integer)")

    assert status(database, 1)["next"] == "openmemory-migrations index"
    database.run(f"CREATE INDEX openmemory_vectors_hnsw_idx ON {TABLE} USING hnsw (v vector_cosine_ops)")
    assert status(database, 0)["next"] == "nothing"


@pytest.mark.slow
def test_it_changes_nothing(table: Database) -> None:
    alembic(table, "upgrade", EXPAND)
    before = table.rows(f"SELECT ctid, xmin FROM {TABLE} ORDER BY 1")
    role = f"reader_{table.name}"
    table.run(f"CREATE ROLE {role} LOGIN; GRANT SELECT ON {TABLE}, openmemory_alembic_version TO {role}")
    try:
        reader = Database(table.name, table.url.replace("postgres@", f"{role}@"))
        found = status(reader, 1)
        assert found["rows"]["pending"] == ROWS
    finally:
        table.run(f"DROP OWNED BY {role}; DROP ROLE {role}")
    assert table.rows(f"SELECT ctid, xmin FROM {TABLE} ORDER BY 1") == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setup", "env", "code", "said"),
    [
        ("SELECT", {"OM_DATABASE_URL": ""}, 2, "no database is configured"),
        ("SELECT", {"OM_INDEX": "btree"}, 2, "OM_INDEX must be ivfflat, hnsw or none"),
        ("SELECT", {"OM_VECTOR_TABLE": "elsewhere"}, 1, 'table "public.elsewhere" does not exist'),
        (f"ALTER TABLE {TABLE} DROP COLUMN v", {}, 1, 'has no column "v"'),
        ("REVOKE CONNECT ON DATABASE {name} FROM PUBLIC", {"OM_DATABASE_URL": "{stranger}"}, 2, "does not exist"),
    ],
)
def test_what_can_not_be_looked_at(table: Database, setup: str, env: Mapping[str, str], code: int, said: str) -> None:
    table.run(setup.format(name=table.name))
    stranger = table.url.replace("postgres@", "nobody_here@")

    done = om(table, "status", env={name: value.format(stranger=stranger) for name, value in env.items()})

    assert (done.returncode, done.stdout) == (code, ""), done.log
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_it_can_be_stopped(table: Database) -> None:
    process = start_om(table, "status")
    process.terminate()
    assert result(process).returncode != 0


def test_a_connection_that_a_pooler_keeps_is_no_run(database: Database) -> None:
    create_table(database)
    load(database, random_rows(60, 8))
    alembic(database, "upgrade", "head")
    with closing(psycopg2.connect(database.url, application_name="openmemory-migrations")) as kept:
        kept.cursor().execute("SELECT 1")
        kept.commit()
        assert json.loads(om(database, "status", "--json").stdout)["next"] == "nothing"
        kept.cursor().execute("SELECT pg_advisory_lock(1)")
        kept.commit()
        assert "running:" in om(database, "status").stdout
