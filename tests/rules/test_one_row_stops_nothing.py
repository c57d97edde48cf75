"""R10: what the server refuses, can't read or has locked is passed by, named, and fails the run; all else is done."""

from __future__ import annotations

import os
import re
from contextlib import closing

import pytest

from demo.openmemory import TABLE
from openmemory_migrations import embedded
from tests.support.cases import by_turns, quickly
from tests.support.commands import alembic, om
from tests.support.native import create_newer
from tests.support.openmemory import Database, create_database, create_table, load, mismatches, random_rows
from tests.support.running import running
from tests.support.servers import OPTIONS, programs
from tests.support.sessions import eventually, logged_statements
from tests.support.states import EXPAND
from tests.support.verification import compared, verify

DIM = 8
ROWS = random_rows(300, DIM)
SECRET = "somebody@example.org"
ENGINES = ("client", "server", "native")
CHECK = f"ALTER TABLE {TABLE} ADD CONSTRAINT named CHECK (user_id <> '{SECRET}') NOT VALID"
CAST = f"""
ALTER TABLE {TABLE}
ADD CHECK (CAST(CASE user_id WHEN '{SECRET}' THEN user_id ELSE 'pg_class' END AS regclass) > 0) NOT VALID
"""
RAISE = f"""
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN IF new.user_id = '{SECRET}' THEN
 RAISE 'not %', new.user_id USING DETAIL = new::text; END IF; RETURN new; END $$;
CREATE TRIGGER refuse BEFORE UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION refuse();
"""
DENY = RAISE.replace("USING DETAIL", "USING ERRCODE = '42501', DETAIL")
OF_OURS = DENY.replace("refuse()", "openmemory_audit()")  # by its name it could be
QUOTA = RAISE.replace("USING DETAIL", "USING ERRCODE = '53400', DETAIL")
CANCEL = RAISE.replace("USING DETAIL", "USING ERRCODE = '57014', DETAIL")
ELSEWHERE = RAISE.replace("RAISE 'not %', new.user_id USING DETAIL = new::text;", "UPDATE other SET n = n;")
DEFERRED = RAISE.replace("TRIGGER refuse BEFORE", "CONSTRAINT TRIGGER refuse AFTER").replace(
    "FOR EACH", "DEFERRABLE INITIALLY DEFERRED FOR EACH"
)
REFUSALS = {
    CHECK: "check",
    CAST: "cast",
    RAISE: "trigger",
    DENY: "denied",
    OF_OURS: "named as ours",
    QUOTA: "quota",
    CANCEL: "cancel",
    DEFERRED: "deferred",
}
SAID = {
    CHECK: 'SQLSTATE 23514, constraint "named"',
    CAST: "SQLSTATE 3F000",
    DENY: "SQLSTATE 42501, in function refuse()",
    OF_OURS: "SQLSTATE 42501, in function openmemory_audit()",
    QUOTA: "SQLSTATE 53400, in function refuse()",
    CANCEL: "SQLSTATE 57014, in function refuse()",
}
LOCKED = f"SELECT FROM {TABLE} WHERE id IN ('{ROWS[2].id}', '{ROWS[200].id}') FOR UPDATE"
SECRETS = f"UPDATE {TABLE} SET user_id = '{SECRET}' WHERE ctid IN ('(0,3)', '(1,1)', '(1,2)')"


def table(database: Database, engine: str) -> str:
    """Returns the column that is to be filled."""
    if engine == "native":
        create_newer(database, ROWS)
    else:
        create_table(database)
        load(database, ROWS)
    database.run(SECRETS)
    alembic(database, "upgrade", EXPAND)
    return "v_typed" if engine == "native" else "v_vector"


