"""`openmemory-migrations check`: each finding provoked for real, and its hint, where it is a statement, carried out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg2
import pytest
from psycopg2.sql import SQL, Identifier

from demo.openmemory import TABLE
from openmemory_migrations import embedded
from tests.support.commands import alembic, om, result, start_om
from tests.support.openmemory import Database, create_database, create_table, load, random_rows
from tests.support.pooler import PROGRAM, bouncer
from tests.support.preflight import check, finding, severities, unchanged
from tests.support.servers import OPTIONS, programs, replicated
from tests.support.sessions import eventually
from tests.support.states import EXPAND

DIM = 8
SOURCELESS = f"""
ALTER TABLE {TABLE} ADD v_vector vector; UPDATE {TABLE} SET v = NULL, v_vector = '[1]' WHERE user_id = 'user1'
"""
WITHOUT_PGVECTOR = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"))), None)


def prepare(database: Database) -> Database:
    create_table(database)
    load(database, random_rows(60, DIM))
    return database


@pytest.fixture
def table(database: Database) -> Database:
    return prepare(database)


@pytest.fixture
def role(table: Database) -> Iterator[Database]:
    """The database as a plain role sees it that owns the table, of a server with pgvector installed."""
    name = f"owner of {table.name}"
    with as_role(table, name) as role:
        table.run(
            SQL("CREATE EXTENSION vector; ALTER TABLE {} OWNER TO {}").format(Identifier(TABLE), Identifier(name))
        )
        table.run(SQL("GRANT CREATE ON SCHEMA public TO {}").format(Identifier(name)))
        yield role


@contextmanager
def as_role(database: Database, name: str) -> Iterator[Database]:
    # roles belong to the whole server
    database.run(SQL("CREATE ROLE {} LOGIN").format(Identifier(name)))
    try:
        yield Database(database.name, database.url.replace("postgres@", name.replace(" ", "%20") + "@"))
    finally:
        database.run(SQL("DROP OWNED BY {0} CASCADE; DROP ROLE {0}").format(Identifier(name)))


@contextmanager
def session(database: Database, sql: str, name: str = "somebody") -> Iterator[psycopg2.extensions.connection]:
    """Somebody's transaction, open after this statement."""
    with closing(psycopg2.connect(database.url, application_name=name)) as connection:
        with connection.cursor() as cursor:
            cursor.execute(sql)
        yield connection


@pytest.mark.slow
def test_each_missing_right_is_told_with_the_line_that_gives_it(table: Database) -> None:
    table.run(SQL("REVOKE TEMPORARY ON DATABASE {} FROM PUBLIC").format(Identifier(table.name)))
    table.run("CREATE SCHEMA extensions; CREATE EXTENSION vector SCHEMA extensions")
    with as_role(table, f"nobody of {table.name}") as nobody:
        found = unchanged(table, 0)
        assert severities(found) == {}
        seen = check(nobody, 1, env={"OM_BACKFILL_MAX_LAG": "10"})

        errors = [one for one in seen["findings"] if one["severity"] == "error"]
        said = [one["message"] for one in errors]
        for text in (
            "does not own table",
            "may not use schema",
            "may not create functions",
            "may not create the version table",
            "may not create temporary tables",
            "may not see the lag",
            "permission denied",
        ):
            assert any(text in one for one in said), (text, said)
        assert all(one["code"] == "rights" for one in errors)
        for one in errors:
            hint = one["hint"].split("or: ")[-1]
            if hint.endswith(";"):
                table.run(hint)
        after = check(nobody, 0, env={"OM_BACKFILL_MAX_LAG": "10"})
        assert severities(after) == {"no-replica": "warning"}


@pytest.mark.slow
def test_an_extension_that_the_role_may_not_create(table: Database) -> None:
    with as_role(table, "plain") as plain:
        table.run(f"ALTER TABLE {TABLE} OWNER TO plain; GRANT CREATE ON SCHEMA public TO plain")

        one = finding(check(plain, 1), "extension-rights")

        assert one["hint"] == 'Have an administrator run: CREATE EXTENSION vector SCHEMA "public";'
        table.run(one["hint"].partition("run: ")[2])
        assert severities(check(plain, 0)) == {"activity-hidden": "notice"}


