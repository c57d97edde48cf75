"""R7: passes end after one that has changed nothing, with an error that names rows and what keeps them as they are."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from demo.openmemory import TABLE
from tests.support.commands import NOTHING, alembic, om
from tests.support.native import create_newer
from tests.support.openmemory import Database, create_table, load, mismatches, random_rows
from tests.support.states import EXPAND, column_type, stamp

DIM = 8
ROWS = random_rows(60, DIM)
HELD = 7
HOLD = f"""
CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN IF old.user_id = 'held' THEN RETURN NULL; END IF; RETURN new; END $$;
CREATE TRIGGER hold BEFORE UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION hold();
"""
KEEP = HOLD.replace("RETURN NULL", "RETURN old")
RULE = f"CREATE RULE hold AS ON UPDATE TO {TABLE} WHERE old.user_id = 'held' DO INSTEAD NOTHING"
SOME = f"UPDATE {TABLE} SET user_id = 'held' WHERE ctid IN (SELECT ctid FROM {TABLE} LIMIT {HELD})"
OWN = f"INSERT INTO {TABLE} SELECT gen_random_uuid(), 'own', 'held', NULL, {DIM} FROM generate_series(1, {HELD})"


def bytes_table(database: Database) -> None:
    create_table(database)
    load(database, ROWS)
    database.run(SOME)
    alembic(database, "upgrade", EXPAND)


def adopted_table(database: Database) -> None:
    create_table(database)
    load(database, ROWS)
    database.run(f"CREATE EXTENSION vector; {OWN}; ALTER TABLE {TABLE} ADD v_vector vector({DIM})")
    database.run(f"UPDATE {TABLE} SET v_vector = '[1,2,3,4,5,6,7,8]' WHERE v IS NULL")
    alembic(database, "upgrade", EXPAND)


def native_table(database: Database) -> None:
    create_newer(database, ROWS)
    database.run(SOME)
    alembic(database, "upgrade", EXPAND)


@pytest.mark.parametrize(
    ("make", "engine", "hold"),
    [
        (bytes_table, "client", HOLD),
        (bytes_table, "client", KEEP),
        (bytes_table, "server", KEEP),
        (adopted_table, "client", KEEP),
        (native_table, "client", KEEP),
        (bytes_table, "server", HOLD),
        (adopted_table, "client", HOLD),
        (native_table, "client", HOLD),
    ],
)
def test_updates_that_are_swallowed_end_the_run(
    database: Database, make: Callable[[Database], None], engine: str, hold: str
) -> None:
    make(database)
    database.run(hold)

    done = alembic(database, "upgrade", "head", env={"OM_BACKFILL_ENGINE": engine}, check=False)

    assert done.returncode != 0
    assert f"{HELD} " in done.log
    assert done.log.count("(id=") == 2 * 5, "five of them, in Alembic's log and in its FAILED"
    assert "a trigger or rule of the table's" in done.log
    assert "(100 %)" not in done.log or make is not bytes_table or engine == "server"
    held = f"SELECT count(*) FROM {TABLE} WHERE user_id = 'held'"
    if make is bytes_table:
        assert database.value(f"SELECT count(*) FROM {TABLE} WHERE v_vector IS NULL") == database.value(held)
    elif make is adopted_table:
        assert column_type(database, "v_vector_adopted") is not None

    database.run(f"DROP TRIGGER hold ON {TABLE}")
    alembic(database, "upgrade", "head", env={"OM_BACKFILL_ENGINE": engine})
    if make is bytes_table:
        assert mismatches(database) == []


def test_an_undo_whose_updates_are_swallowed_ends_and_takes_nothing(database: Database) -> None:
    bytes_table(database)
    env = {"OM_CUTOVER": "drop", "OM_INDEX": "none"}
    alembic(database, "upgrade", "head", env=env)
    alembic(database, "-n", "cutover", "upgrade", "head", env=env)
    database.run(HOLD)

    done = alembic(database, "-n", "cutover", "downgrade", "base", env=env, check=False)

    assert done.returncode != 0
    assert f'FAILED: {HELD} rows of "public.openmemory_vectors" still have no bytes' in done.log
    assert database.value(f"SELECT count(v_vector) FROM {TABLE}") == len(ROWS)
    database.run(f"DROP TRIGGER hold ON {TABLE}")
    alembic(database, "-n", "cutover", "downgrade", "base", env=env)
    assert mismatches(database) == []


def test_a_rule_that_keeps_the_result_of_updates_from_being_seen_is_refused(database: Database) -> None:
    bytes_table(database)
    database.run(RULE)
    assert (
        'FAILED: rule "hold" on public.openmemory_vectors rewrites each UPDATE'
        in alembic(database, "upgrade", "head", check=False).log
    )


def test_a_role_whose_triggers_do_not_fire_converts_all_the_same(database: Database) -> None:
    bytes_table(database)
    database.run(
        "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET session_replication_role = replica', current_database());"
        " END $$"
    )
    alembic(database, "upgrade", "head")
    assert mismatches(database) == []


@pytest.mark.parametrize(("engine", "hold"), [("client", HOLD), ("client", KEEP), ("server", HOLD), ("server", KEEP)])
def test_without_the_sync_trigger_they_are_told_from_rows_that_are_written_meanwhile(
    database: Database, engine: str, hold: str
) -> None:
    env = {"OM_SYNC_TRIGGER": "off", "OM_BACKFILL_ENGINE": engine}
    create_table(database)
    load(database, ROWS)
    alembic(database, "upgrade", EXPAND, env=env)
    # for each row that is converted the application writes another, so each pass converts some
    database.run(
        f"""
        {SOME};
        CREATE FUNCTION busy() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN INSERT INTO {TABLE} VALUES (gen_random_uuid(), 'new', 'new', new.v, {DIM}); RETURN NULL; END $$;
        CREATE TRIGGER busy AFTER UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION busy();
        {hold}
        """
    )

    done = alembic(database, "upgrade", "head", env=env, check=False)

    assert f"FAILED: {HELD} rows of" in done.log
    assert f"{HELD} (such as (id=" in done.log
    held = database.rows(f"SELECT id::text FROM {TABLE} WHERE user_id = 'held'")
    assert set(re.findall(r"\(id=([^,)]*)", done.log)) < {id for (id,) in held}
    assert stamp(database) == [EXPAND]

    database.run(f"DROP TRIGGER hold ON {TABLE}")
    log = alembic(database, "upgrade", "head", env=env).log
    assert "were written during the backfill" in log


@pytest.mark.parametrize(("setting", "code"), [(NOTHING, 1), ({"OM_ON_BAD_ROWS": "skip"}, 0)])
def test_to_pass_such_rows_by_has_to_be_said(database: Database, setting: dict[str, str], code: int) -> None:
    bytes_table(database)
    database.run(HOLD)
    assert om(database, "backfill", env=setting).returncode == code