@pytest.mark.parametrize(("refusal", "engine"), by_turns(tuple(REFUSALS), ENGINES, ids=tuple(REFUSALS.values())))
def test_rows_that_are_refused_are_named_and_all_others_done(database: Database, engine: str, refusal: str) -> None:
    column = table(database, engine)
    secrets = {str(id) for (id,) in database.rows(f"SELECT id FROM {TABLE} WHERE user_id = %s", SECRET)}
    database.run(refusal)

    env = {} if engine == "native" else {"OM_BACKFILL_ENGINE": engine}
    done = alembic(database, "upgrade", "head", env=env, check=False)

    assert done.returncode != 0
    assert len(secrets) == 3
    assert all(f"(id={id}, sector=" in done.log for id in secrets)
    assert "3 (such as" in done.log
    assert SAID.get(refusal, "SQLSTATE P0001, in function refuse()") in done.log
    assert SECRET not in done.log
    left = database.rows(f"SELECT id FROM {TABLE} WHERE {column} IS NULL")
    assert {str(id) for (id,) in left} == secrets
    if engine != "native":
        alembic(database, "upgrade", "head", env={"OM_ON_BAD_ROWS": "skip"})
    mended = f"UPDATE {TABLE} SET user_id = 'else'" if refusal in (CHECK, CAST) else f"DROP TRIGGER refuse ON {TABLE}"
    database.run(mended)
    alembic(database, "downgrade", EXPAND)
    alembic(database, "upgrade", "head", env=env)
    if engine != "native":
        assert mismatches(database) == []


@pytest.mark.parametrize("engine", ["server", "native"])  # whose statements SQLAlchemy executes
def test_what_a_trigger_says_is_no_lost_connection(database: Database, engine: str) -> None:
    column = table(database, engine)
    database.run(RAISE.replace("RAISE 'not %', new.user_id", "RAISE 'server closed the connection unexpectedly'"))

    env = {} if engine == "native" else {"OM_BACKFILL_ENGINE": engine}
    done = alembic(database, "upgrade", "head", env=env, check=False)

    assert "3 (such as" in done.log
    assert "was lost" not in done.log
    assert database.value(f"SELECT count(*) FROM {TABLE} WHERE {column} IS NULL") == 3


@pytest.mark.parametrize("engine", ENGINES)
def test_a_row_that_is_locked_is_waited_for_when_all_others_are_done(database: Database, engine: str) -> None:
    column = table(database, engine)
    env = {"OM_LOCK_TIMEOUT_MS": "50"} | ({} if engine == "native" else {"OM_BACKFILL_ENGINE": engine})
    with closing(database.connect()) as connection, connection.cursor() as cursor:
        connection.autocommit = False
        cursor.execute(LOCKED)
        with running(database, "upgrade", "head", env=env) as run:
            left = f"SELECT count(*) FROM {TABLE} WHERE {column} IS NULL"
            eventually(lambda: database.value(left) == 2)
            connection.commit()
            assert run.ends() == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_a_row_that_stays_locked_ends_the_run(database: Database, engine: str) -> None:
    column = table(database, engine)
    env = {"OM_LOCK_TIMEOUT_MS": "20"} | ({} if engine == "native" else {"OM_BACKFILL_ENGINE": engine})
    patch = "tries.TRIES, tries.FIRST_PAUSE = 4, 0.01"
    with closing(database.connect()) as connection, connection.cursor() as cursor:
        connection.autocommit = False
        cursor.execute(LOCKED)
        with running(database, "upgrade", "head", env=env, patch=patch) as run:
            run.ends()
            log = run.log
        pid = connection.info.backend_pid
    assert "2 rows are left" in log
    assert f"process {pid}" in log
    assert database.value(f"SELECT count(*) FROM {TABLE} WHERE {column} IS NULL") == 2


@pytest.mark.parametrize("engine", quickly(*ENGINES))
def test_what_waits_for_a_lock_elsewhere_ends_the_run_when_all_others_are_done(database: Database, engine: str) -> None:
    """Nobody has locked the row itself: its trigger can't have a lock that it needs."""
    column = table(database, engine)
    database.run(f"CREATE TABLE other AS SELECT 1 AS n; {ELSEWHERE}")
    env = {"OM_LOCK_TIMEOUT_MS": "20"} | ({} if engine == "native" else {"OM_BACKFILL_ENGINE": engine})
    patch = "tries.TRIES, tries.FIRST_PAUSE = 4, 0.01"
    with closing(database.connect()) as connection, connection.cursor() as cursor:
        connection.autocommit = False
        cursor.execute("UPDATE other SET n = 2")
        with running(database, "upgrade", "head", env=env, patch=patch) as run:
            assert run.ends() != 0
            log = run.log
    assert "3 rows are left" in log
    assert "failed with SQLSTATE 55P03, in function refuse()" in log
    assert database.value(f"SELECT count(*) FROM {TABLE} WHERE {column} IS NULL") == 3


