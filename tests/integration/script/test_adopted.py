"""The scripts of `alembic … --sql` in one direction and the other, where something is there already, or goes on."""

from __future__ import annotations

import itertools
import random
import re
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import psycopg2
import pytest

from demo.openmemory import TABLE
from openmemory_migrations.embedded import Server
from openmemory_migrations.sql import blocks
from tests.support import host_init
from tests.support.adopted import EXPAND_SQL, FILL, FINALIZE_SQL, OWN, SCRIPTS, by_hand, with_sourceless
from tests.support.cases import exhaustive, pairwise
from tests.support.commands import alembic
from tests.support.databases import Databases
from tests.support.openmemory import Database, checksum, create_table, load, mismatches, pack, random_rows
from tests.support.scripts import (
    DIM8,
    SINGLE,
    Case,
    assert_same,
    everything,
    offline,
    psql,
    script,
    start_psql,
    stopped,
    twins,
)
from tests.support.sessions import eventually
from tests.support.states import (
    BACKFILL,
    EXPAND,
    HEAD,
    INDEX,
    INVALIDATE,
    SECOND_INDEX,
    column_type,
    follows,
    snapshot,
    stamp,
)

pytestmark = pytest.mark.slow  # many processes: .ci/run has the time

DIM = 8
WITHOUT_SOURCE = f"""
INSERT INTO {TABLE} (id, sector, dim, v_vector) SELECT lpad(count(*)::text, 32, '0')::uuid, 'own', 8, {OWN} FROM {TABLE}
"""


def adopted(script: str, fill: str) -> Callable[[Database], None]:
    def prepare(database: Database) -> None:
        by_hand(database, SCRIPTS[script], fill)
        if fill == "stale":
            database.run(INVALIDATE)
        for _ in range(3):
            database.run(WITHOUT_SOURCE)
        database.run(f"COMMENT ON COLUMN {TABLE}.v_vector IS 'it''s mine: 100%'")

    return prepare


@pytest.mark.parametrize(
    ("made", "fill", "single"),
    [*pairwise([*SCRIPTS], [*FILL], [{}, SINGLE])],
    ids=lambda value: value if isinstance(value, str) else "one transaction" * bool(value),
)
def test_a_column_made_by_hand_is_adopted_as_online(
    server: Server, databases: Databases, made: str, fill: str, single: dict[str, str]
) -> None:
    with twins(databases, adopted(made, fill)) as (online, by_script):
        before = everything(by_script)
        v = checksum(by_script)

        # and back while the column is still there
        for database in (online, by_script):
            offline(server, database, "upgrade", EXPAND, env=DIM8 | single)
            assert column_type(database, "v_vector_adopted") == format_of(made)
        alembic(online, "downgrade", "base", env=DIM8)
        offline(server, by_script, "downgrade", f"{EXPAND}:base", env=DIM8 | single)
        after = everything(by_script)
        assert_same(everything(online), after)
        assert_same(before | {what: after[what] for what in ("version table", "stamp")}, after)
        by_script.run("DROP TABLE openmemory_alembic_version")

        alembic(online, "upgrade", "head", env=DIM8)
        offline(server, by_script, "upgrade", "head", env=DIM8 | single)

        assert_same(everything(online), everything(by_script))
        assert len(mismatches(by_script, dim=DIM)) == 3
        assert by_script.value(f"SELECT count(*) FROM {TABLE} WHERE v_vector::text = {OWN}") == 3
        assert checksum(by_script) == v
        assert column_type(by_script, "v_vector_adopted") is None


def format_of(made: str) -> str:
    return "vector" if made == "no dimension" else f"vector({DIM})"


