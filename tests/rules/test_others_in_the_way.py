"""What of others' changes a value after our trigger, or keeps our UPDATE away, is named before anything is changed."""

from __future__ import annotations

import re
from contextlib import closing

import psycopg2
import pytest

from demo.openmemory import TABLE
from openmemory_migrations import embedded
from openmemory_migrations.steps.interference import leaves_alone
from tests.support.cases import quickly
from tests.support.commands import alembic, om
from tests.support.cutover import cut_over, undo
from tests.support.native import create_newer
from tests.support.openmemory import Database, create_database, create_table, load, mismatches, random_rows
from tests.support.preflight import check, finding, severities, unchanged
from tests.support.running import running, transaction
from tests.support.scripts import offline
from tests.support.servers import CHOICE, OPTIONS, programs
from tests.support.sessions import eventually
from tests.support.states import EXPAND, column_type

ROWS = random_rows(20, 8)
COLUMNS = ["v", "v_vector"]
HARMLESS = [
    "BEGIN NEW.updated_at := now(); RETURN NEW; END",
    'BEGIN IF NEW.* IS DISTINCT FROM OLD.* THEN new."Changed" = 1; END IF; RETURN NEW ; END',
    "BEGIN -- the new v\n NEW.note := 'new v'; IF NEW.vx THEN RETURN NULL; END IF; RETURN OLD; END",
    "BEGIN IF octet_length(NEW.v) % 4 > 0 THEN RAISE '%', NEW::text; END IF; PERFORM note(NEW); RETURN NEW; END",
]
NOT_PROVEN = [
    "BEGIN CALL change(NEW.v); RETURN NEW; END",
    "BEGIN NEW.v := 'x'; RETURN NEW; END",
    'BEGIN SELECT 1 INTO NEW . "v_vector"; RETURN NEW; END',
    "BEGIN NEW.V = 'x'; RETURN NEW; END",
    "BEGIN NEW := jsonb_populate_record(NEW, '{}'); RETURN NEW; END",
    "DECLARE r record; BEGIN r := OLD; r.v := 'x'; RETURN r; END",
    "DECLARE r ALIAS FOR NEW; BEGIN r.v := 'x'; RETURN NEW; END",
    "BEGIN NEW/**/.v := E'\\''; RETURN NEW; END",
    "BEGIN NEW.U&\"\\0076\" := 'x'; RETURN NEW; END",
]


def test_a_function_that_leaves_our_columns_alone_is_known_by_its_text() -> None:
    assert [text for text in HARMLESS if not leaves_alone("plpgsql", text, [], COLUMNS)] == []
    assert [text for text in NOT_PROVEN if leaves_alone("plpgsql", text, [], COLUMNS)] == []
    assert leaves_alone("c", "moddatetime", ["updated_at"], COLUMNS)
    assert not leaves_alone("c", "moddatetime", ["v"], COLUMNS)
    assert not leaves_alone("c", "other", [], COLUMNS)
    assert not leaves_alone("plpython3u", "", [], COLUMNS)


def trigger(name: str, when: str, change: str) -> str:
    return (
        f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN {change}; RETURN NEW; END';"
        f" CREATE TRIGGER {name} BEFORE {when} ON {TABLE} FOR EACH ROW EXECUTE FUNCTION {name}()"
    )


STAMPS = trigger("zz_stamps", "INSERT OR UPDATE", "NEW.user_id := NEW.user_id")
AFTER = trigger("zz_after", "INSERT", r"NEW.v := set_byte(NEW.v, 0, 1)")
ELSEWHERE = trigger("a_first", "UPDATE OF user_id", "NEW.v := NEW.v")
NO_INDEX = {"OM_INDEX": "none"}


def test_a_trigger_that_may_undo_ours_is_named_and_nothing_is_switched_beside_it(database: Database) -> None:
    create_table(database)
    load(database, ROWS)
    database.run(f"{STAMPS}; {AFTER}")
    told = finding(unchanged(database, 0), "interference")
    assert told["severity"] == "warning"
    assert 'trigger "zz_after" on public.openmemory_vectors can change "v" or "v_vector"' in told["message"]

    assert told["message"] in alembic(database, "upgrade", "head", env=NO_INDEX).log
    up = ("-n", "cutover", "upgrade", "head")
    env = {**NO_INDEX, "OM_CUTOVER": "drop"}
    refused = alembic(database, *up, env=env, check=False)

    assert f"FAILED: {told['message']}" in refused.log
    assert column_type(database, "v") == "bytea"
    database.run(told["hint"])
    load(database, random_rows(2, 8, seed=5))
    assert mismatches(database) == []
    database.run(ELSEWHERE)
    assert 'trigger "a_first"' in alembic(database, *up, env=env, check=False).log
    database.run(f'DROP TRIGGER a_first ON {TABLE}; DROP TRIGGER "0_zz_after" ON {TABLE}')
    cut_over(database, "drop", env=NO_INDEX)

    database.run(AFTER.replace("zz_after", "zz_back").replace("NEW.v :", "NEW.v_bytea :"))
    refused = alembic(database, "-n", "cutover", "downgrade", "base", env=NO_INDEX, check=False)

    assert 'FAILED: trigger "zz_back"' in refused.log
    assert column_type(database, "v_bytea") is None
    database.run(f"DROP TRIGGER zz_back ON {TABLE}")
    undo(database)
    assert mismatches(database) == []