def test_the_server_keeps_nothing_of_a_read(database: Database) -> None:
    """A subtransaction that isn't released takes 9 KB of the server's memory to the end of the transaction."""
    table(database, "client")
    with logged_statements(database) as statements:
        alembic(database, "upgrade", "head", env={"BACKFILL_BATCH": "10", "OM_BACKFILL_ENGINE": "client"})
    texts = [text for _, text in statements]
    begun = [text for text in texts if text.startswith("SAVEPOINT openmemory_migrations")]
    released = [text for text in texts if text.startswith("RELEASE SAVEPOINT openmemory_migrations")]
    assert len(begun) == len(released) > len(ROWS) // 10


@pytest.mark.slow
def test_a_value_that_cannot_be_read_is_passed_by() -> None:
    """Its row is named by the backfill, and by no command taken for a bad one."""
    with embedded.temporary(bin=programs(), options=OPTIONS) as server:
        database = create_database(server, "damaged")
        create_table(database)
        load(database, random_rows(300, 1536))
        database.run("VACUUM")
        toast = database.value(f"SELECT reltoastrelid::regclass::text FROM pg_class WHERE relname = '{TABLE}'")
        path = server.data / database.value("SELECT pg_relation_filepath(%s)", toast)

        def damage(page: int) -> None:
            """As many of its pages as one value takes, and so at least one value whole; the last one is -1."""
            server.stop()
            with open(path, "r+b") as file:
                file.seek(8192 * page, os.SEEK_SET if page >= 0 else os.SEEK_END)
                file.write(bytes(8192))
            server.start()

        damage(50)

        for engine in ("client", "server"):
            done = alembic(database, "upgrade", "head", env={"OM_BACKFILL_ENGINE": engine}, check=False)

            left = [str(id) for (id,) in database.rows(f"SELECT id FROM {TABLE} WHERE v_vector IS NULL")]
            assert done.returncode != 0
            assert 1 <= len(left) <= 4
            assert f"{len(left)} rows of" in done.log
            assert all(f"(id={id}, sector=" in done.log for id in left)
            assert "SQLSTATE XX001" in done.log
            alembic(database, "downgrade", "base")
        alembic(database, "upgrade", "head", env={"OM_ON_BAD_ROWS": "skip"})
        seen, wrong = compared(database, 1)
        assert (seen["rows"], seen["equal"]) == (300, 300 - len(left))
        assert {kind: len(keys) for kind, keys in wrong.items()} == {"unreadable": len(left)}
        damage(-5)  # of vectors
        searched = verify(database, 1)
        (unreadable,) = searched["comparison"]["wrong"]
        assert len(left) < unreadable["rows"] == 300 - searched["comparison"]["equal"] <= len(left) + 4
        assert all(any(id in key for key in unreadable["keys"]) for id in left)
        assert searched["not_searched"] == "there are rows that the server can't read"
        damage(100)  # of bytes whose vectors are there
        whole = om(database, "verify")
        assert whole.returncode == 1
        assert "the server can't read it" in whole.stdout, whole.log
        refused = alembic(database, "downgrade", "base", check=False)
        assert "the server can't read all values of" in refused.log
        assert refused.returncode != 0
        alembic(database, "downgrade", "base", env={"OM_ACCEPT_LOSS": "9"})
        found = om(database, "check")
        assert found.returncode == 1
        assert re.search(r"\d+ rows of", found.stdout)
        assert "can't be read" in found.stdout
        assert left[0] in found.stdout
        assert om(database, "check", env={"OM_ON_BAD_ROWS": "skip"}).returncode == 0, "as an upgrade is"