@pytest.mark.slow
@pytest.mark.skipif(WITHOUT_PGVECTOR is None, reason="no PostgreSQL without pgvector")
def test_an_extension_that_is_not_there() -> None:
    assert WITHOUT_PGVECTOR
    with embedded.temporary(bin=WITHOUT_PGVECTOR, options=OPTIONS) as server:
        database = prepare(create_database(server, "bare"))
        if database.rows("SELECT FROM pg_available_extensions WHERE name = 'vector'"):
            pytest.skip("this server has pgvector")

        found = unchanged(database, 1)

        assert severities(found) == {"extension-unavailable": "error"}
        assert "CREATE EXTENSION vector;" in finding(found, "extension-unavailable")["hint"]
        assert found["pgvector"] is None
        assert found["rows"]["convertible"] == 60
        assert "pgvector:    not available" in om(database, "check").stdout


@pytest.mark.slow
def test_row_security(table: Database, role: Database) -> None:
    table.run(f"ALTER TABLE {TABLE} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")

    one = finding(check(role, 1), "table")

    assert "row-level security" in one["message"]


@pytest.mark.slow
def test_who_may_not_see_others_is_told_so(role: Database) -> None:
    found = check(role, 0)

    assert severities(found) == {"activity-hidden": "notice"}
    assert finding(found, "activity-hidden")["hint"].startswith("GRANT pg_read_all_stats TO")


@pytest.mark.slow
def test_read_only_transactions(table: Database, role: Database) -> None:
    role.run("ALTER ROLE CURRENT_USER SET default_transaction_read_only = on")

    one = finding(check(role, 1), "read-only")

    with closing(role.connect()) as connection, connection.cursor() as cursor:
        for statement in one["hint"].split("; "):
            cursor.execute(statement)
    check(role, 0)


@pytest.mark.slow
def test_a_limit_on_connections(table: Database, role: Database) -> None:
    table.run(SQL("ALTER ROLE {} CONNECTION LIMIT 3").format(Identifier(f"owner of {table.name}")))
    found = check(role, 0)
    assert found["connections"] == {"free": 3, "needed": 4}
    assert severities(found)["connections"] == "warning"

    table.run(SQL("ALTER ROLE {} CONNECTION LIMIT 4").format(Identifier(f"owner of {table.name}")))
    assert "connections" not in severities(check(role, 0))
    assert check(role, 0, env={"OM_BACKFILL_WORKERS": "3"})["connections"] == {"free": 4, "needed": 8}

    table.run(SQL("ALTER DATABASE {} CONNECTION LIMIT 2").format(Identifier(table.name)))
    assert check(role, 0)["connections"]["free"] == 2
    # the superuser isn't bound by it
    assert check(table, 0)["connections"]["free"] > 10


@pytest.mark.slow
def test_old_transactions_and_locks(table: Database) -> None:
    with session(table, f"SELECT count(*) FROM {TABLE}", "reporting"):
        young = unchanged(table, 0)
        assert severities(young) == {"locks": "notice"}
        assert '("reporting"' in finding(young, "locks")["detail"]
        time.sleep(5)

        one = finding(check(table, 0), "old-transaction")

        assert (one["severity"], '("reporting", role postgres, idle in transaction)' in one["message"]) == (
            "warning",
            True,
        )
        table.run(one["hint"].partition(";")[0])
        assert severities(check(table, 0)) == {}


@pytest.mark.slow
def test_an_index_that_is_being_built(table: Database) -> None:
    building = f"SELECT FROM pg_stat_progress_create_index WHERE relid = '{TABLE}'::regclass"
    with session(table, f"UPDATE {TABLE} SET dim = dim", "writing") as writer, ThreadPoolExecutor() as pool:
        done = pool.submit(table.run, f"CREATE INDEX CONCURRENTLY other ON {TABLE} (dim)")
        eventually(lambda: table.rows(building))

        one = finding(check(table, 0), "index-build")

        writer.rollback()
        done.result()
    assert "waiting for" in one["message"]
    assert severities(check(table, 0)) == {}


