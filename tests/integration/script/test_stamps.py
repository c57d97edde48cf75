"""A script stamps nothing that has failed, whatever the settings of psql, or whatever else runs it."""

from __future__ import annotations

import re
from contextlib import closing

import psycopg2
import pytest

from demo.openmemory import TABLE
from openmemory_migrations.embedded import Server
from tests.support.openmemory import Database, create_table, load, random_rows
from tests.support.scripts import DIM8, SINGLE, offline, psql, script
from tests.support.states import BACKFILL, EXPAND, HEAD, column_type, stamp

WRONG = {"OM_VEC_DIM": "9"}
SETTINGS = {
    "goes on": [],
    "savepoints": ["-v", "ON_ERROR_ROLLBACK=on"],
    "no autocommit": ["-v", "AUTOCOMMIT=off"],
    "-1": ["-1"],
    "-1, savepoints": ["-1", "-v", "ON_ERROR_ROLLBACK=on"],
}
HOLD = f"""
CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
CREATE TRIGGER hold BEFORE UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION hold()
"""
NO_INDEX = """
CREATE OR REPLACE FUNCTION no_index() RETURNS event_trigger LANGUAGE plpgsql AS
  $$ BEGIN RAISE EXCEPTION 'no'; END $$;
CREATE EVENT TRIGGER no_index ON ddl_command_start WHEN tag IN ('CREATE INDEX') EXECUTE FUNCTION no_index()
"""


@pytest.fixture
def table(database: Database) -> Database:
    create_table(database)
    load(database, random_rows(60, 8))
    return database


@pytest.mark.parametrize("single", [{}, SINGLE], ids=["", "one transaction"])
@pytest.mark.parametrize("options", SETTINGS)
def test_what_has_failed_is_not_stamped(server: Server, table: Database, options: str, single: dict[str, str]) -> None:
    def run(*command: str, env: dict[str, str]) -> None:
        text = script(*command, env=DIM8 | env | single)
        psql(server, table, text, "-v", "ON_ERROR_STOP=0", *SETTINGS[options], check=False)

    run("upgrade", "head", env=WRONG)
    assert stamp(table) in (None, [])
    assert column_type(table) is None
    table.run("DROP TABLE IF EXISTS openmemory_alembic_version")

    offline(server, table, "upgrade", "head")
    run("upgrade", "head", env={})
    assert stamp(table) == [HEAD]

    table.run(f"INSERT INTO {TABLE} VALUES (gen_random_uuid(), 'own', 'u', NULL, 8)")
    table.run(f"UPDATE {TABLE} SET v_vector = '[1,2,3,4,5,6,7,8]' WHERE v IS NULL")
    run("downgrade", f"{EXPAND}:base", env={})
    assert stamp(table) == [HEAD]
    assert column_type(table) == "vector(8)"


def test_without_autocommit_a_script_runs_as_ever(server: Server, table: Database) -> None:
    psql(server, table, script("upgrade", "head", env=DIM8), "-v", "AUTOCOMMIT=off")
    assert stamp(table) == [HEAD]


def test_for_one_transaction_the_first_statement_fails_without_one(server: Server, table: Database) -> None:
    result = psql(server, table, script("upgrade", "head", env=DIM8 | SINGLE), check=False)

    assert result.returncode == 3
    assert "LOCK TABLE can only be used in transaction blocks" in result.stderr
    assert stamp(table) is None


@pytest.mark.parametrize("command", [("upgrade", "head"), ("downgrade", f"{HEAD}:base")])
def test_a_runner_that_goes_on_without_a_transaction_changes_and_stamps_nothing(
    server: Server, table: Database, command: tuple[str, str]
) -> None:
    stamped = None if command[0] == "upgrade" else [HEAD]
    if stamped:
        offline(server, table, "upgrade", "head")
    column = column_type(table)

    result = psql(server, table, script(*command, env=DIM8 | SINGLE), "-v", "ON_ERROR_STOP=0", check=False)

    assert (
        "not run: what comes before it in this script has failed, or was in another transaction\nHINT:  OM_SINGLE_"
        in result.stderr
    )
    assert "not stamped: what comes before it in this script has failed" in result.stderr
    assert stamp(table) == (stamped or [])
    assert column_type(table) == column


def test_a_runner_that_sends_all_in_one_message_has_a_transaction(table: Database) -> None:
    text = script("upgrade", "head", env=DIM8 | SINGLE)
    with closing(psycopg2.connect(table.url)) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        cursor.execute(text)
    assert stamp(table) == [HEAD]


AT_A_TERMINAL = re.compile(r"\\set ON_ERROR_STOP on")  # has no effect there


def pasted(server: Server, database: Database, text: str, *options: str) -> str:
    return psql(server, database, AT_A_TERMINAL.sub("", text), "-v", "ON_ERROR_STOP=0", *options, check=False).stderr


@pytest.mark.parametrize("options", ["goes on", "savepoints", "no autocommit"])
def test_at_a_terminal_nothing_is_stamped_or_run_after_what_has_failed(
    server: Server, table: Database, options: str
) -> None:
    text = script("upgrade", "head", env=DIM8)
    table.run(HOLD)
    said = pasted(server, table, text, *SETTINGS[options])
    assert "not stamped: what comes before it in this script has failed, or was in another session\nHINT:" in said
    assert stamp(table) == [EXPAND]
    assert table.value("SELECT to_regclass('openmemory_vectors_vvector_idx')") is None

    table.run(f"DROP TRIGGER hold ON {TABLE}")
    pasted(server, table, script("upgrade", f"{EXPAND}:head", env=DIM8), *SETTINGS[options])
    assert stamp(table) == [HEAD]


def test_a_statement_of_psqls_own_that_has_failed_is_not_stamped(server: Server, table: Database) -> None:
    table.run("CREATE EXTENSION vector")
    table.run(NO_INDEX)
    pasted(server, table, script("upgrade", "head", env=DIM8))
    assert stamp(table) == [BACKFILL]

    table.run("DROP EVENT TRIGGER no_index")
    offline(server, table, "upgrade", f"{BACKFILL}:head")
    table.run(NO_INDEX.replace("ddl_command_start", "sql_drop").replace("CREATE INDEX", "DROP INDEX"))
    pasted(server, table, script("downgrade", f"{HEAD}:base", env=DIM8))
    assert stamp(table) == [HEAD]
    assert column_type(table) == "vector(8)"


def test_a_connection_that_is_lost_in_between_ends_it(server: Server, table: Database) -> None:
    text = script("upgrade", "head", env=DIM8)
    again = text.replace("BEGIN;\n\nDO ", "\\connect\nBEGIN;\n\nDO ", 1)
    assert again != text
    said = pasted(server, table, again)
    assert "not stamped: " in said
    assert stamp(table) == [EXPAND]