@pytest.mark.slow
def test_a_vector_that_cannot_be_read_is_named_in_a_column_without_dimensions() -> None:
    with embedded.temporary(bin=programs(), options=OPTIONS) as server:
        database = create_database(server, "damaged")
        create_table(database)
        alembic(database, "upgrade", "head")
        database.run(f"ALTER TABLE {TABLE} ALTER v SET STORAGE MAIN")  # only vectors are out of line
        load(database, random_rows(30, 1536))
        toast = database.value(f"SELECT reltoastrelid::regclass::text FROM pg_class WHERE relname = '{TABLE}'")
        path = server.data / database.value("SELECT pg_relation_filepath(%s)", toast)
        server.stop()
        with open(path, "r+b") as file:
            file.seek(8192 * 15)
            file.write(bytes(8192))
        server.start()

        for command in ("verify", "report"):
            done = om(database, command)
            assert done.returncode == 1
            (id,) = re.findall(
                "can't be read by the server, so nothing is verified\nDETAIL:  Such as .id=(.*),", done.stderr
            )

        database.run(f"UPDATE {TABLE} SET v_vector = NULL WHERE id = %s", id)
        om(database, "backfill")
        verify(database, 0)


def test_what_a_trigger_says_of_a_row_is_not_in_the_log(database: Database) -> None:
    table(database, "client")
    database.run(RAISE.replace("RAISE 'not %'", "RAISE WARNING 'not %'"))
    for engine in ("client", "server"):
        assert SECRET not in alembic(database, "upgrade", "head", env={"OM_BACKFILL_ENGINE": engine}).log
        alembic(database, "downgrade", EXPAND)
        database.run(f"UPDATE {TABLE} SET v_vector = NULL")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_table_that_a_rows_trigger_does_not_find_is_no_partition_that_is_gone(
    database: Database, engine: str
) -> None:
    """By the SQLSTATE alone it could be."""
    database.run(
        f"CREATE TABLE {TABLE} (id uuid, sector text, user_id text, v bytea, dim integer NOT NULL,"
        f" PRIMARY KEY (id, sector)) PARTITION BY LIST (sector); CREATE TABLE p PARTITION OF {TABLE} DEFAULT"
    )
    load(database, ROWS)
    database.run(
        f"UPDATE {TABLE} SET user_id = '{SECRET}' WHERE id = '{ROWS[7].id}';"
        + RAISE.replace("RAISE 'not %', new.user_id USING DETAIL = new::text;", "EXECUTE 'TABLE nowhere';")
    )

    done = alembic(database, "upgrade", "head", env={"OM_BACKFILL_ENGINE": engine}, check=False)

    assert "is gone" not in done.log
    assert f"1 (such as (id={ROWS[7].id}" in done.log
    assert "refused with SQLSTATE 42P01, in function refuse()" in done.log
    assert database.value(f"SELECT count(v_vector) FROM {TABLE}") == len(ROWS) - 1


@pytest.mark.parametrize("engine", ENGINES)
def test_what_looks_like_a_function_in_a_statement_is_not_in_the_log(database: Database, engine: str) -> None:
    """The text of a statement that a function executes may show what is in the row."""
    column = table(database, engine)
    text = "PL/1 notes of Jane.Doe(555-1234)"
    database.run(f"UPDATE {TABLE} SET user_id = %s WHERE id = %s", text, ROWS[5].id)
    database.run(
        "CREATE TABLE notes (said text, n integer CHECK (n > 1));"
        "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF new.user_id LIKE 'PL/%' THEN"
        " EXECUTE format('INSERT INTO notes VALUES (%L, 1)', new.user_id); END IF; RETURN new; END $$;"
        f"CREATE TRIGGER note BEFORE UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION note()"
    )

    env = {} if engine == "native" else {"OM_BACKFILL_ENGINE": engine}
    done = alembic(database, "upgrade", "head", env=env, check=False)

    assert "in function note()" in done.log
    assert "Jane" not in done.log
    assert database.value(f"SELECT count({column}) FROM {TABLE}") == len(ROWS) - 1