@pytest.mark.slow
def test_a_vacuum(database: Database) -> None:
    create_table(database)
    load(database, random_rows(3000, DIM))
    vacuuming = f"SELECT FROM pg_stat_progress_vacuum WHERE relid = '{TABLE}'::regclass"
    with closing(database.connect()) as connection, connection.cursor() as cursor, ThreadPoolExecutor() as pool:
        cursor.execute("SET vacuum_cost_delay = 100; SET vacuum_cost_limit = 1")
        done = pool.submit(cursor.execute, f"VACUUM (FREEZE) {TABLE}")
        eventually(lambda: database.rows(vacuuming))

        found = check(database, 0)

        connection.cancel()
        assert isinstance(done.exception(), psycopg2.errors.QueryCanceled)
    assert f"vacuums public.{TABLE}" in finding(found, "vacuum")["message"]


@pytest.mark.slow
def test_a_table_that_is_locked_is_not_waited_for(table: Database) -> None:
    with session(table, f"LOCK TABLE {TABLE}", "blocking"):
        began = time.monotonic()
        found = check(table, 1)
        assert time.monotonic() - began < 10

    assert severities(found) == {"locked": "error", "locks": "notice"}
    assert "lock timeout" in finding(found, "locked")["message"]
    assert found["rows"] is None
    check(table, 0)


@pytest.mark.slow
def test_no_snapshot_outlives_a_statement_for_long(database: Database) -> None:
    """While a large table is read, batch after batch."""
    create_table(database)
    load(database, random_rows(40_000, DIM))
    ours = "application_name LIKE 'openmemory-migrations%'"
    snapshots: set[str] = set()
    process = start_om(database, "check")
    while process.poll() is None:
        snapshots |= {row[0] for row in database.rows(f"SELECT xact_start FROM pg_stat_activity WHERE {ours}")}
    assert result(process).returncode == 0
    assert len(snapshots - {None}) > 10


@pytest.mark.slow
def test_prepared_transactions() -> None:
    with embedded.temporary(bin=programs(), options={**OPTIONS, "max_prepared_transactions": "2"}) as server:
        database = prepare(create_database(server, "prepared"))
        database.run(f"BEGIN; SELECT count(*) FROM {TABLE}; PREPARE TRANSACTION 'it''s forgotten'")

        one = finding(unchanged(database, 0), "prepared-transaction")

        assert "'it''s forgotten'" in one["message"]
        database.run(one["hint"].partition(" or ")[0])
        assert severities(check(database, 0)) == {}


@pytest.mark.slow
def test_replicas_and_a_standby() -> None:
    with replicated(60) as pair:
        found = unchanged(pair.database, 0)
        assert found["replication"]["replicas"] == 1
        assert severities(found) == {"replicas": "notice"}
        assert "replicas" not in severities(check(pair.database, 0, env={"OM_BACKFILL_MAX_LAG": "10"}))

        standby = Database(pair.database.name, pair.replica.url(pair.database.name))
        seen = check(standby, 1)

        assert severities(seen)["standby"] == "error"
        assert seen["rows"]["total"] == 60
        assert seen["estimate"]["reason"] == "first the errors below"


@pytest.mark.slow
def test_slots_and_synchronous_standbys() -> None:
    # the tests' own commits don't wait
    options = {**OPTIONS, "synchronous_standby_names": "nobody", "synchronous_commit": "local"}
    with embedded.temporary(bin=programs(), options=options) as server:
        database = prepare(create_database(server, "followed"))
        database.run("SELECT pg_create_physical_replication_slot('left behind', true)".replace(" b", "_b"))

        found = unchanged(database, 0)

        assert severities(found) == {"inactive-slot": "warning", "synchronous-standby": "warning"}
        database.run(finding(found, "inactive-slot")["hint"].partition(" if ")[0])
        database.run(finding(found, "synchronous-standby")["hint"])
        database.run("SELECT pg_reload_conf()")
        assert "inactive-slot" not in severities(check(database, 0))


