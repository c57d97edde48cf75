"""The scripts leave a `v` that is a vector itself, its index and all that it had, as the online runs do."""

from __future__ import annotations

import pytest

from demo.openmemory import TABLE
from openmemory_migrations.embedded import Server
from tests.support.commands import alembic
from tests.support.databases import Databases
from tests.support.native import INDEX, START, NewerWriter, create_newer, filenode, typed, wrong
from tests.support.openmemory import Database, Row, random_rows
from tests.support.scripts import DIM8, SINGLE, assert_same, everything, offline, script, start_psql, twins
from tests.support.sessions import eventually
from tests.support.states import BACKFILL, EXPAND, HEAD, column_type, indexes, stamp
from tests.support.writers import writing

ONE = pytest.mark.parametrize("single", [{}, SINGLE], ids=["", "one transaction"])
DATA = random_rows(500, 8)
BESIDE = f"""
ALTER TABLE {TABLE} ALTER v SET NOT NULL, ALTER v SET DEFAULT '[1,2,3,4,5,6,7,8]', ALTER v SET STORAGE MAIN,
                    ALTER v SET STATISTICS 7;
COMMENT ON COLUMN {TABLE}.v IS 'what it''s for';
GRANT SELECT (v), UPDATE (v) ON {TABLE} TO pg_monitor WITH GRANT OPTION;
GRANT SELECT (v) ON {TABLE} TO PUBLIC
"""


@pytest.mark.slow
@ONE
@pytest.mark.parametrize("rows", [[], DATA], ids=["empty", "rows"])
def test_the_script_leaves_what_the_online_run_leaves_of_a_v(
    server: Server, databases: Databases, single: dict[str, str], rows: list[Row]
) -> None:
    def prepare(database: Database) -> None:
        create_newer(database, rows)
        database.run(BESIDE)

    with twins(databases, prepare) as (online, by_script):
        for step in (EXPAND, BACKFILL, HEAD):
            alembic(online, "upgrade", step, env=DIM8)
            done = (stamp(by_script) or [""])[0]
            offline(server, by_script, "upgrade", f"{done}:{step}" if done else step, env=DIM8 | single)
            assert_same(everything(online), everything(by_script))
            assert wrong(by_script, rows) == []
        assert list(indexes(by_script)) == [INDEX]
        by_script.run(START)
        rewritten = filenode(by_script)
        alembic(online, "downgrade", "base", env=DIM8)
        offline(server, by_script, "downgrade", f"{HEAD}:base", env=DIM8 | single)
        assert_same(everything(online), everything(by_script))
        assert filenode(by_script) == rewritten
        assert column_type(by_script, "v") == "vector"
        assert wrong(by_script, rows) == []


@pytest.mark.slow
@ONE
@pytest.mark.parametrize(
    "sql",
    [
        f"INSERT INTO {TABLE} VALUES (gen_random_uuid(), 'semantic', 'u', 'p', '[1,2,3]', 3)",
        f"CREATE VIEW shown AS SELECT v FROM {TABLE}",
        f"ALTER TABLE {TABLE} ADD v_typed text",
        f"DELETE FROM {TABLE}; ALTER TABLE {TABLE} ALTER v TYPE vector(9)",
    ],
)
def test_what_can_not_be_given_dimensions_stops_the_script_before_any_change(
    server: Server, database: Database, single: dict[str, str], sql: str
) -> None:
    create_newer(database, DATA[:20])
    database.run(sql)
    before = everything(database)

    done = offline(server, database, "upgrade", "head", env=DIM8 | single, check=False)

    assert done.returncode != 0
    after = everything(database)
    assert {what: after[what] for what in before if after[what] != before[what] and "version" not in what} in (
        {},
        {"stamp": []},
    )
    assert alembic(database, "upgrade", "head", env=DIM8, check=False).returncode != 0


@pytest.mark.slow
def test_between_expand_and_backfill_the_script_takes_it_back(server: Server, database: Database) -> None:
    create_newer(database, DATA)
    before = everything(database)
    offline(server, database, "upgrade", EXPAND)
    assert typed(database) == 0

    offline(server, database, "downgrade", f"{EXPAND}:base")

    after = everything(database)
    assert {what for what in before if after[what] != before[what]} <= {"version table", "stamp"}


@pytest.mark.slow
def test_a_trigger_for_replicas_only_is_none_for_the_script(server: Server, database: Database) -> None:
    create_newer(database, DATA)
    offline(server, database, "upgrade", EXPAND)
    database.run(f"ALTER TABLE {TABLE} ENABLE REPLICA TRIGGER {TABLE}_v_typed_sync")

    done = offline(server, database, "upgrade", f"{EXPAND}:head", check=False)

    assert done.returncode != 0
    assert "has been disabled or dropped meanwhile" in done.stderr
    assert (column_type(database, "v"), wrong(database, DATA)) == ("vector", [])


@pytest.mark.slow
def test_writers_beside_a_script_that_is_killed_and_run_again(server: Server, database: Database) -> None:
    rows = random_rows(4_000, 8)
    create_newer(database, rows)
    with writing(database, rows, kind=NewerWriter) as writers:
        offline(server, database, "upgrade", EXPAND)
        text = script("upgrade", f"{EXPAND}:head", env=DIM8 | {"BACKFILL_BATCH": "20"})
        process = start_psql(server, database, text)
        eventually(lambda: typed(database) > 300)
        process.kill()
        process.communicate()
        offline(server, database, "upgrade", f"{EXPAND}:head")
        offline(server, database, "downgrade", "head:base")
        database.run("DROP TABLE openmemory_alembic_version")  # which the script creates
        offline(server, database, "upgrade", "head")

    assert wrong(database, {key: v for writer in writers for key, v in writer.rows.items()}) == []
    assert column_type(database, "v") == "vector(8)"