def test_a_trigger_that_may_undo_ours_keeps_a_native_table_as_it_is(database: Database) -> None:
    create_newer(database, ROWS)
    database.run(f"{STAMPS}; {AFTER.replace('set_byte(NEW.v, 0, 1)', 'NEW.v')}")

    told = finding(unchanged(database, 1), "interference")

    assert f"FAILED: {told['message']}" in alembic(database, "upgrade", "head", check=False).log
    assert column_type(database, "v_typed") is None
    database.run(told["hint"])
    assert severities(check(database, 0)).keys() == {"already-vector", "trigger"}
    alembic(database, "upgrade", "head")
    assert column_type(database, "v") == "vector(8)"


IN_THE_WAY = [
    ("rule", f"CREATE RULE held AS ON UPDATE TO {TABLE} WHERE OLD.user_id = 'x' DO INSTEAD NOTHING"),
    ("update", f"ALTER TABLE {TABLE} DROP CONSTRAINT {TABLE}_pkey; CREATE PUBLICATION changes FOR TABLE {TABLE}"),
    (
        "update",
        f"""
        CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not now'; END $$;
        CREATE TRIGGER no BEFORE UPDATE ON {TABLE} EXECUTE FUNCTION no()
        """,
    ),
    (
        "typed-table",
        f"CREATE TYPE kind AS (id uuid, sector text, user_id text, v bytea, dim integer); ALTER TABLE {TABLE} OF kind",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("native", [False, True])
def test_what_keeps_us_from_updates_is_told_by_check_and_step_alike(database: Database, native: bool) -> None:
    if native:
        create_newer(database, ROWS)
    else:
        create_table(database)
        load(database, ROWS)
    for code, statement in IN_THE_WAY[: 3 if native else 4]:
        database.run(statement)

        told = finding(unchanged(database, 1), code)

        assert told["severity"] == "error"
        assert f"FAILED: {told['message']}" in alembic(database, "upgrade", "head", check=False).log
        assert column_type(database, "v_typed" if native else "v_vector") is None
        mend = f"DROP TRIGGER no ON {TABLE}" if "not now" in told["message"] else told["hint"].partition(";")[0]
        database.run(mend)
    alembic(database, "upgrade", "head")
    assert severities(check(database, 0)).keys() <= {"already-vector", "publication"}


READERS = {
    "before": "BEFORE INSERT",
    "after": "AFTER INSERT OR UPDATE",
}


@pytest.mark.parametrize("when", READERS)
@pytest.mark.parametrize("mode", quickly("swap", "drop"))
def test_a_trigger_that_names_a_column_which_goes_is_named_first(database: Database, when: str, mode: str) -> None:
    """Afterwards each write of the application's would fail in it."""
    create_table(database)
    load(database, ROWS)
    alembic(database, "upgrade", "head", env=NO_INDEX)

    def reads(column: str) -> None:
        database.run(
            "CREATE OR REPLACE FUNCTION reader() RETURNS trigger LANGUAGE plpgsql AS"
            f" $$ BEGIN PERFORM NEW . {column} IS NULL; RETURN NEW; END $$; "
            f'CREATE OR REPLACE TRIGGER "0_reader" {READERS[when]} ON {TABLE} FOR EACH ROW EXECUTE FUNCTION reader()'
        )

    reads("V")
    refused = alembic(database, "-n", "cutover", "upgrade", "head", env=NO_INDEX | {"OM_CUTOVER": mode}, check=False)
    assert f'FAILED: trigger "0_reader" on public.{TABLE} names "v" of a row' in refused.log
    assert f'ALTER TABLE public.{TABLE} DISABLE TRIGGER "0_reader";' in refused.log
    reads('"v_vector"')
    refused = alembic(database, "downgrade", "base", check=False)
    assert f'FAILED: trigger "0_reader" on public.{TABLE} names "v_vector" of a row' in refused.log
    assert column_type(database) is not None

    reads("dim")
    cut_over(database, mode, env=NO_INDEX)
    undo(database)
    alembic(database, "downgrade", "base")


@pytest.mark.slow
def test_an_autovacuum_gives_way() -> None:
    """The server ends one for whoever has waited longer than deadlock_timeout, which no short try does."""
    with embedded.temporary(bin=programs(), options=OPTIONS | {"autovacuum_naptime": "1s"}) as server:
        database = create_database(server, "vacuumed")
        create_table(database)
        load(database, random_rows(5000, 64))
        database.run(
            f"ALTER TABLE {TABLE} SET (autovacuum_vacuum_cost_delay = 100, autovacuum_vacuum_cost_limit = 1,"
            " autovacuum_vacuum_threshold = 1, autovacuum_vacuum_scale_factor = 0)"
        )
        database.run(f"UPDATE {TABLE} SET user_id = 'z'")
        vacuum = f"SELECT pid FROM pg_stat_activity WHERE query LIKE 'autovacuum: VACUUM%{TABLE}%'"
        eventually(lambda: database.rows(vacuum))

        done = alembic(database, "upgrade", EXPAND)

        assert "of the server itself, such as autovacuum" in done.log
        assert not re.search("try [4-9] of 30", done.log)
        eventually(lambda: database.rows(vacuum))
        script = offline(server, database, "downgrade", f"{EXPAND}:base").stderr
        assert not re.search("try [4-9] of 30", script)


WHOLE = f"""
CREATE TABLE audit (op text, at timestamptz, id uuid, sector text, user_id text, v bytea, dim integer);
CREATE FUNCTION audited() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN INSERT INTO audit SELECT 'W', now(), NEW.*; RETURN NULL; END $$;
CREATE TRIGGER audited AFTER INSERT OR UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION audited()
"""
CHANGED_ROW = f"UPDATE {TABLE} SET user_id = 'again' WHERE id = %s"


@pytest.mark.parametrize("when", ["INSERT OR UPDATE", "INSERT"])
@pytest.mark.parametrize("kind", ["ordinary", "partitioned"])
def test_a_trigger_that_takes_the_row_as_a_whole_keeps_its_columns(database: Database, when: str, kind: str) -> None:
    """As PostgreSQL's own example of an audit does: with one column more each write would fail in it."""
    create_table(database)
    if kind == "partitioned":
        database.run(
            f"ALTER TABLE {TABLE} RENAME TO plain; CREATE TABLE {TABLE} (LIKE plain) PARTITION BY HASH (id);"
            f" CREATE TABLE one PARTITION OF {TABLE} FOR VALUES WITH (MODULUS 2, REMAINDER 0);"
            f" CREATE TABLE two PARTITION OF {TABLE} FOR VALUES WITH (MODULUS 2, REMAINDER 1)"
        )
    load(database, ROWS)
    database.run(WHOLE.replace("INSERT OR UPDATE", when))
    write = when.partition(" ")[0] if when == "INSERT" else "UPDATE"

    refused = alembic(database, "upgrade", "head", check=False)

    said = f'FAILED: {write} of "public.{TABLE}" would fail from now on: SQLSTATE 42601, in function audited'
    assert said in refused.log
    assert column_type(database) is None
    assert database.value("SELECT count(*) FROM audit") == 0
    database.run(CHANGED_ROW, ROWS[0].id)

    database.run("ALTER TABLE audit ADD v_vector text")
    alembic(database, "upgrade", "head", env=NO_INDEX)
    assert mismatches(database) == []
    # a column too few fails nothing: the rest of the table's has its default
    alembic(database, "downgrade", "base")
    assert column_type(database) is None


def test_a_script_tries_a_write_as_well(server: embedded.Server, database: Database) -> None:
    create_table(database)
    load(database, ROWS)
    database.run(WHOLE)

    done = offline(server, database, "upgrade", "head", env={"OM_VEC_DIM": "8"}, check=False)

    assert f'UPDATE of "public.{TABLE}" would fail from now on: in a trigger, SQLSTATE 42601' in done.stderr
    assert "DISABLE TRIGGER" in done.stderr
    assert column_type(database) is None
    database.run("ALTER TABLE audit ADD v_vector text")
    offline(server, database, "upgrade", "head", env={"OM_VEC_DIM": "8"} | NO_INDEX)
    assert mismatches(database) == []


def test_one_that_names_a_column_in_another_way_is_found_by_a_write(database: Database) -> None:
    create_table(database)
    load(database, ROWS)
    alembic(database, "upgrade", "head", env=NO_INDEX)
    database.run(
        "CREATE FUNCTION reader() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN PERFORM octet_length((NEW).v), (SELECT max(octet_length(v)) FROM {TABLE}); RETURN NULL; END $$;"
        f" CREATE TRIGGER reader AFTER INSERT OR UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION reader()"
    )
    for mode in ("swap", "drop"):
        env = NO_INDEX | {"OM_CUTOVER": mode}
        refused = alembic(database, "-n", "cutover", "upgrade", "head", env=env, check=False)
        assert f'FAILED: UPDATE of "public.{TABLE}" would fail from now on: SQLSTATE 42' in refused.log
        assert column_type(database, "v") == "bytea"
        database.run(CHANGED_ROW, ROWS[0].id)
    database.run(f"DROP TRIGGER reader ON {TABLE}")
    cut_over(database, "swap", env=NO_INDEX)
    undo(database)


OF_STATEMENTS = WHOLE.replace(
    "INSERT INTO audit SELECT 'W', now(), NEW.*", "INSERT INTO audit SELECT 'W', now(), c.* FROM changed AS c"
)


@pytest.mark.parametrize(
    "trigger",
    [
        WHOLE.replace(f"ON {TABLE}", "ON two"),
        OF_STATEMENTS.replace("INSERT OR UPDATE ON", "UPDATE ON").replace(
            "FOR EACH ROW", "REFERENCING NEW TABLE AS changed FOR EACH STATEMENT"
        ),
    ],
    ids=["of one partition", "of the root's statements"],
)
def test_triggers_of_partitions_and_statements_are_tried(database: Database, trigger: str) -> None:
    create_table(database)
    database.run(
        f"ALTER TABLE {TABLE} RENAME TO plain; CREATE TABLE {TABLE} (LIKE plain) PARTITION BY LIST (sector);"
        f" CREATE TABLE one PARTITION OF {TABLE} FOR VALUES IN ('semantic');"
        f" CREATE TABLE two PARTITION OF {TABLE} DEFAULT"
    )
    load(database, ROWS)
    database.run(trigger)

    refused = alembic(database, "upgrade", "head", check=False)

    where = ' in partition "public.two"' if "ON two" in trigger else ""
    assert re.search(
        f'FAILED: (UPDATE|INSERT) of "public.[a-z_]+" would fail from now on{where}: SQLSTATE 42601', refused.log
    )
    assert column_type(database) is None


def test_what_is_in_order_at_the_end_of_a_transaction_only_is_in_order(database: Database) -> None:
    """The row of an audit comes before that which it points to, by a constraint that waits for the end."""
    create_table(database)
    load(database, ROWS)
    database.run(
        f"""
        CREATE TABLE event (id uuid PRIMARY KEY);
        CREATE TABLE audit (event uuid REFERENCES event DEFERRABLE INITIALLY DEFERRED);
        CREATE FUNCTION a() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN INSERT INTO audit VALUES (NEW.id); RETURN NULL; END $$;
        CREATE FUNCTION b() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN INSERT INTO event VALUES (NEW.id) ON CONFLICT DO NOTHING; RETURN NULL; END $$;
        CREATE TRIGGER a AFTER UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION a();
        CREATE TRIGGER b AFTER UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION b()
        """
    )
    for engine in ("client", "server", "native"):
        alembic(database, "upgrade", "head", env=NO_INDEX | {"OM_BACKFILL_ENGINE": engine})
        assert mismatches(database) == []
        alembic(database, "downgrade", "base")


LOCKED = f"""
SELECT EXISTS (SELECT FROM pg_locks
               WHERE relation = '{TABLE}'::regclass AND mode = 'AccessExclusiveLock' AND granted)
"""


def test_a_trial_makes_nobody_give_way(database: Database) -> None:
    """Who has locked a row that a trigger wants, and then wants the table, would be the victim of a deadlock."""
    create_table(database)
    load(database, ROWS)
    database.run(
        f"""
        CREATE TABLE counted (n integer); INSERT INTO counted VALUES (0);
        CREATE FUNCTION count_it() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN UPDATE counted SET n = n + 1; RETURN NULL; END $$;
        CREATE TRIGGER count_it AFTER INSERT OR UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION count_it()
        """
    )
    with (
        transaction(database, "UPDATE counted SET n = n + 1") as application,
        running(database, "upgrade", EXPAND, env=NO_INDEX) as run,
    ):
        eventually(lambda: database.value(LOCKED) or run.process.poll() is not None)
        application.cursor().execute(f"UPDATE {TABLE} SET user_id = 'mine' WHERE id = '{ROWS[0].id}'")
        application.commit()  # for which the trial has waited, in tries
        assert run.ends() == 0
    assert column_type(database) is not None


def test_what_keeps_the_trial_waiting_is_waited_for(database: Database) -> None:
    """Not tried would not be in order: afterwards each write of the application's would fail."""
    create_table(database)
    load(database, ROWS)
    database.run(WHOLE)
    with (
        transaction(database, "LOCK TABLE audit IN SHARE MODE") as reader,
        running(database, "upgrade", "head", env=NO_INDEX) as run,
    ):
        run.says("try 2 of 30")
        reader.rollback()
        assert run.ends() != 0
    assert "would fail from now on: SQLSTATE 42601" in run.log
    assert column_type(database) is None


def test_a_row_that_takes_no_update_is_not_what_is_tried(database: Database) -> None:
    create_table(database)
    load(database, ROWS)
    database.run(f"{WHOLE}; ALTER TABLE {TABLE} ADD CHECK (id NOT IN ('{ROWS[0].id}', '{ROWS[1].id}')) NOT VALID")

    refused = alembic(database, "upgrade", "head", check=False)

    assert "would fail from now on: SQLSTATE 42601" in refused.log
    assert column_type(database) is None


def test_what_could_not_be_tried_is_said(database: Database) -> None:
    create_table(database)
    load(database, ROWS)
    database.run(
        WHOLE.replace("NEW.*", "NEW.id")
        + f"""; CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no'; END $$;
        CREATE TRIGGER keep BEFORE DELETE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION keep()"""
    )
    done = alembic(database, "upgrade", "head", env=NO_INDEX)
    assert "bear the change could not be tried with INSERT" in done.stderr
    assert mismatches(database) == []


def test_no_row_is_deleted_to_try_a_write_where_a_trigger_would_hear_of_it(database: Database) -> None:
    """It may do what no rollback takes back, as a sequence does."""
    create_table(database)
    load(database, ROWS)
    database.run(
        f"""CREATE SEQUENCE deleted; CREATE FUNCTION mirror() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM nextval('deleted'); RETURN NULL; END $$;
        CREATE TRIGGER mirror AFTER DELETE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION mirror()"""
    )
    alembic(database, "upgrade", "head", env=NO_INDEX)
    assert database.value("SELECT is_called FROM deleted") is False


def test_what_a_trigger_raises_is_not_a_lock_that_is_waited_for(database: Database) -> None:
    create_table(database)
    load(database, ROWS)
    database.run(
        f"""CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE 'SECRET of %', NEW.user_id USING ERRCODE = '55P03'; END $$;
        CREATE TRIGGER refuse BEFORE UPDATE ON {TABLE} FOR EACH ROW WHEN (NEW.id = '{ROWS[0].id}')
        EXECUTE FUNCTION refuse()"""
    )
    done = alembic(database, "upgrade", "head", env=NO_INDEX, check=False)
    assert "SECRET" not in done.log
    assert "1 rows" in done.log
    assert database.value(f"SELECT count(v_vector) FROM {TABLE}") == len(ROWS) - 1


@pytest.mark.parametrize("engine", ["client", "native"])
def test_what_a_trigger_raises_is_no_connection_that_was_lost(database: Database, engine: str) -> None:
    create_table(database)
    load(database, ROWS)
    alembic(database, "upgrade", EXPAND)
    database.run(
        f"""CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE 'server closed the connection unexpectedly' USING ERRCODE = '08006'; END $$;
        CREATE TRIGGER refuse BEFORE UPDATE ON {TABLE} FOR EACH ROW WHEN (NEW.id = '{ROWS[0].id}')
        EXECUTE FUNCTION refuse()"""
    )
    done = alembic(database, "upgrade", "head", env=NO_INDEX | {"OM_BACKFILL_ENGINE": engine}, check=False)
    assert "lost" not in done.log
    assert database.value(f"SELECT count(v_vector) FROM {TABLE}") == len(ROWS) - 1


def test_a_partition_that_is_left_half_detached_is_named(database: Database) -> None:
    create_table(database)
    database.run(
        f"ALTER TABLE {TABLE} RENAME TO plain; CREATE TABLE {TABLE} (LIKE plain) PARTITION BY HASH (id);"
        f" CREATE TABLE one PARTITION OF {TABLE} FOR VALUES WITH (MODULUS 2, REMAINDER 0);"
        f" CREATE TABLE two PARTITION OF {TABLE} FOR VALUES WITH (MODULUS 2, REMAINDER 1)"
    )
    load(database, ROWS)
    with transaction(database, f"SELECT FROM {TABLE}"), closing(database.connect()) as connection:
        connection.autocommit = True
        cursor = connection.cursor()
        cursor.execute("SET lock_timeout = '200ms'")
        with pytest.raises(psycopg2.errors.LockNotAvailable):
            cursor.execute(f"ALTER TABLE {TABLE} DETACH PARTITION two CONCURRENTLY")

    finalize = f"ALTER TABLE public.{TABLE} DETACH PARTITION public.two FINALIZE;"
    checked = om(database, "check")
    assert (checked.returncode, finalize in checked.stdout) == (1, True)
    refused = alembic(database, "upgrade", "head", check=False)
    assert finalize in refused.log
    assert column_type(database) is None
    database.run(finalize)
    alembic(database, "upgrade", "head", env=NO_INDEX)
    assert mismatches(database) == []


def test_subscribers_that_lack_the_bytes_are_named_before_they_come_back(database: Database) -> None:
    create_table(database)
    load(database, random_rows(60, 8))
    alembic(database, "upgrade", "head")
    cut_over(database, "drop")
    database.run(f'CREATE PUBLICATION "some ""of it""" FOR TABLE {TABLE}')

    said = undo(database).log

    warned = said.index('WARNING:  publication "some ""of it""" sends "public.openmemory_vectors" to its subscribers')
    line = 'On each subscriber first: ALTER TABLE "public"."openmemory_vectors" ADD COLUMN "v_bytea" bytea;'
    assert warned < said.index(line) < said.index("rebuilding")
    assert "rebuilding" in said


SPOILS = trigger("zz_spoils", "UPDATE OF user_id", "NEW.v := set_byte(NEW.v, 0, 1)")


def test_where_a_trigger_may_have_changed_them_every_row_is_compared(database: Database) -> None:
    """That ours doesn't see: another column was updated, and the bytes are others than the vector was made of."""
    create_table(database)
    load(database, ROWS)
    alembic(database, "upgrade", "om_20240107_backfill")
    database.run(f"{SPOILS}; UPDATE {TABLE} SET user_id = 'z' WHERE id = '{ROWS[3].id}'")

    done = alembic(database, "upgrade", "head", env=NO_INDEX, check=False)

    assert f'FAILED: 1 rows of "public.{TABLE}" are not right' in done.log
    assert f"(id={ROWS[3].id}, sector={ROWS[3].sector})" in done.log
    assert 'trigger "zz_spoils"' in done.log
    database.run(f"DROP TRIGGER zz_spoils ON {TABLE}; UPDATE {TABLE} SET v = v")
    database.run(STAMPS)  # which leaves the columns alone
    assert "compared to the bit" not in alembic(database, "upgrade", "head", env=NO_INDEX).log
    alembic(database, "downgrade", "om_20240107_backfill")
    database.run(AFTER)
    assert f"was compared to the bit: {len(ROWS)} are equal" in alembic(database, "upgrade", "head", env=NO_INDEX).log


NOT_VALID = [
    f"ALTER TABLE {TABLE} ADD CONSTRAINT named CHECK (user_id <> 'u:%s {{x}}') NOT VALID",
    f"ALTER TABLE {TABLE} ADD CONSTRAINT named CHECK (long(user_id)) NOT VALID",
]


@pytest.mark.parametrize("constraint", quickly(*NOT_VALID))
def test_rows_that_a_constraint_would_refuse_are_counted_before(database: Database, constraint: str) -> None:
    create_table(database)
    load(database, ROWS)
    database.run("CREATE FUNCTION odd(text) RETURNS boolean LANGUAGE sql AS $$ SELECT $1 NOT LIKE 'u:%' $$")
    database.run("CREATE FUNCTION long(text) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN return odd($1); END $$")
    database.run(f"UPDATE {TABLE} SET user_id = 'u:%s {{x}}' WHERE ctid IN ('(0,2)', '(0,5)')")
    database.run(constraint)

    told = finding(unchanged(database, 1), "not-valid")

    assert told["message"] == f'2 rows of "public.{TABLE}" violate constraint "named", which is NOT VALID'
    refused = alembic(database, "upgrade", "head", env=NO_INDEX, check=False)
    assert f'FAILED: 2 rows of "public.{TABLE}" could not be converted' in refused.log
    passed_by = {"OM_ON_BAD_ROWS": "skip"}
    assert finding(check(database, 0, env=passed_by), "not-valid")["severity"] == "warning"
    database.run(f"UPDATE {TABLE} SET user_id = 'z' WHERE user_id LIKE 'u%'")
    database.run(told["hint"].partition(": ")[2].partition(";")[0])
    check(database, 0)


@pytest.mark.slow
def test_a_table_that_has_no_room_for_a_column_is_told_so(server: embedded.Server, database: Database) -> None:
    create_table(database)
    load(database, ROWS)
    used = 5

    def use(until: int) -> None:
        nonlocal used
        for number in range(used, until):
            database.run(f"ALTER TABLE {TABLE} ADD x{number} integer; ALTER TABLE {TABLE} DROP x{number}")
        used = until

    use(1592)
    near = finding(unchanged(database, 0), "columns")
    assert (near["severity"], near["message"]) == (
        "warning",
        f'"public.{TABLE}" has used 1,592 of the 1,600 columns that a table can have',
    )
    assert near["message"] in alembic(database, "upgrade", "head", env=NO_INDEX).log
    use(1599)  # and ours
    refused = alembic(database, "-n", "cutover", "upgrade", "head", env=NO_INDEX | {"OM_CUTOVER": "drop"}, check=False)
    assert "FAILED: " + near["message"].replace("1,592", "1,600") in refused.log
    cut_over(database, "swap", env=NO_INDEX)
    undo(database)
    assert mismatches(database) == []
    alembic(database, "downgrade", "base")
    full = finding(unchanged(database, 1), "columns")
    assert f"FAILED: {full['message']}" in alembic(database, "upgrade", "head", check=False).log
    database.run("DROP TABLE openmemory_alembic_version")
    script = offline(server, database, "upgrade", "head", env={"OM_VEC_DIM": "8"}, check=False)
    assert f"ERROR:  {full['message']}" in script.stderr


def test_before_a_drop_the_statement_that_keeps_a_copy_is_told(database: Database) -> None:
    create_table(database)
    load(database, ROWS)
    alembic(database, "upgrade", "head", env=NO_INDEX)
    env = NO_INDEX | {"OM_CUTOVER": "drop"}

    told = finding(check(database, 0, env=env), "drop")

    database.run(told["hint"].partition(": ")[2])
    assert told["message"] in cut_over(database, "drop", env=NO_INDEX).log
    assert database.value(f"SELECT count(v) FROM {TABLE}_v_copy") == len(ROWS)
    assert "drop" not in severities(check(database, 0))


AUDIT = f"CREATE TABLE audit (LIKE {TABLE}); "
WHOLE_ROWS = {
    "when it changes": trigger("changes", "UPDATE OF v", "INSERT INTO public.audit SELECT OLD.*").replace(
        "FOR EACH ROW", "FOR EACH ROW WHEN (OLD.v IS DISTINCT FROM NEW.v)"
    ),
    "deleted": trigger("goes", "DELETE", "INSERT INTO public.audit SELECT OLD.*").replace("RETURN NEW", "RETURN OLD"),
    "all of a statement": "CREATE FUNCTION noted() RETURNS trigger LANGUAGE plpgsql AS"
    " 'BEGIN INSERT INTO public.audit SELECT * FROM added; RETURN NULL; END';"
    f" CREATE TRIGGER noted AFTER INSERT ON {TABLE} REFERENCING NEW TABLE AS added"
    " FOR EACH STATEMENT EXECUTE FUNCTION noted()",
    "put together": trigger("puts", "INSERT", "EXECUTE format($f$INSERT INTO public.audit SELECT ($1).*$f$) USING NEW")
    .replace("AS 'BEGIN", "AS $b$BEGIN")
    .replace("RETURN NEW; END'", "RETURN NEW; END$b$"),
}


@pytest.mark.parametrize("what", quickly(*WHOLE_ROWS))
def test_any_write_that_would_fail_with_a_column_more_is_told_before(database: Database, what: str) -> None:
    create_table(database)
    load(database, ROWS)
    database.run(AUDIT + WHOLE_ROWS[what])

    told = finding(unchanged(database, 1), "whole-row")

    assert f"FAILED: {told['message']}" in alembic(database, "upgrade", "head", env=NO_INDEX, check=False).log
    database.run("ALTER TABLE audit ADD v_vector text")
    alembic(database, "upgrade", "head", env=NO_INDEX)
    assert database.value("SELECT count(*) FROM audit") == 0


def test_a_look_runs_nothing_of_the_owners_as_a_superuser(database: Database) -> None:
    create_table(database)
    load(database, ROWS)
    role = f"owner of {database.name}"
    database.run(f'CREATE ROLE "{role}"; GRANT CREATE ON SCHEMA public TO "{role}"')
    database.run(f'ALTER TABLE {TABLE} OWNER TO "{role}"')
    database.run(
        "CREATE FUNCTION looks() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF current_setting('is_superuser') = 'on' THEN PERFORM setval('seen', 7); END IF;"
        " PERFORM (NEW).*; RETURN NEW; END $$;"
        f" CREATE SEQUENCE seen; CREATE TRIGGER looks AFTER UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION looks()"
    )
    try:
        check(database, 0)
        assert database.value("SELECT last_value FROM seen") == 1
    finally:
        database.run(f'DROP OWNED BY "{role}" CASCADE; DROP ROLE "{role}"')


@pytest.mark.parametrize("argument", quickly("{user_id}", ":id", "{table}", "%s"))
def test_arguments_of_triggers_are_no_fields(database: Database, argument: str) -> None:
    create_table(database)
    load(database, ROWS)
    database.run(AUDIT + trigger("notes", "UPDATE", "INSERT INTO public.audit SELECT NEW.*"))
    database.run(
        f"DROP TRIGGER notes ON {TABLE};"
        f" CREATE TRIGGER notes AFTER UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION notes('true', '{argument}')"
    )

    assert severities(unchanged(database, 1))["whole-row"] == "error"


@pytest.mark.parametrize("sync", quickly("on", "off"))
def test_a_trigger_of_others_under_our_name_stays(database: Database, sync: str) -> None:
    create_table(database)
    load(database, ROWS)
    database.run(
        "CREATE FUNCTION mine() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';"
        f" CREATE TRIGGER {TABLE}_vvector_sync BEFORE INSERT ON {TABLE} FOR EACH ROW EXECUTE FUNCTION mine()"
    )
    env = NO_INDEX | {"OM_SYNC_TRIGGER": sync}
    if sync == "on":
        told = finding(unchanged(database, 1), "trigger-taken")
        assert f"FAILED: {told['message']}" in alembic(database, "upgrade", "head", env=env, check=False).log
    alembic(database, "upgrade", "head", env=env, check=sync == "off")
    alembic(database, "downgrade", "base", env=env)
    assert database.value("SELECT tgfoid::regproc::text FROM pg_trigger WHERE tgname LIKE '%%vvector%%'") == "mine"


def test_a_row_that_moves_to_another_partition_is_thought_of(database: Database) -> None:
    database.run(
        f"CREATE TABLE {TABLE} (id uuid, sector text, user_id text, v bytea, dim integer) PARTITION BY LIST (sector);"
        f" CREATE TABLE one PARTITION OF {TABLE} FOR VALUES IN ('semantic');"
        f" CREATE TABLE rest PARTITION OF {TABLE} DEFAULT"
    )
    load(database, ROWS)
    database.run(trigger("a_norm", "INSERT", "NEW.v := set_byte(NEW.v, 0, 1)"))
    told = finding(unchanged(database, 0), "interference")
    assert 'trigger "a_norm"' in told["message"]
    assert told["message"] in alembic(database, "upgrade", "head", env=NO_INDEX).log


def test_a_row_filter_that_refuses_updates_is_told_before(database: Database) -> None:
    create_table(database)
    load(database, ROWS)
    database.run(f"CREATE PUBLICATION part FOR TABLE {TABLE} WHERE (user_id <> 'x')")

    told = finding(unchanged(database, 1), "update")

    assert "Take the row filter or the column list off the publication" in told["hint"]
    assert f"FAILED: {told['message']}" in alembic(database, "upgrade", "head", env=NO_INDEX, check=False).log
    assert column_type(database) is None


def test_what_a_constraint_says_of_a_row_is_not_shown(database: Database) -> None:
    create_table(database)
    load(database, ROWS)
    database.run(f"ALTER TABLE {TABLE} ADD CONSTRAINT number CHECK (user_id::integer > 0) NOT VALID")

    done = om(database, "check")

    assert done.returncode == 1
    assert f'constraint "number" of "public.{TABLE}", which is NOT VALID, fails for a row' in done.log
    assert str(ROWS[0].user_id) not in done.log


# a NOT NULL that not all rows keep: before PostgreSQL 18 only the catalogs can be made to say so
NEVER_VALID = {
    "18": f"ALTER TABLE {TABLE} ADD CONSTRAINT never NOT NULL v NOT VALID",
    "16": f"UPDATE pg_attribute SET attnotnull = true WHERE attrelid = '{TABLE}'::regclass AND attname = 'v'",
}


def test_a_cutover_that_could_not_be_undone_is_refused(database: Database) -> None:
    create_table(database)
    load(database, [ROWS[0]._replace(v=None), *ROWS[1:]])
    database.run(NEVER_VALID[CHOICE[:2]])
    alembic(database, "upgrade", "head", env=NO_INDEX)
    for mode in ("swap", "drop"):
        up = ("-n", "cutover", "upgrade", "head")
        refused = alembic(database, *up, env=NO_INDEX | {"OM_CUTOVER": mode}, check=False)
        assert "FAILED: 1 rows of" in refused.log
        assert "which is to be NOT NULL" in refused.log
    database.run(f"DELETE FROM {TABLE} WHERE v IS NULL")
    cut_over(database, "drop", env=NO_INDEX)
    undo(database)


def test_finalize_and_repair_say_what_a_trigger_that_did_nothing_has_left(database: Database) -> None:
    create_table(database)
    load(database, ROWS)
    alembic(database, "upgrade", "om_20240107_backfill")
    database.run(
        f"CREATE OR REPLACE FUNCTION {TABLE}_vvector_sync() RETURNS trigger LANGUAGE plpgsql"
        f" AS 'BEGIN RETURN NEW; END'; UPDATE {TABLE} SET v = set_byte(v, 0, 3)"
    )

    refused = alembic(database, "upgrade", "head", env=NO_INDEX, check=False)

    assert "HINT:  openmemory-migrations repair, then openmemory-migrations verify --queries 0." in refused.log
    repaired = om(database, "repair")
    assert repaired.returncode == 0
    assert "WARNING:  rows of" in repaired.log
    assert om(database, "verify", "--queries", "0").returncode == 1
    database.run(f"UPDATE {TABLE} SET v = v")
    alembic(database, "upgrade", "head", env=NO_INDEX)
    assert om(database, "verify", "--queries", "0").returncode == 0
