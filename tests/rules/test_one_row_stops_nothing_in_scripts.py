"""R10: a row that is refused, unreadable or locked is named, never shown; all others are converted."""

from __future__ import annotations

import time
from contextlib import closing

import pytest

from demo.openmemory import TABLE
from openmemory_migrations.embedded import Server
from tests.support.adopted import SCRIPTS, by_hand
from tests.support.openmemory import Database, create_table, load, mismatches, random_rows
from tests.support.scripts import DIM8, offline, script, start_psql
from tests.support.sessions import eventually
from tests.support.states import EXPAND, HEAD, column_type, stamp

REST = f"{EXPAND}:head"
CONSTRAINT_TRIGGER = f"""
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
  $$ BEGIN RAISE EXCEPTION 'not %', NEW.user_id USING ERRCODE = 'P7777'; END $$;
CREATE CONSTRAINT TRIGGER refuse AFTER UPDATE ON {TABLE} DEFERRABLE INITIALLY DEFERRED
  FOR EACH ROW WHEN (OLD.user_id = 'user7') EXECUTE FUNCTION refuse()
"""
REFUSED = {
    "CHECK": (f"ALTER TABLE {TABLE} ADD CONSTRAINT named CHECK (user_id <> 'user7') NOT VALID", "23514 named"),
    "deferred": (CONSTRAINT_TRIGGER, "P7777"),
    "denied": (CONSTRAINT_TRIGGER.replace("P7777", "42501"), "42501"),
}


@pytest.fixture
def table(database: Database, server: Server) -> Database:
    create_table(database)
    load(database, random_rows(60, 8))
    offline(server, database, "upgrade", EXPAND)
    return database


@pytest.mark.parametrize("kind", REFUSED)
def test_a_script_names_rows_that_are_refused_after_all_others(server: Server, table: Database, kind: str) -> None:
    sql, state = REFUSED[kind]
    table.run(sql)
    place = table.value(f"SELECT min(ctid) FROM {TABLE} WHERE user_id = 'user7'")

    result = offline(server, table, "upgrade", REST, check=False)

    assert result.returncode == 3
    assert f"{TABLE}: 3 rows can't be updated or read\nDETAIL:  ctid={place}: SQLSTATE {state}; " in result.stderr
    assert "user7" not in result.stderr
    assert stamp(table) == [EXPAND]
    assert table.value(f"SELECT count(v_vector) FROM {TABLE}") == 57
    assert len(mismatches(table)) == 3


def test_a_script_names_rows_whose_value_can_not_be_read(server: Server, database: Database) -> None:
    create_table(database)
    table = {"OM_VEC_DIM": "512"}
    rows = random_rows(20, 512)
    database.run(f"ALTER TABLE {TABLE} ALTER v SET STORAGE EXTERNAL")
    load(database, rows[:1])
    # the others are read, and all are written, without what is lost next
    database.run(f"ALTER TABLE {TABLE} ALTER v SET STORAGE MAIN")
    load(database, rows[1:])
    offline(server, database, "upgrade", EXPAND, env=table)
    database.run(f"ALTER TABLE {TABLE} ALTER v_vector SET STORAGE MAIN; CREATE TABLE other (v bytea)")
    file = "SELECT t.relfilenode FROM pg_class c JOIN pg_class t ON t.oid = c.reltoastrelid WHERE c.relname = 'other'"
    toast = f"SELECT reltoastrelid FROM pg_class WHERE relname = '{TABLE}'"
    database.run(f"SET allow_system_table_mods = on; UPDATE pg_class SET relfilenode = ({file}) WHERE oid = ({toast})")

    result = offline(server, database, "upgrade", REST, env=table, check=False)

    assert f"{TABLE}: 1 rows can't be updated or read\nDETAIL:  ctid=(0,1): SQLSTATE XX001. All" in result.stderr
    assert stamp(database) == [EXPAND]
    assert database.value(f"SELECT count(v_vector) FROM {TABLE}") == 19