@pytest.mark.parametrize("single", [{}, pytest.param(SINGLE, marks=pytest.mark.slow)], ids=["", "one transaction"])
def test_a_column_that_would_lose_values_or_breaks_a_view_stops_the_script_before_any_change(
    server: Server, database: Database, single: dict[str, str]
) -> None:
    with_sourceless(database, SCRIPTS["no dimension"], [OWN, "'[1,2,3]'", "'[4,5,6]'"])
    stopped(server, database, single, "2 vectors of other than 8 dimensions have no source")

    database.run(f"DELETE FROM {TABLE} WHERE v IS NULL; CREATE VIEW report AS SELECT id, v_vector FROM {TABLE}")
    stopped(server, database, single, "can't be replaced while views show it", "HINT:  Drop them")

    database.run(f"CREATE OR REPLACE VIEW report AS SELECT id, NULL::vector AS v_vector FROM {TABLE}")
    offline(server, database, "upgrade", "head", env=DIM8 | single)
    assert mismatches(database, dim=DIM) == []


def test_the_set_aside_column_is_tried_to_be_dropped_until_nobody_reads_it(server: Server, database: Database) -> None:
    by_hand(database, SCRIPTS["both indexes"])
    offline(server, database, "upgrade", EXPAND)
    rest = script("upgrade", f"{EXPAND}:head", env=DIM8 | {"OM_LOCK_TIMEOUT_MS": "50"})
    with closing(psycopg2.connect(database.url)) as reader, reader.cursor() as cursor:
        cursor.execute(f"SELECT 1 FROM {TABLE}")
        process = start_psql(server, database, rest)
        try:
            assert process.stderr
            said = ""
            while "try 2 of 30" not in said:
                line = process.stderr.readline()
                assert line, said
                said += line
            reader.rollback()
            _, more = process.communicate(timeout=120)
        finally:
            process.kill()

    assert process.returncode == 0, said + more
    assert column_type(database, "v_vector_adopted") is None
    assert mismatches(database) == []


# what somebody makes under our names before the last step
FOUND = {
    "duplicate": FINALIZE_SQL,
    "both": FINALIZE_SQL + EXPAND_SQL,
    "both, invalid": FINALIZE_SQL + EXPAND_SQL + INVALIDATE,
    "another kind": f"CREATE INDEX {INDEX} ON {TABLE} USING hnsw (v_vector vector_cosine_ops)",
    "another metric": f"CREATE INDEX {SECOND_INDEX} ON {TABLE} USING ivfflat (v_vector vector_ip_ops)",
    "another column": f"CREATE INDEX {INDEX} ON {TABLE} (user_id); CREATE INDEX {SECOND_INDEX} ON {TABLE} (dim)",
    "another table": f"CREATE TABLE other (v_vector vector(8)); CREATE INDEX {INDEX} ON other USING hnsw"
    f" (v_vector vector_l2_ops); CREATE INDEX {SECOND_INDEX} ON other USING hnsw (v_vector vector_l2_ops);"
    + INVALIDATE,
    "a table": f"CREATE TABLE {INDEX} (); CREATE TABLE {SECOND_INDEX} ()",
}


@pytest.mark.parametrize(
    ("found", "single"),
    [
        *((name, {}) for name in FOUND),
        ("both", SINGLE),
        *(exhaustive(name, SINGLE) for name in FOUND if name != "both"),
    ],
    ids=lambda value: value if isinstance(value, str) else "one transaction" * bool(value),
)
def test_an_index_under_our_names_is_dealt_with_as_online(
    server: Server, databases: Databases, found: str, single: dict[str, str]
) -> None:
    def prepare(database: Database) -> None:
        Case().prepare(database)
        offline(server, database, "upgrade", BACKFILL)
        database.run(FOUND[found])

    with twins(databases, prepare) as (online, by_script):
        alembic(online, "upgrade", "head", env=DIM8)
        offline(server, by_script, "upgrade", f"{BACKFILL}:head", env=DIM8 | single)
        assert_same(everything(online), everything(by_script))

        alembic(online, "downgrade", "base", env=DIM8)
        offline(server, by_script, "downgrade", "head:base", env=DIM8 | single)
        assert_same(everything(online), everything(by_script))