@pytest.mark.slow
def test_publications(table: Database) -> None:
    table.run("CREATE EXTENSION vector")
    table.run(f"CREATE PUBLICATION changes FOR TABLE {TABLE}; CREATE PUBLICATION everything FOR ALL TABLES")
    table.run("CREATE TABLE other (); CREATE PUBLICATION elsewhere FOR TABLE other")
    if table.value("SELECT current_setting('server_version_num')::integer") >= 150_000:
        table.run(f"CREATE PUBLICATION columns FOR TABLE {TABLE} (id, sector)")

    found = unchanged(table, 0)

    told = [one for one in found["findings"] if one["code"] == "publication"]
    assert [one["message"].split('"')[1] for one in told] == ["changes", "everything"]
    hint = told[0]["hint"]
    assert f'ALTER TABLE "public"."{TABLE}" ADD COLUMN "v_vector" "public".vector;' in hint
    table.run(hint.partition("first: ")[2])  # as on a subscriber
    table.run(f"ALTER TABLE {TABLE} DROP v_vector")
    alembic(table, "upgrade", EXPAND)
    assert "publication" not in severities(check(table, 0))


@pytest.mark.slow
def test_triggers_and_rules(table: Database) -> None:
    table.run(
        f"""
        CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
        CREATE TRIGGER any_update BEFORE UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION f();
        CREATE TRIGGER of_v BEFORE UPDATE OF v ON {TABLE} FOR EACH ROW EXECUTE FUNCTION f();
        CREATE TRIGGER inserts BEFORE INSERT ON {TABLE} FOR EACH ROW EXECUTE FUNCTION f();
        CREATE TRIGGER off BEFORE UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION f();
        ALTER TABLE {TABLE} DISABLE TRIGGER off;
        CREATE TABLE log (id uuid);
        CREATE RULE logged AS ON UPDATE TO {TABLE} DO ALSO INSERT INTO log VALUES (NEW.id);
        """
    )

    found = unchanged(table, 1)

    # an autovacuum may have come for what the setup has written
    assert severities(found).items() - {("locks", "notice")} == {("trigger", "warning"), ("rule", "error")}
    trigger = finding(found, "trigger")  # one, of the four
    assert 'trigger "any_update"' in trigger["message"]
    for code in ("trigger", "rule"):
        table.run(finding(found, code)["hint"].removeprefix("If it need not see them: ").partition(" and ")[0])
    assert severities(check(table, 0)) == {}
    # our own is none of them
    alembic(table, "upgrade", "head")
    assert severities(check(table, 0)) == {}


@pytest.mark.slow
def test_triggers_of_a_partitioned_table_are_told_once(database: Database) -> None:
    database.run(
        f"""
        CREATE TABLE {TABLE} (id uuid, sector text, v bytea, PRIMARY KEY (id, sector)) PARTITION BY LIST (sector);
        CREATE TABLE one PARTITION OF {TABLE} FOR VALUES IN ('one');
        CREATE TABLE two PARTITION OF {TABLE} DEFAULT;
        CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
        CREATE TRIGGER t BEFORE UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION f();
        CREATE TRIGGER own BEFORE UPDATE ON two FOR EACH ROW EXECUTE FUNCTION f();
        """
    )

    told = [one["message"] for one in unchanged(database, 0)["findings"] if one["code"] == "trigger"]

    assert [message.split()[1:4] for message in told] == [
        ['"t"', "on", f"public.{TABLE}"],
        ['"own"', "on", "public.two"],
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setup", "env", "code", "said"),
    [
        (f"ALTER TABLE {TABLE} ADD v_vector text", {}, "column-taken", "is of type text"),
        (
            f"ALTER TABLE {TABLE} ADD v_vector vector; CREATE VIEW seen AS SELECT v_vector FROM {TABLE}",
            {},
            "column-taken",
            "while views show it: public.seen",
        ),
        (
            f"ALTER TABLE {TABLE} ADD v_vector vector, ADD v_vector_adopted vector",
            {},
            "column-taken",
            "neither made by this package",
        ),
        (
            SOURCELESS,
            {"OM_VEC_DIM": str(DIM)},
            "dimensions",
            "would be lost",
        ),
        (
            f"CREATE TABLE openmemory_alembic_version AS SELECT text '{EXPAND}' AS version_num",
            {},
            "stamp",
            f"this database is stamped {EXPAND}",
        ),
    ],
)
def test_what_a_step_refuses(table: Database, setup: str, env: Mapping[str, str], code: str, said: str) -> None:
    """In the step's own words."""
    table.run("CREATE EXTENSION vector; " + setup)

    one = finding(unchanged(table, 1, env=env), code)

    assert said in one["message"]
    log = alembic(table, "upgrade", "head", env=env, check=False).log
    assert one["message"] in log
    assert one["hint"] in log


