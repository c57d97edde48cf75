"""R10: no timeout of a role's keeps a run from getting further, and a lost connection is that, whenever it is lost."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable

import pytest
import sqlalchemy as sa

from demo.openmemory import TABLE
from openmemory_migrations import embedded
from openmemory_migrations.db import locks
from openmemory_migrations.db.connections import engine_for
from openmemory_migrations.db.database import Database as PackageDatabase
from openmemory_migrations.preflight.results import Facts, part
from openmemory_migrations.settings import Settings
from openmemory_migrations.sql import quote
from openmemory_migrations.steps.step import Step
from tests.support.commands import Result, alembic, om, result, start_alembic, start_om
from tests.support.databases import Databases
from tests.support.openmemory import Database, mismatches, random_rows
from tests.support.package import TARGET, package
from tests.support.proxy import Verdict, proxy
from tests.support.running import expanded, filled, running, slow_rows, transaction
from tests.support.sessions import converted, eventually
from tests.support.states import BACKFILL, EXPAND, HEAD, indexes, stamp

SNAPSHOT = ["SET TRANSACTION ISOLATION LEVEL REPEATABLE READ", "SELECT FROM pg_class LIMIT 1"]


def shorten(database: Database, *timeouts: str, to: str = "300ms") -> None:
    """Have the role end whatever takes longer, those of the timeouts that the server knows."""
    for (name,) in database.rows("SELECT name FROM pg_settings WHERE name = ANY (%s)", list(timeouts)):
        database.run(f"ALTER ROLE postgres IN DATABASE {database.name} SET {name} = '{to}'")


def test_rests_and_waits_outlive_the_timeouts_of_the_role(database: Database) -> None:
    filled(database, random_rows(60, 8))
    with transaction(database, *SNAPSHOT) as reader:
        shorten(database, "idle_session_timeout", "idle_in_transaction_session_timeout", "transaction_timeout")
        settings = {"BACKFILL_BATCH": "30", "OM_BACKFILL_PAUSE_MS": "400"}
        with running(database, "upgrade", "head", env=settings) as run:
            # CREATE INDEX CONCURRENTLY waits for the other transaction
            run.says("building index")
            time.sleep(0.5)
            reader.rollback()
            assert run.ends() == 0, run.log

    assert "lost" not in run.log
    assert stamp(database) == [HEAD]
    assert len(indexes(database)) == 1
    assert mismatches(database) == []


def test_a_batch_that_cannot_be_smaller_has_no_statement_timeout(database: Database) -> None:
    expanded(database, random_rows(2, 8))
    slow_rows(database, 0.4)
    shorten(database, "statement_timeout")

    done = alembic(database, "upgrade", BACKFILL, env={"OM_BACKFILL_ENGINE": "client"})

    assert "due to statement timeout (SQLSTATE 57014), try 1 of 30, again with 1 rows" in done.stderr
    assert "try 2" not in done.stderr
    assert mismatches(database) == []


def test_what_a_step_changes_no_statement_timeout_ends(database: Database) -> None:
    """Its locks have a timeout of their own."""
    filled(database, random_rows(2, 8))
    database.run(
        "CREATE FUNCTION rest() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.4); END';"
        "CREATE EVENT TRIGGER rest ON ddl_command_end WHEN TAG IN ('ALTER TABLE') EXECUTE FUNCTION rest()"
    )
    shorten(database, "statement_timeout")

    done = alembic(database, "upgrade", EXPAND)

    assert "timeout" not in done.log


def test_the_hosts_session_gets_its_idle_session_timeout_back(database: Database) -> None:
    filled(database, random_rows(1, 8))
    shorten(database, "idle_session_timeout", to="1min")
    engine = engine_for(sa.make_url(database.url).set(drivername="postgresql+psycopg2"))
    with engine.connect() as connection:
        asked = sa.text("SELECT current_setting('idle_session_timeout')")
        db = PackageDatabase(connection, {"table": quote(TABLE)})
        for fails in (False, True):
            try:
                with db.session():
                    db.take_over()
                    assert connection.scalar(asked) == "0"
                    1 / (not fails)
            except ZeroDivisionError:
                pass
            connection.rollback()
            assert connection.scalar(asked) == "1min"
            connection.rollback()


@pytest.mark.parametrize("command", ["upgrade", "backfill", "status"])
def test_a_reader_waits_for_a_lock_in_tries_and_then_names_its_holder(database: Database, command: str) -> None:
    (filled if command == "upgrade" else expanded)(database, random_rows(2, 8))
    short = "database.LOCK_TIMEOUT, tries.TRIES, connections.RECONNECT_PAUSES = '100ms', 2, ()"

    with transaction(database, f"LOCK TABLE {TABLE} IN ACCESS EXCLUSIVE MODE") as holder:
        if command == "upgrade":
            done = result(start_alembic(database, command, "head", patch=short))
            failed = done.stdout
            assert done.returncode > 0
        else:
            done = result(start_om(database, command, patch=short))
            failed = done.stderr.partition("ERROR:  ")[2]
            assert done.returncode == 3, done.log
        named = f'Locks on the table are held by process {holder.info.backend_pid} ("nightly report", role postgres'
        assert f"DETAIL:  {named}" in failed
        assert "HINT:  Run the same command again" in failed
        assert done.stderr.count(f'NOTICE:  waiting for "public"."{TABLE}"') == 1
        assert "Traceback" not in done.log


def test_a_reader_that_lacks_a_right_on_the_table_is_given_the_line(
    server: embedded.Server, database: Database
) -> None:
    expanded(database, random_rows(2, 8))
    reader = f"reader of {database.name}"
    database.run(f'CREATE ROLE "{reader}" LOGIN; GRANT SELECT (id, v) ON {TABLE} TO "{reader}"')
    try:
        done = om(Database(database.name, server.url(database.name, user=reader)), "status")
    finally:
        database.run(f'DROP OWNED BY "{reader}"; DROP ROLE "{reader}"')

    assert done.returncode == 1
    assert f'GRANT SELECT ON "public"."{TABLE}" TO "{reader}";' in done.stderr


def test_a_part_of_the_check_that_cannot_begin_is_a_finding(database: Database) -> None:
    with package(database, PackageDatabase) as db:
        db._host.local = {"role": "nobody of this name"}
        facts = Facts()
        part(Step(db, TARGET, Settings.load({}, {})), facts, "server", lambda: None)
        db._host.local = {}
    assert [finding.code for finding in facts.findings] == ["server"]


def at_head(database: Database) -> None:
    filled(database, random_rows(60, 8))
    alembic(database, "upgrade", "head")


COMMANDS: dict[str, tuple[Callable[..., object], tuple[str, ...]]] = {
    "upgrade": (lambda database: filled(database, random_rows(60, 8)), ("alembic", "upgrade", "head")),
    "downgrade": (at_head, ("alembic", "downgrade", "base")),
    "cutover": (at_head, ("alembic", "-n", "cutover", "upgrade", "head")),
    "index": (at_head, ("om", "index", "--rebuild")),
    "verify": (at_head, ("om", "verify", "--queries", "2")),
    "check": (at_head, ("om", "check")),
    "status": (at_head, ("om", "status")),
}


def cut_off(
    databases: Databases, name: str, watch: Callable[[str], Verdict], engine: str = "native"
) -> tuple[Result, list[str]]:
    """Run the command, which may not connect again, until `watch` takes its connections; also what it has sent."""
    make, (program, *args) = COMMANDS[name]
    start = start_alembic if program == "alembic" else start_om
    with databases.copy(make) as database, proxy(databases.server, watch) as between:
        patch = "connections.RECONNECT_PAUSES = ()"
        env = {"OM_CUTOVER": "swap", "OM_BACKFILL_ENGINE": engine}
        done = result(start(between.to(database), *args, env=env, patch=patch))
    return done, between.statements


def assert_lost(name: str, done: Result) -> None:
    assert "Traceback" not in done.log
    assert done.returncode > 0, done.log
    if COMMANDS[name][1][0] == "om":
        assert done.returncode == 3, done.log
    assert re.search(
        "^(FAILED|ERROR): .*(the connection was lost|server closed the connection)", done.log, re.MULTILINE
    )


@pytest.mark.parametrize(
    ("name", "statement"),
    [
        ("upgrade", "ADD COLUMN"),
        ("upgrade", "UPDATE ONLY"),
        ("upgrade", "COPY pg_temp"),
        ("upgrade", "CREATE INDEX CONCURRENTLY"),
        ("upgrade", "UPDATE public.openmemory_alembic_version"),
        ("downgrade", "DROP INDEX CONCURRENTLY"),
        ("cutover", "RENAME COLUMN"),
        ("status", "IN ACCESS SHARE MODE"),
    ],
)
def test_a_lost_connection_is_said_to_be_lost(databases: Databases, name: str, statement: str) -> None:
    engine = "client" if statement.startswith("COPY") else "native"
    done, _ = cut_off(databases, name, lambda text: "before" if statement in text else None, engine)

    assert_lost(name, done)


@pytest.mark.parametrize(
    ("during", "lock"), [("backfill", ("table", "public", TABLE)), ("building index", ("chain", "public"))]
)
def test_a_run_whose_lock_is_lost_ends_before_it_changes_any_more(
    database: Database, during: str, lock: tuple[str, ...]
) -> None:
    expanded(database, random_rows(60, 8))
    with transaction(database, *SNAPSHOT) as reader:  # which CREATE INDEX CONCURRENTLY waits for
        patch = "connections.RECONNECT_PAUSES, database.ASK_AGAIN, build_progress.LOG_INTERVAL = (), 0, 0.1"
        env = {"BACKFILL_BATCH": "1", "OM_BACKFILL_PAUSE_MS": "400" if during == "backfill" else "0"}
        with running(database, "upgrade", "head", env=env, patch=patch) as run:
            run.says("waiting for old snapshots") if during != "backfill" else eventually(lambda: converted(database))
            key = "(classid::bigint << 32) + objid::bigint"
            ended = f"SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND {key} = %s"
            assert database.value(ended, locks.key_of(*lock))
            reader.rollback()
            assert run.ends() > 0

    assert re.search("FAILED: this run's lock on .* the connection was lost: process .*, which held it", run.log)
    assert stamp(database) == [EXPAND if during == "backfill" else BACKFILL]
    assert during != "backfill" or converted(database) < 10


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_lost_connection_is_said_to_be_lost_at_each_kind_of_statement(databases: Databases, name: str) -> None:
    def kind(text: str) -> str:
        return re.sub(r"'[^']*'|\d+", "?", text)

    done, statements = cut_off(databases, name, lambda _: None)
    assert done.returncode == 0, done.log
    for wanted, last in Counter(map(kind, statements)).items():
        for number in {1, last}:
            seen: Counter[str] = Counter()

            def watch(text: str, wanted: str = wanted, number: int = number, seen: Counter[str] = seen) -> Verdict:
                seen[kind(text)] += 1
                return "before" if kind(text) == wanted and seen[wanted] == number else None

            done, _ = cut_off(databases, name, watch)
            # what comes last may be of a connection whose loss nobody meets any more
            if seen[wanted] >= number and done.returncode:
                assert_lost(name, done)