def edges() -> list[tuple[str, str]]:
    """A walk that takes every range between two of the four states once, each in both directions."""
    states = ["base", EXPAND, BACKFILL, HEAD]
    left = set(itertools.permutations(range(4), 2))

    def walk(at: int, left: frozenset[tuple[int, int]]) -> list[int] | None:
        if not left:
            return [at]
        for edge in sorted(left):
            if edge[0] == at and (rest := walk(edge[1], left - {edge})):
                return [at, *rest]
        return None

    found = walk(0, frozenset(left))
    assert found
    return [(states[a], states[b]) for a, b in itertools.pairwise(found)]


WALKS = {
    "step by step": [("base", EXPAND), (EXPAND, HEAD), (HEAD, BACKFILL), (BACKFILL, EXPAND), (EXPAND, "base")],
    "every range": edges(),
}


@pytest.mark.parametrize(
    ("walk", "single"),
    [
        ("step by step", {}),
        pytest.param("every range", {}, marks=pytest.mark.slow),
        pytest.param("every range", SINGLE, marks=pytest.mark.slow),
    ],
)
def test_every_range_up_and_down_does_what_the_online_commands_do(
    server: Server, databases: Databases, walk: str, single: dict[str, str]
) -> None:
    order = ["base", EXPAND, BACKFILL, HEAD]
    with twins(databases, Case().prepare) as (online, by_script):
        v = checksum(by_script)
        for a, b in WALKS[walk]:
            command = "upgrade" if order.index(a) < order.index(b) else "downgrade"
            if a == "base":  # whose script creates the version table
                by_script.run("DROP TABLE IF EXISTS openmemory_alembic_version")

            alembic(online, command, b, env=DIM8)
            offline(server, by_script, command, f"{a}:{b}", env=DIM8 | single)

            state = everything(by_script)
            assert_same(everything(online), state)
            assert state["stamp"] == ([] if b == "base" else [b])
        assert checksum(by_script) == v


@pytest.mark.parametrize("single", [{}, pytest.param(SINGLE, marks=pytest.mark.slow)], ids=["", "one transaction"])
def test_a_downgrade_that_would_lose_values_is_refused_with_their_number_until_that_is_accepted(
    server: Server, databases: Databases, single: dict[str, str]
) -> None:
    def prepare(database: Database) -> None:
        Case().prepare(database)
        offline(server, database, "upgrade", "head")
        database.run(WITHOUT_SOURCE)
        database.run(f"UPDATE {TABLE} SET v_vector = {OWN} WHERE v = ''")

    with twins(databases, prepare) as (online, by_script):
        back = ("downgrade", "head:base")
        result = offline(server, by_script, *back, env=DIM8 | single, check=False)
        assert result.returncode == 3
        assert "2 values have no source and would be lost" in result.stderr
        assert "OM_ACCEPT_LOSS=2" in result.stderr
        kept = HEAD if single else EXPAND  # the index is dropped, and the stamp doesn't deny it
        assert stamp(by_script) == [kept]
        back = ("downgrade", f"{kept}:base")
        assert by_script.value(f"SELECT count(*) FROM {TABLE} WHERE v_vector::text = {OWN}") == 2

        stopped(server, by_script, single | {"OM_ACCEPT_LOSS": "1"}, "2 values", command=back)

        accepted = DIM8 | {"OM_ACCEPT_LOSS": "2"}
        offline(server, by_script, *back, env=accepted | single)
        alembic(online, "downgrade", "base", env=accepted)
        assert_same(everything(online), everything(by_script))