WAITS = f"""
CREATE TABLE other (id integer); INSERT INTO other VALUES (1);
CREATE FUNCTION waits() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM FROM other FOR UPDATE; RETURN NEW; END $$;
CREATE TRIGGER waits BEFORE UPDATE ON {TABLE} FOR EACH ROW WHEN (NEW.user_id = 'user7') EXECUTE FUNCTION waits()
"""


@pytest.mark.parametrize(
    "elsewhere",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["themselves", "what a trigger wants for them"],
)
def test_a_script_comes_back_to_rows_that_were_locked(server: Server, table: Database, elsewhere: bool) -> None:
    if elsewhere:
        table.run(WAITS)
    with closing(table.connect()) as holder, holder.cursor() as cursor:
        holder.autocommit = False
        locked = "other" if elsewhere else f"{TABLE} WHERE user_id = 'user7'"
        cursor.execute(f"SELECT FROM {locked} FOR UPDATE")
        process = start_psql(server, table, script("upgrade", REST, env=DIM8))
        try:
            eventually(lambda: table.value(f"SELECT count(v_vector) FROM {TABLE}") == 57)
            holder.rollback()
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()

    assert process.returncode == 0, said
    assert stamp(table) == [HEAD]
    assert mismatches(table) == []


def test_a_value_without_source_that_is_refused_stays_where_it_is(server: Server, database: Database) -> None:
    by_hand(database, SCRIPTS["no dimension"])
    own = "'[1,2,3,4,5,6,7,8]'"
    for user in ("user7", "other"):
        database.run(f"INSERT INTO {TABLE} VALUES (gen_random_uuid(), 'own', '{user}', NULL, 8)")
        database.run(f"UPDATE {TABLE} SET v_vector = {own} WHERE v IS NULL AND user_id = '{user}'")
    offline(server, database, "upgrade", EXPAND)
    database.run(REFUSED["CHECK"][0] + f"; UPDATE {TABLE} SET user_id = 'else' WHERE v IS NOT NULL")

    result = offline(server, database, "upgrade", REST, check=False)

    assert f"{TABLE}: 1 rows can't be updated or read" in result.stderr
    assert database.value(f"SELECT count(*) FROM {TABLE} WHERE v IS NULL AND v_vector = {own}") == 1
    assert database.value(f"SELECT count(*) FROM {TABLE} WHERE v IS NULL AND v_vector_adopted = {own}") == 2
    assert column_type(database, "v_vector_adopted") == "vector"


@pytest.mark.slow
def test_rows_that_others_change_meanwhile_are_no_obstacle(server: Server, database: Database) -> None:
    """In other columns, between the snapshot of a batch and its lock on the row."""
    create_table(database)
    load(database, random_rows(1000, 1536))
    up = script("upgrade", "head", env={"OM_VEC_DIM": "1536", "OM_INDEX": "none"})
    ids = [id for (id,) in database.rows(f"SELECT id FROM {TABLE} ORDER BY random()")]
    process = start_psql(server, database, up)
    with closing(database.connect()) as connection, connection.cursor() as cursor:
        for id in ids:
            if process.poll() is not None:
                break
            cursor.execute(f"UPDATE {TABLE} SET user_id = 'touched' WHERE id = %s", (id,))
            time.sleep(0.02)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 0, log
    assert mismatches(database, dim=1536) == []


def test_a_statement_that_is_refused_without_a_row_ends_the_script(server: Server, database: Database) -> None:
    create_table(database)
    load(database, random_rows(60, 8))
    offline(server, database, "upgrade", EXPAND)
    database.run(
        "CREATE FUNCTION deny() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not today'; END $$;"
        f"CREATE TRIGGER deny BEFORE UPDATE ON {TABLE} FOR EACH STATEMENT EXECUTE FUNCTION deny()"
    )

    refused = offline(server, database, "upgrade", f"{EXPAND}:head", check=False)

    assert refused.returncode == 3
    assert "ERROR:  not today" in refused.stderr
    assert "rows can't be updated" not in refused.stderr
