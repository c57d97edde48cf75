"""R3: READ COMMITTED, set by us: a statement that has waited for a lock sees what its holder has committed."""

from __future__ import annotations

from contextlib import closing

import pytest

from demo.openmemory import TABLE
from openmemory_migrations.embedded import Server
from tests.support.commands import alembic
from tests.support.openmemory import Database, create_table, load, random_rows
from tests.support.scripts import DIM8, SINGLE, offline, psql, psql_that_waits, script
from tests.support.states import EXPAND, HEAD, column_type, stamp

DIM = 8
NOTED = f"""
CREATE TABLE levels (level text);
CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
  $$ BEGIN INSERT INTO levels VALUES (current_setting('transaction_isolation')); RETURN NEW; END $$;
CREATE TRIGGER note BEFORE UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION note();
"""


@pytest.fixture
def table(database: Database) -> Database:
    """Whose sessions are not READ COMMITTED unless they say so."""
    create_table(database)
    load(database, random_rows(60, DIM))
    database.run(f"ALTER DATABASE {database.name} SET default_transaction_isolation = 'repeatable read'")
    return database


@pytest.mark.parametrize("single", [{}, SINGLE], ids=["", "one transaction"])
def test_a_script_sets_it_whatever_the_default_is(server: Server, table: Database, single: dict[str, str]) -> None:
    table.run(NOTED)
    env = DIM8 | {"BACKFILL_BATCH": "10"} | single

    offline(server, table, "upgrade", "head", env=env)
    assert stamp(table) == [HEAD]
    assert table.rows("SELECT DISTINCT level FROM levels") == [("read committed",)]

    offline(server, table, "downgrade", "head:base", env=env)
    assert stamp(table) == []


def test_a_script_in_a_transaction_of_another_level_is_refused(server: Server, table: Database) -> None:
    text = "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1;" + script("upgrade", "head", env=DIM8 | SINGLE) + "COMMIT;"

    said = psql(server, table, text, "-v", "ON_ERROR_STOP=0", "-v", "ON_ERROR_ROLLBACK=1", check=False).stderr

    assert "ERROR:  the transaction is not READ COMMITTED, but REPEATABLE READ\nDETAIL:  Rows that others" in said
    assert column_type(table) is None
    assert stamp(table) == []


def test_a_script_down_sees_the_values_that_were_committed_while_it_waited(server: Server, table: Database) -> None:
    offline(server, table, "upgrade", EXPAND)
    with closing(table.connect()) as writer, writer.cursor() as cursor:
        writer.autocommit = False
        cursor.execute(f"INSERT INTO {TABLE} VALUES (gen_random_uuid(), 'own', 'u', NULL, {DIM})")
        cursor.execute(f"UPDATE {TABLE} SET v_vector = '[1,2,3,4,5,6,7,8]' WHERE v IS NULL")
        waits = "SELECT FROM pg_locks WHERE mode = 'ShareRowExclusiveLock' AND NOT granted"
        down = script("downgrade", f"{EXPAND}:base", env=DIM8)
        done = psql_that_waits(server, table, down, lambda: table.rows(waits), writer.commit)

    assert done.returncode == 3
    assert "1 values have no source and would be lost" in done.stderr
    assert table.value(f"SELECT count(v_vector) FROM {TABLE}") == 1


@pytest.mark.parametrize("engine", ["client", "server"])
def test_a_run_sets_it_in_each_transaction_that_changes_the_table(table: Database, engine: str) -> None:
    """Alembic's own aside, in which nothing is changed but what a refusal takes back: version table and extension."""
    table.run(NOTED)
    table.run(
        "ALTER TABLE levels ADD command text; CREATE FUNCTION note_ddl() RETURNS event_trigger LANGUAGE plpgsql AS"
        " $$ BEGIN INSERT INTO public.levels VALUES (current_setting('transaction_isolation'), tg_tag); END $$;"
        "CREATE EVENT TRIGGER note ON ddl_command_end EXECUTE FUNCTION note_ddl()"
    )

    alembic(table, "upgrade", "head", env={"OM_BACKFILL_ENGINE": engine})
    alembic(table, "downgrade", "base")

    found = set(table.rows("SELECT command, level FROM levels WHERE command IS DISTINCT FROM 'CREATE TABLE'"))
    assert {command for command, _ in found} >= {None, "ALTER TABLE", "CREATE TRIGGER", "COMMENT"}
    own = {"CREATE EXTENSION"}
    assert {one for one in found if one[1] != "read committed" and one[0] not in own} == set()