def test_a_downgrade_does_not_lose_what_was_written_after_the_column_was_set_aside(
    server: Server, database: Database
) -> None:
    by_hand(database, SCRIPTS["no dimension"])
    database.run(WITHOUT_SOURCE)
    before = snapshot(database)
    offline(server, database, "upgrade", EXPAND)
    database.run(WITHOUT_SOURCE)

    stopped(
        server, database, {}, "1 values have no source", "OM_ACCEPT_LOSS=1", command=("downgrade", f"{EXPAND}:base")
    )

    database.run(f"DELETE FROM {TABLE} WHERE v IS NULL AND v_vector IS NOT NULL")
    offline(server, database, "downgrade", f"{EXPAND}:base")
    assert_same(before, snapshot(database))


def test_a_downgrade_where_there_is_nothing_says_so(server: Server, database: Database) -> None:
    Case().prepare(database)
    offline(server, database, "upgrade", "head")
    database.run(f"DROP TABLE {TABLE} CASCADE")

    result = offline(server, database, "downgrade", "head:base")

    assert f'WARNING:  table "public.{TABLE}" does not exist' in result.stderr
    assert stamp(database) == []


@pytest.mark.parametrize("single", [{}, pytest.param(SINGLE, marks=pytest.mark.slow)], ids=["", "one transaction"])
def test_a_table_without_trigger_leaves_the_function_to_the_other_table_that_has_one(
    server: Server, database: Database, single: dict[str, str]
) -> None:
    Case().prepare(database)
    Case(table="second").prepare(database)
    offline(server, database, "upgrade", "head", env=DIM8 | single)

    second = DIM8 | single | {"OM_VECTOR_TABLE": "second", "OM_SYNC_TRIGGER": "off"}
    database.run("DROP TABLE openmemory_alembic_version")
    offline(server, database, "upgrade", "head", env=second)
    assert mismatches(database, "second") == []
    assert follows(database, DIM)

    offline(server, database, "downgrade", "head:base", env=second)
    assert follows(database, DIM)


STUB = """
from openmemory_migrations import ops
OPTIONS = dict(table="chunks", column="total", vector_column="found", dimensions=8, batch=7, index="hnsw")
revision, down_revision = {0!r}, {1!r}
def upgrade(**kw): ops.upgrade_{2}(**OPTIONS)
def downgrade(**kw): ops.downgrade_{2}(**OPTIONS)
"""


# what our statements call their columns, beside those of the table
OURS = ("attempt", "tid", "sum", "element", "version", "newest", "was_at", "was", "now", "ok", "name", "oid")
REWRITES = """
ALTER TABLE chunks ADD times integer NOT NULL DEFAULT 0;
CREATE FUNCTION again() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN UPDATE chunks SET times = 1 WHERE id = NEW.id AND times = 0; RETURN NULL; END $$;
CREATE TRIGGER again AFTER UPDATE ON chunks FOR EACH ROW EXECUTE FUNCTION again()
"""


@pytest.mark.parametrize("engine", [None, "client", "server"])
def test_a_hosts_own_table_may_call_its_columns_as_we_call_variables_and_columns(
    server: Server, databases: Databases, tmp_path: Path, engine: str | None
) -> None:
    env = {"OM_BACKFILL_ENGINE": engine} if engine else {}
    of = blocks("script")
    texts = "\n".join((of.expand, of.backfill, of.drop_expand))
    declared = "".join(re.findall("^DECLARE$(.*?)^BEGIN$", texts, re.M | re.S))
    variables = sorted({*re.findall(r"^  (\w+) ", declared, re.MULTILINE), *OURS} - {"found", "total"})

    def prepare(database: Database) -> None:
        columns = "".join(f", {name} text" for name in variables)
        database.run(f"CREATE TABLE chunks (id bigint PRIMARY KEY, total bytea{columns})")
        for i, row in enumerate(random_rows(30, DIM)):
            database.run("INSERT INTO chunks (id, total) VALUES (%s, %s)", i, row.v)
        database.run("INSERT INTO chunks (id, total) VALUES (100, 'abc'), (101, NULL)")
        database.run(REWRITES)

    steps = zip((EXPAND, BACKFILL, HEAD), (None, EXPAND, BACKFILL), ("expand", "backfill", "finalize"), strict=True)
    with twins(databases, prepare) as (online, by_script):
        host = host_init.init(tmp_path, online, history={step[0]: STUB.format(*step) for step in steps})
        before = snapshot(by_script)

        host.alembic("upgrade", "head", env=env)
        psql(server, by_script, host.alembic("upgrade", "head", "--sql").stdout)
        state = snapshot(by_script)
        assert_same(snapshot(online), state)
        assert by_script.value("SELECT count(found) FROM chunks") == 30

        psql(server, by_script, host.alembic("downgrade", "head:base", "--sql").stdout)
        by_script.run("DROP TABLE alembic_version; DROP TRIGGER again ON chunks; UPDATE chunks SET times = 0")
        by_script.run("CREATE TRIGGER again AFTER UPDATE ON chunks FOR EACH ROW EXECUTE FUNCTION again()")
        assert_same(before | {"extensions": state["extensions"]}, snapshot(by_script))