@pytest.mark.slow
def test_problems_are_told_all_at_once(table: Database) -> None:
    table.run(
        f"CREATE EXTENSION vector; ALTER TABLE {TABLE} ADD v_vector vector, ADD v_vector_adopted vector;"
        f" CREATE VIEW seen AS SELECT v_vector FROM {TABLE}"
    )

    found = check(table, 1, env={"OM_VEC_DIM": "3"})

    assert sorted(one["code"] for one in found["findings"] if one["severity"] == "error") == [
        *("column-taken", "column-taken", "dimensions")
    ]
    assert found["verdict"] == "can't be migrated: 3 errors"
    assert [one["severity"] for one in found["findings"]][:3] == ["error"] * 3


@pytest.mark.slow
def test_other_dimensions_than_the_columns(table: Database) -> None:
    alembic(table, "upgrade", "head")

    one = finding(check(table, 1, env={"OM_VEC_DIM": "3"}), "stamp")

    assert "has 8 dimensions, but 3 are configured" in one["message"]


@pytest.mark.slow
def test_memory_of_the_index(table: Database) -> None:
    one = finding(check(table, 0, env={"OM_INDEX_MEMORY": "1MB"}), "no-index")

    assert one["severity"] == "warning"
    assert "OM_INDEX_MEMORY=" in one["hint"]
    setting = one["hint"].partition("OM_INDEX_MEMORY=")[2].partition(",")[0]
    assert not {"index-memory", "no-index"} & set(severities(check(table, 0, env={"OM_INDEX_MEMORY": setting})))


@pytest.mark.slow
@pytest.mark.skipif(PROGRAM is None, reason="no pgbouncer on PATH or in /usr/sbin")
def test_through_a_pooler(server: embedded.Server, table: Database) -> None:
    table.run("CREATE EXTENSION vector")
    with bouncer(server, table) as through:
        found = unchanged(through, 0)

    assert severities(found) == {"pooler": "notice"}
    assert found["connections"]["needed"] == 4
    assert found["estimate"]["tried_rows"] == 60


@pytest.mark.slow
def test_logical_decoding_sees_nothing_of_it() -> None:
    with embedded.temporary(bin=programs(), options={**OPTIONS, "wal_level": "logical"}) as server:
        database = prepare(create_database(server, "decoded"))
        database.run("CREATE EXTENSION vector; CREATE PUBLICATION changes FOR ALL TABLES")
        database.run("SELECT pg_create_logical_replication_slot('decoding', 'pgoutput')")

        found = check(database, 0)

        assert found["estimate"]["tried_rows"] == 60
        changes = database.rows(
            "SELECT data FROM pg_logical_slot_get_binary_changes('decoding', NULL, NULL, 'proto_version', '1',"
            " 'publication_names', 'changes', 'messages', 'true')"
        )
        assert changes == []


@pytest.mark.slow
def test_it_can_be_stopped(database: Database) -> None:
    create_table(database)
    load(database, random_rows(40_000, DIM))
    # enough to be seen at it
    more = f"SELECT gen_random_uuid(), sector, user_id, v, dim FROM {TABLE}, generate_series(1, 4)"
    database.run(f"INSERT INTO {TABLE} {more}")
    process = start_om(database, "check")
    eventually(lambda: database.rows("SELECT FROM pg_stat_activity WHERE application_name LIKE '%looking at the rows'"))

    process.terminate()

    done = result(process)
    assert done.returncode == 3, done.log
    assert "ERROR:  stopped by SIGTERM" in done.stderr
    assert done.stdout == ""
