"""R7: a loop that changes nothing any more ends with an error that names rows and what keeps them."""

from __future__ import annotations

import re
from contextlib import closing

import pytest

from demo.openmemory import TABLE
from openmemory_migrations.db.tries import TRIES
from openmemory_migrations.embedded import Server
from tests.support.openmemory import Database, create_table, load, mismatches, random_rows
from tests.support.scripts import DIM8, SINGLE, offline, psql, script, start_psql
from tests.support.sessions import eventually
from tests.support.states import BACKFILL, EXPAND, HEAD, stamp

TRIGGER = f"""
CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN %s; END';
CREATE TRIGGER hold BEFORE UPDATE ON {TABLE} FOR EACH ROW WHEN (OLD.user_id = 'user7') EXECUTE FUNCTION hold()
"""
KEPT = {
    "no row": (TRIGGER % "RETURN NULL", "trigger hold"),
    "no vector": (TRIGGER % "NEW.v_vector := NULL; RETURN NEW", "trigger hold"),
}


@pytest.mark.parametrize("single", [{}, SINGLE], ids=["", "one transaction"])
@pytest.mark.parametrize("kind", KEPT)
def test_a_script_ends_where_updates_change_nothing(
    server: Server, database: Database, kind: str, single: dict[str, str]
) -> None:
    sql, named = KEPT[kind]
    create_table(database)
    load(database, random_rows(60, 8))
    offline(server, database, "upgrade", EXPAND)
    database.run(sql)

    result = offline(server, database, "upgrade", f"{EXPAND}:head", env=DIM8 | single, check=False)

    assert result.returncode == 3
    assert f"ERROR:  backfill {TABLE}: 3 rows can't be updated or read\nDETAIL:  ctid=(" in result.stderr
    assert f"not changed by an UPDATE, perhaps because of {named}." in result.stderr
    assert stamp(database) == [EXPAND]
    assert database.value(f"SELECT count(v_vector) FROM {TABLE}") == (0 if single else 57)


@pytest.mark.parametrize("before", [[], [EXPAND]], ids=["before any change", "since the first step"])
def test_a_script_names_a_rule_that_keeps_the_result_of_updates_from_being_seen(
    server: Server, database: Database, before: list[str]
) -> None:
    create_table(database)
    load(database, random_rows(60, 8))
    if before:
        offline(server, database, "upgrade", EXPAND)
    database.run(f"CREATE RULE hold AS ON UPDATE TO {TABLE} WHERE old.user_id = 'user7' DO INSTEAD NOTHING")

    rest = f"{EXPAND}:head" if before else "head"

    said = offline(server, database, "upgrade", rest, check=False).stderr

    assert f'ERROR:  rule "hold" on public.{TABLE} rewrites each UPDATE\n' in said
    assert (stamp(database) or []) == before
    (named,) = re.findall(r"HINT:  (ALTER TABLE .*?);", said)
    database.run(named)
    offline(server, database, "upgrade", rest)
    assert mismatches(database) == []


@pytest.mark.parametrize("kind", KEPT)
def test_without_the_sync_trigger_they_are_told_from_rows_that_are_written_meanwhile(
    server: Server, database: Database, kind: str
) -> None:
    env = DIM8 | {"OM_SYNC_TRIGGER": "off"}
    create_table(database)
    load(database, random_rows(60, 8))
    offline(server, database, "upgrade", EXPAND, env=env)
    # for each row that is converted the application writes another, so each pass converts some
    database.run(
        f"""
        CREATE FUNCTION busy() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN INSERT INTO {TABLE} VALUES (gen_random_uuid(), 'new', 'new', new.v, 8); RETURN NULL; END $$;
        CREATE TRIGGER busy AFTER UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION busy();
        {KEPT[kind][0]}
        """
    )

    said = offline(server, database, "upgrade", f"{EXPAND}:head", env=env, check=False).stderr

    assert f"ERROR:  backfill {TABLE}: 3 rows can't be updated or read\n" in said
    assert stamp(database) == [EXPAND]
    database.run(f"DROP TRIGGER hold ON {TABLE}")
    said = offline(server, database, "upgrade", f"{EXPAND}:head", env=env).stderr
    assert "rows were written during the backfill" in said
    assert stamp(database) == [HEAD]


@pytest.mark.parametrize(
    ("command", "mode", "single"),
    [(("upgrade", "head"), "ACCESS EXCLUSIVE", {}), (("downgrade", f"{HEAD}:base"), "ACCESS SHARE", SINGLE)],
    ids=["first lock", "index"],
)
def test_a_script_gives_up_a_lock_after_so_many_tries_and_names_who_holds_it(
    server: Server, database: Database, command: tuple[str, str], mode: str, single: dict[str, str]
) -> None:
    create_table(database)
    load(database, random_rows(60, 8))
    if single:
        offline(server, database, "upgrade", "head")
    stamped = stamp(database)
    text = script(*command, env=DIM8 | single | {"OM_LOCK_TIMEOUT_MS": "50"})
    text = text.replace(f"1..{TRIES}", "1..2").replace(f"attempt = {TRIES}", "attempt = 2")

    with closing(database.connect()) as holder, holder.cursor() as cursor:
        holder.autocommit = False
        cursor.execute(f"LOCK TABLE {TABLE} IN {mode} MODE")
        said = psql(server, database, text, *["-1"] * bool(single), check=False).stderr
        pid = holder.info.backend_pid

    assert f'ERROR:  no lock on table "public.{TABLE}" in {TRIES} tries of 50 ms\nDETAIL:  Locks on the' in said
    # as an online run has it
    assert f'process {pid} ("", role postgres, idle in transaction, query started ' in said
    assert stamp(database) == stamped


def test_a_script_gives_up_a_lock_that_is_taken_while_it_waits_for_rows(server: Server, database: Database) -> None:
    """After more passes than there are tries of a lock."""
    create_table(database)
    load(database, random_rows(60, 8))
    offline(server, database, "upgrade", EXPAND)
    text = script("upgrade", f"{EXPAND}:{BACKFILL}", env=DIM8 | {"OM_LOCK_TIMEOUT_MS": "50"})
    for left, right in (
        (f"attempt >= {TRIES} - 1", "attempt >= 2"),
        (f"1..{TRIES}", "1..2"),
        (f"attempt = {TRIES}", "attempt = 2"),
    ):
        text = text.replace(left, right)
    resting = "SELECT xact_start FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()"
    rests = set[object]()

    def rested() -> bool:
        rests.update(database.rows(resting))
        return len(rests) > 3

    with closing(database.connect()) as rows, closing(database.connect()) as table:
        rows.autocommit = table.autocommit = False
        with rows.cursor() as cursor:
            cursor.execute(f"SELECT FROM {TABLE} LIMIT 1 FOR UPDATE")
        process = start_psql(server, database, text)
        try:
            eventually(rested)
            rows.rollback()
            with table.cursor() as cursor:
                cursor.execute(f"LOCK TABLE {TABLE} IN ACCESS EXCLUSIVE MODE")
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()

    assert f'ERROR:  no lock on table "public.{TABLE}" in ' in said or "ERROR:  canceling statement due to lock" in said
    assert stamp(database) == [EXPAND]