def test_a_row_that_is_refused_is_passed_by_in_such_a_table(server: Server, database: Database) -> None:
    create_table(database)
    load(database, random_rows(30, DIM))
    offline(server, database, "upgrade", EXPAND)
    database.run(
        f"ALTER TABLE {TABLE} ADD place integer; UPDATE {TABLE} SET place = 1 WHERE ctid = '(0,3)';"
        f" ALTER TABLE {TABLE} ADD CHECK (place IS NULL) NOT VALID"
    )
    done = offline(server, database, "upgrade", f"{EXPAND}:head", check=False)
    assert "1 rows can't be updated or read" in done.stderr
    assert database.value(f"SELECT count(v_vector) FROM {TABLE}") == 29


def converted(database: Database) -> dict[str, str]:
    return dict(database.rows(f"SELECT id::text, xmin::text FROM {TABLE} WHERE v_vector IS NOT NULL"))


@pytest.mark.parametrize("terminated", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_backfill_whose_psql_is_killed_continues_where_it_was(
    server: Server, database: Database, terminated: bool
) -> None:
    rows = random_rows(6000, 256)
    env = {"OM_VEC_DIM": "256", "BACKFILL_BATCH": "50"}
    create_table(database)
    load(database, rows)
    backend = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'psql'"

    process = start_psql(server, database, script("upgrade", "head", env=env))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        # by the trigger's table there is no v_vector before the first step is committed
        if column_type(database) and database.value(f"SELECT count(v_vector) FROM {TABLE}") > 500:
            break
        time.sleep(0.01)
    process.kill()
    if terminated:
        database.run(f"SELECT pg_terminate_backend(pid, 10000) FROM ({backend}) AS psql")
        assert database.rows(backend) == []
    process.communicate()
    kept = converted(database)
    assert 500 < len(kept) < 6000
    assert stamp(database) == [EXPAND]

    psql(server, database, script("upgrade", f"{EXPAND}:head", env=env))

    assert mismatches(database) == []
    assert stamp(database) == [HEAD]
    assert len(converted(database)) == 6000
    assert kept.items() <= converted(database).items(), "rows that were converted were written again"


@pytest.mark.parametrize("bad", [True, False])
def test_a_row_that_changes_while_it_is_passed_over_never_gets_the_old_value(
    server: Server, database: Database, bad: bool
) -> None:
    create_table(database)
    load(database, random_rows(100, DIM))
    offline(server, database, "upgrade", EXPAND)
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'psql' AND wait_event_type = 'Timeout'"
    new = pack([float("nan")] * DIM) if bad else pack(range(DIM))
    with closing(psycopg2.connect(database.url)) as writer, writer.cursor() as cursor:
        cursor.execute(f"UPDATE {TABLE} SET v = %s WHERE user_id = 'user7'", (new,))
        process = start_psql(server, database, script("upgrade", f"{EXPAND}:head", env=DIM8))
        try:
            # all others are converted, and it rests before the next pass
            eventually(lambda: database.value(waiting))
            writer.commit()
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()

    assert process.returncode == 0, said
    assert database.value(f"SELECT count(*) FROM {TABLE} WHERE v = %s", new) == 5
    assert database.value(f"SELECT count(*) FROM {TABLE} WHERE v_vector IS NULL") == (5 if bad else 0)
    assert mismatches(database) == []


@pytest.mark.parametrize("rows", [3000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_writers_meanwhile_lose_nothing_and_leave_nothing_stale(server: Server, database: Database, rows: int) -> None:
    create_table(database)
    load(database, random_rows(rows, 64))
    keys = [key for (key,) in database.rows(f"SELECT id FROM {TABLE}")]
    env = {"OM_VEC_DIM": "64", "BACKFILL_BATCH": "200"}
    offline(server, database, "upgrade", EXPAND, env=env)
    over = threading.Event()
    writes: list[int] = []
    failed: list[BaseException] = []

    def write(seed: int) -> None:
        pick = random.Random(seed)
        values = [row.v for row in random_rows(50, 64, seed)] + [pack([float("nan")] * 64)] * 20
        try:
            with closing(database.connect()) as connection, connection.cursor() as cursor:
                while not over.is_set():
                    change = pick.choice(["v = %s", "v = %s", "v = %s, user_id = 'moved'"])
                    cursor.execute(
                        f"UPDATE {TABLE} SET {change} WHERE id = %s", (pick.choice(values), pick.choice(keys))
                    )
                    writes.append(1)
        except BaseException as error:
            failed.append(error)

    writers = [threading.Thread(target=write, args=(seed,)) for seed in (1, 2, 3)]
    for writer in writers:
        writer.start()
    try:
        offline(server, database, "upgrade", f"{EXPAND}:head", env=env)
    finally:
        over.set()
        for writer in writers:
            writer.join()

    assert failed == []
    assert len(writes) > 100
    assert mismatches(database) == []
    assert stamp(database) == [HEAD]


def test_without_a_trigger_rows_that_are_written_meanwhile_are_not_counted_as_bad(
    server: Server, database: Database
) -> None:
    create_table(database)
    load(database, random_rows(100, DIM))
    env = DIM8 | {"OM_SYNC_TRIGGER": "off", "OM_ON_BAD_ROWS": "fail"}
    offline(server, database, "upgrade", EXPAND, env=env)
    # stands for a writer who is always there
    database.run(
        "CREATE FUNCTION busy() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" INSERT INTO {TABLE} SELECT gen_random_uuid(), 'new', 'new', v, dim FROM {TABLE} WHERE user_id = 'user1';"
        " RETURN NULL; END $$;"
        f"CREATE TRIGGER busy AFTER UPDATE ON {TABLE} FOR EACH STATEMENT EXECUTE FUNCTION busy()"
    )

    said = offline(server, database, "upgrade", f"{EXPAND}:head", env=env).stderr

    assert " rows were written during the backfill and have no vector" in said
    assert "can't be converted" not in said
    assert stamp(database) == [HEAD]


@pytest.mark.slow
def test_a_long_backfill_tells_its_progress_every_few_seconds(server: Server, database: Database) -> None:
    create_table(database)
    load(database, random_rows(2000, DIM))
    offline(server, database, "upgrade", EXPAND)
    database.run(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.006); RETURN NEW; END'"
    )
    database.run(f"CREATE TRIGGER slow BEFORE UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION slow()")

    said = offline(server, database, "upgrade", f"{EXPAND}:{BACKFILL}", env=DIM8 | {"BACKFILL_BATCH": "50"}).stderr

    done = list(map(int, re.findall(rf"backfill {TABLE}: (\d+) of", said)))
    assert len(done) > 2
    assert done == sorted(done)
    assert 0 < done[0] < done[-1] == 2000
