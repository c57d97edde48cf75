"""The scripts of `alembic … --sql`, run by psql on databases with rows, leave what the online run leaves."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from demo.openmemory import TABLE
from openmemory_migrations.embedded import Server
from tests.support import host_init
from tests.support.cases import exhaustive
from tests.support.commands import alembic
from tests.support.databases import Databases
from tests.support.openmemory import Database, create_table, load, mismatches, random_rows
from tests.support.roles import owner
from tests.support.scripts import (
    DIM8,
    SINGLE,
    SLOWLY,
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
from tests.support.states import BACKFILL, EXPAND, HEAD, column_type, snapshot, stamp

__all__ = ["owner"]
pytestmark = pytest.mark.slow  # many processes: .ci/run has the time


# of these values, beside a column of 8 dimensions
REASONS = {
    "NaN or infinite values": 5,
    "length not a multiple of 4": 2,
    "other dimension": 2,
    "empty": 1,
    "more than 16,000 dimensions": 1,
}


def index(kind: str, metric: str, **more: str) -> dict[str, str]:
    return {"OM_INDEX": kind, "OM_INDEX_METRIC": metric, **more}


METRICS = ("l2", "cosine", "ip")
CASES = {
    "8": Case(single=True),
    "64": Case(64),
    "256, real": Case(256, settings={"OM_TIER": "fast", "OM_VEC_DIM": ""}),
    "2001": Case(2001, 60),
    "4000": Case(4000, 55),
    "4001": Case(4001, 5),
    "16000": Case(16_000, 5),
    "thousands of rows": Case(rows=3120, bad=False),
    "batches of one": Case(settings={"BACKFILL_BATCH": "1"}),
    **{
        # CI has each two of the three together
        f"{dim}, {kind}, {metric}": Case(dim, 60, settings=index(kind, metric), exhaustive=bool((i + j + k) % 2))
        for i, dim in enumerate((8, 2001))
        for j, kind in enumerate(("ivfflat", "hnsw"))
        for k, metric in enumerate(METRICS)
    },
    "hnsw, m": Case(settings=index("hnsw", "l2", OM_INDEX_M="8", OM_INDEX_EF_CONSTRUCTION="40")),
    "halfvec": Case(settings=index("ivfflat", "cosine", OM_INDEX_HALFVEC="on"), single=True),
    "no index": Case(settings={"OM_INDEX": "none"}),
    "no trigger": Case(settings={"OM_SYNC_TRIGGER": "off"}, single=True),
    **{f"{rows} rows": Case(rows=rows, bad=False, single=rows == 0) for rows in (0, 49, 50)},
    "0 rows, hnsw": Case(rows=0, bad=False, settings={"OM_INDEX": "hnsw"}),
    "0 rows, lists": Case(rows=0, bad=False, settings={"OM_INDEX_LISTS": "3"}),
    **{f"{lists} lists": Case(settings={"OM_INDEX_LISTS": lists}) for lists in ("1", "15", "100")},
    "5000 lists": Case(settings={"OM_INDEX_LISTS": "5000", "OM_INDEX_MEMORY": "1GB"}),
    "too little memory": Case(rows=3000, settings={"OM_INDEX_LISTS": "1000", "OM_INDEX_MEMORY": "1MB"}, single=True),
    "memory": Case(settings={"OM_INDEX_MEMORY": "64MB"}),
    "extension there": Case(before="CREATE EXTENSION vector"),
    "extension in extensions": Case(
        before="CREATE SCHEMA extensions; CREATE EXTENSION vector SCHEMA extensions", single=True
    ),
    "extension in extensions, no trigger": Case(
        before="CREATE SCHEMA extensions; CREATE EXTENSION vector SCHEMA extensions",
        settings={"OM_SYNC_TRIGGER": "off"},
    ),
    "extension in extensions, halfvec": Case(
        2001, 60, before="CREATE SCHEMA extensions; CREATE EXTENSION vector SCHEMA extensions"
    ),
    "extensions, still empty": Case(before="CREATE SCHEMA extensions"),
    "extension in quotes": Case(before='CREATE SCHEMA "Ex""t\'s"; CREATE EXTENSION vector SCHEMA "Ex""t\'s"'),
    "Om-Test": Case(schema="Om-Test", table="select"),
    "quotes": Case(schema='qu"o\'t"e', table='it\'s "one"'),
    "dollars": Case(schema="$script$", table="a$function$b", single=True),
    "tags": Case(schema="$function$", table="$script$", settings={"OM_INDEX": "hnsw"}),
    "backslash": Case(schema="back\\slash", table="\\gexec"),
    "psql's variables": Case(schema="a:b", table=":'HOST'"),
    "percent": Case(schema="100%", table="%s %(a)s"),
    "lines": Case(schema="new\nline", table="lists = 1\n; --"),
    "63 bytes": Case(schema="ö" * 31, table="ä" * 31),
}


@pytest.mark.parametrize(
    ("case", "single"),
    [
        pytest.param(
            *(case, single),
            marks=pytest.mark.exhaustive if CASES[case].exhaustive or (single and not CASES[case].single) else [],
            id=case + ", one transaction" * bool(single),
        )
        for case in CASES
        for single in ({}, SINGLE)
    ],
)
def test_the_script_leaves_what_the_online_run_leaves(
    server: Server, databases: Databases, case: str, single: dict[str, str]
) -> None:
    wanted = CASES[case]
    with twins(databases, wanted.prepare) as (online, by_script):
        before = everything(by_script, wanted.schema)

        alembic(online, "upgrade", "head", env=wanted.env)
        offline(server, by_script, "upgrade", "head", env=wanted.env | single)

        state = everything(online, wanted.schema)
        assert_same(state, everything(by_script, wanted.schema))
        assert state["stamp"] == [HEAD]
        assert mismatches(by_script, wanted.table, wanted.schema, wanted.dim) == []

        alembic(online, "downgrade", "base", env=wanted.env)
        offline(server, by_script, "downgrade", "head:base", env=wanted.env | single)

        state = everything(by_script, wanted.schema)
        assert_same(everything(online, wanted.schema), state)
        gone = ("extensions", "version table", "stamp")
        assert_same({what: before[what] for what in before if what not in gone}, state)


def test_a_script_needs_no_database_and_nothing_but_sql_is_on_stdout() -> None:
    nobody = {"OM_DATABASE_URL": "postgresql://nobody@/nothing?host=/nowhere"}
    result = alembic(None, "upgrade", "head", "--sql", env=DIM8 | nobody)

    assert result.stdout.startswith("BEGIN;\n")
    assert result.stdout.endswith("COMMIT;\n\n")
    assert result.stdout == script("upgrade", "head", env=DIM8)
    assert "Running upgrade" in result.stderr
    assert not re.search("^(INFO|NOTICE|WARNING)", result.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "env"),
    [
        ((), {"OM_TIER": "deep"}),
        (("-x", "vec_dim=1536"), {}),
        (("-x", "vec_dim=1536"), {"OM_VEC_DIM": "8"}),
    ],
)
def test_the_dimension_comes_from_wherever_it_is_given(arguments: tuple[str, ...], env: dict[str, str]) -> None:
    found = re.findall(r"\.vector\((\d+)\)", script(*arguments, "upgrade", "head", env=env))
    assert set(found) == {"1536"}


@pytest.mark.parametrize("command", [("upgrade", "head"), ("downgrade", "head:base")])
def test_without_a_dimension_a_script_is_refused(command: tuple[str, str]) -> None:
    result = alembic(None, *command, "--sql", check=False)

    assert result.returncode != 0
    assert "FAILED: a script (--sql) needs to know the dimensions\nHINT:  Set OM_VEC_DIM or OM_TIER" in result.log
    assert "Traceback" not in result.log
    assert "COMMIT" not in result.stdout


def test_in_one_transaction_nothing_commits_nothing_is_psqls_own_and_a_failure_leaves_nothing(
    server: Server, database: Database
) -> None:
    env = DIM8 | SINGLE
    for text in (script("upgrade", "head", env=env), script("downgrade", "head:base", env=env)):
        assert not re.search(r"\b(COMMIT;|ROLLBACK(?! PREPARED)|CONCURRENTLY|BEGIN;)", text)
        assert "\\" not in text
    Case().prepare(database)

    stopped(server, database, SINGLE | {"OM_ON_BAD_ROWS": "fail"}, "rows can't be converted")

    offline(server, database, "upgrade", "head", env=env)
    assert stamp(database) == [HEAD]


def test_bad_rows_are_warned_about_by_reason_and_progress_is_told(server: Server, database: Database) -> None:
    Case().prepare(database)

    said = offline(server, database, "upgrade", "head").stderr

    assert f"NOTICE:  backfill {TABLE}: 120 of 125 rows\n" in said
    warned = re.findall(r"WARNING:  (\d+) rows can't be converted and were skipped: (.*)", said)
    assert [int(rows) for rows, _ in warned] == [5, 2, 2, 1, 1]
    assert {reason: int(rows) for rows, reason in warned} == REASONS


def test_bad_rows_stop_the_script_before_the_stamp_if_they_are_to_fail_and_all_others_are_kept(
    server: Server, databases: Databases
) -> None:
    env = DIM8 | {"OM_ON_BAD_ROWS": "fail"}
    with twins(databases, Case().prepare) as (online, by_script):
        alembic(online, "upgrade", "head", env=env, check=False)
        result = offline(server, by_script, "upgrade", "head", env=env, check=False)

        assert result.returncode == 3
        assert "rows can't be converted" in result.stderr
        assert stamp(by_script) == [EXPAND]
        assert mismatches(by_script) == []
        assert_same(everything(online), everything(by_script))


@pytest.mark.parametrize("batch", [1, 100])
def test_each_batch_is_a_transaction_of_its_own(server: Server, database: Database, batch: int) -> None:
    Case(rows=2000, bad=False).prepare(database)
    # xmin would not do: a savepoint has its own
    database.run(
        f"""
        CREATE TABLE updates (transaction xid8);
        CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
          BEGIN INSERT INTO updates VALUES (pg_current_xact_id()); RETURN NEW; END $$;
        CREATE TRIGGER note BEFORE UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION note();
        """
    )

    offline(server, database, "upgrade", BACKFILL, env=DIM8 | {"BACKFILL_BATCH": str(batch)})

    sizes = [rows for (rows,) in database.rows("SELECT count(*) FROM updates GROUP BY transaction")]
    assert sum(sizes) == 2000
    # whole pages, of some 90 such rows
    assert len(sizes) >= 2000 / (batch + 2 * 100)
    assert max(sizes) <= 2 * batch + 100


def test_a_lock_that_is_held_is_tried_again_until_it_is_free(server: Server, database: Database) -> None:
    Case().prepare(database)
    reader = database.connect()
    reader.autocommit = False
    with reader.cursor() as cursor:
        cursor.execute(f"LOCK TABLE {TABLE} IN ACCESS SHARE MODE")
    process = start_psql(server, database, script("upgrade", "head", env=DIM8 | {"OM_LOCK_TIMEOUT_MS": "50"}))
    try:
        assert process.stderr
        said = ""
        while "try 2 of 30" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        assert column_type(database) is None
        reader.rollback()
        _, rest = process.communicate(timeout=120)
    finally:
        process.kill()
        reader.close()

    assert process.returncode == 0, said + rest
    assert mismatches(database) == []
    assert stamp(database) == [HEAD]


@pytest.mark.parametrize("single", [{}, SINGLE], ids=["", "one transaction"])
def test_a_timeout_of_the_roles_does_not_end_it(server: Server, database: Database, single: dict[str, str]) -> None:
    Case(rows=400, bad=False).prepare(database)
    database.run(SLOWLY)

    offline(server, database, "upgrade", "head", env=DIM8 | single)

    assert mismatches(database) == []
    assert stamp(database) == [HEAD]


WRONG: dict[str, tuple[str, list[str]]] = {
    "no table": (f"DROP TABLE {TABLE}", [f'table "public.{TABLE}" does not exist']),
    "no v": (f"ALTER TABLE {TABLE} DROP v", [f'table "public.{TABLE}" has no column "v"\n']),
    "v text": (
        f"ALTER TABLE {TABLE} ALTER v TYPE text USING encode(v, 'hex')",
        [f'column "v" of "public.{TABLE}" is of type text\nHINT:  Expected bytea'],
    ),
    "other dimension": (
        f"UPDATE {TABLE} SET v = v || v",
        ["holds a vector of 8 dimensions", "64 bytes: 120 rows"],
    ),
    "bad rows only": (f"UPDATE {TABLE} SET v = ''", ["holds a vector of 8 dimensions", "0 bytes: 120 rows"]),
    "v_vector of another type": (
        f"ALTER TABLE {TABLE} ADD v_vector real[]",
        [f'column "v_vector" of "public.{TABLE}" is of type real[]'],
    ),
    "its new name taken": (
        f"CREATE EXTENSION vector; ALTER TABLE {TABLE} ADD v_vector vector, ADD v_vector_adopted text",
        ['"v_vector_adopted"'],
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("single", [{}, pytest.param(SINGLE, marks=pytest.mark.slow)], ids=["", "one transaction"])
def test_what_can_not_be_migrated_stops_the_script_before_any_change(
    server: Server, database: Database, wrong: str, single: dict[str, str]
) -> None:
    sql, said = WRONG[wrong]
    Case(bad=False).prepare(database)
    database.run(sql)

    stopped(server, database, single, *said)


def test_whoever_forgets_to_tell_psql_to_stop_at_errors_gets_no_stamp_for_what_has_failed(
    server: Server, database: Database
) -> None:
    Case().prepare(database)
    text = script("upgrade", "head", env=DIM8 | {"OM_ON_BAD_ROWS": "fail"})

    done = psql(server, database, text, "-v", "ON_ERROR_STOP=0", check=False)

    assert done.returncode == 3
    assert "can't be converted" in done.stderr
    assert stamp(database) == [EXPAND]


def test_a_column_of_ours_with_other_dimensions_stops_the_script(server: Server, database: Database) -> None:
    Case().prepare(database)
    offline(server, database, "upgrade", EXPAND)
    database.run("DROP TABLE openmemory_alembic_version")
    load(database, random_rows(1, 4, 2))

    for command in (("upgrade", "head"), ("upgrade", f"{EXPAND}:head")):
        stopped(server, database, {"OM_VEC_DIM": "4"}, "vector(8)", command=command)


@pytest.mark.parametrize(
    ("revision", "env"),
    [(EXPAND, {}), (BACKFILL, {}), (BACKFILL, {"OM_INDEX": "none"})],
    ids=["backfill", "index", "no index"],
)
def test_what_comes_after_it_stops_on_a_table_without_our_column(
    server: Server, database: Database, revision: str, env: dict[str, str]
) -> None:
    Case().prepare(database)

    stopped(server, database, env, 'has no column "v_vector" of this package', command=("upgrade", f"{revision}:head"))


@pytest.mark.parametrize(
    ("env", "rules"),
    [
        # Alembic's own version table: its column, and that nothing repeats its CREATE TABLE. And the lock on a catalog
        # which sees to it that there is a transaction
        (DIM8, {"prefer-text-field"}),
        (
            DIM8 | SINGLE,
            {"prefer-text-field", "prefer-robust-stmts", "require-lock-timeout", "require-statement-timeout"},
        ),
        (DIM8 | index("hnsw", "cosine"), {"prefer-text-field"}),
        ({"OM_VEC_DIM": "3000"}, {"prefer-text-field"}),
    ],
)
def test_squawk_finds_nothing_to_complain_about_but_alembics_version_table(
    env: dict[str, str], rules: set[str], tmp_path: Path
) -> None:
    squawk = shutil.which("squawk", path=Path(sys.executable).parent) or shutil.which("squawk")
    if squawk is None:
        pytest.skip("squawk is not installed: pip install squawk-cli")
    file = tmp_path / "upgrade.sql"
    file.write_text(script("upgrade", "head", env=env))

    done = subprocess.run([squawk, "--reporter", "json", file], capture_output=True, text=True)
    found = json.loads(done.stdout)

    assert {violation["rule_name"] for violation in found} == rules, done.stdout
    lines = file.read_text().splitlines()
    table = next(i for i, line in enumerate(lines) if line.startswith("CREATE TABLE public."))
    lock = {i for i, line in enumerate(lines) if line.startswith("LOCK TABLE pg_catalog.")}
    assert {violation["line"] for violation in found} <= {table, table + 1} | lock


STUB = """
from openmemory_migrations import ops
revision, down_revision = {revision!r}, {before!r}
def upgrade(**kw): ops.upgrade_{step}()
def downgrade(**kw): ops.downgrade_{step}()
"""
STUBS = {
    EXPAND: STUB.format(revision=EXPAND, before="h2", step="expand"),
    BACKFILL: STUB.format(revision=BACKFILL, before=EXPAND, step="backfill"),
    HEAD: STUB.format(revision=HEAD, before=BACKFILL, step="finalize"),
}
OPTIONS = '        dialect_opts={"paramstyle": "named"},\n'


@pytest.mark.parametrize("named", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["stock", "no dialect_opts"])
@pytest.mark.parametrize("single", [{}, pytest.param(SINGLE, marks=pytest.mark.slow)], ids=["", "one transaction"])
def test_the_script_of_a_host_with_an_env_of_its_own_leaves_what_its_online_run_leaves(
    server: Server, databases: Databases, tmp_path: Path, named: bool, single: dict[str, str]
) -> None:
    def rows(database: Database) -> None:
        load(database, random_rows(120, 8))

    def state(database: Database) -> dict[str, Any]:
        return {**snapshot(database), "stamp": database.rows("SELECT version_num FROM alembic_version")}

    with twins(databases, lambda database: None) as (online, by_script):
        host = host_init.init(tmp_path, online, history=host_init.HISTORY | STUBS)
        if not named:
            host_init.replace(host.env, OPTIONS, "")

        def run(command: str, span: str) -> None:
            psql(server, by_script, host.alembic(command, span, "--sql", env=DIM8 | single).stdout)

        host.alembic("upgrade", "h2", env=DIM8)
        run("upgrade", "h2")
        rows(online)
        rows(by_script)
        before = state(by_script)

        host.alembic("upgrade", "head", env=DIM8)
        run("upgrade", "h2:head")
        assert_same(state(online), state(by_script))
        assert mismatches(by_script, dim=8) == []

        run("downgrade", "head:h2")
        after = state(by_script)
        assert_same(before | {"extensions": after["extensions"]}, after)

        run("downgrade", "h2:base")
        by_script.run("DROP TABLE alembic_version")
        run("upgrade", "head")  # from nothing, on an empty table
        assert by_script.rows("SELECT version_num FROM alembic_version") == [(HEAD,)]
        assert column_type(by_script) == "vector(8)"


@pytest.mark.slow
@pytest.mark.parametrize("given", ["of the server", exhaustive("OM_INDEX_MEMORY")])
def test_with_too_little_memory_an_index_has_as_many_lists_as_fit(
    server: Server, databases: Databases, given: str
) -> None:
    def many(database: Database) -> None:
        create_table(database)
        load(database, random_rows(45_000, 8))

    with twins(databases, many) as (online, by_script):
        env = DIM8
        if given == "OM_INDEX_MEMORY":
            env = DIM8 | {"OM_INDEX_MEMORY": "3MB"}
        else:
            for database in (online, by_script):
                for name in ("maintenance_work_mem", "effective_cache_size"):
                    database.run(f"ALTER DATABASE {database.name} SET {name} = '3MB'")
        log = alembic(online, "upgrade", "head", env=env).stderr
        said = offline(server, by_script, "upgrade", "head", env=env).stderr

        if given == "OM_INDEX_MEMORY":
            (line,) = re.findall(r"WARNING:  (the index has \d+ lists and not 45: its build gets 3 MB of memory)", log)
            assert line in said
            assert "OM_INDEX_MEMORY=" in said
        assert_same(everything(online), everything(by_script))


NATIVE = "the server's own code converts"
PORTABLE = "a function in the server converts"


@pytest.mark.parametrize(
    ("engine", "said"), [(None, NATIVE), ("native", NATIVE), ("server", PORTABLE), ("client", PORTABLE)]
)
@pytest.mark.parametrize("single", [{}, SINGLE], ids=["", "one transaction"])
def test_a_superusers_script_converts_by_the_servers_own_code(
    server: Server, databases: Databases, engine: str | None, said: str, single: dict[str, str]
) -> None:
    env = DIM8 | single | ({"OM_BACKFILL_ENGINE": engine} if engine else {})
    with twins(databases, Case(bad=True).prepare) as (online, by_script):
        alembic(online, "upgrade", "head", env=DIM8)
        log = offline(server, by_script, "upgrade", "head", env=env).stderr

        assert f"NOTICE:  backfill {TABLE}: {said}" in log
        assert_same(everything(online), everything(by_script))
        assert by_script.rows("SELECT proname FROM pg_proc WHERE proname LIKE 'openmemory_migrations%'") == []


def test_a_script_of_another_role_converts_by_the_function(server: Server, database: Database, owner: Database) -> None:
    database.run("CREATE EXTENSION vector")
    log = offline(server, owner, "upgrade", BACKFILL).stderr
    assert f"NOTICE:  backfill {TABLE}: {PORTABLE}" in log
    assert mismatches(owner) == []
    offline(server, owner, "downgrade", f"{BACKFILL}:{EXPAND}")
    env = DIM8 | {"OM_BACKFILL_ENGINE": "native"}
    refused = offline(server, owner, "upgrade", f"{EXPAND}:head", env=env, check=False)
    assert refused.returncode == 3
    assert "OM_BACKFILL_ENGINE=native can't be had" in refused.stderr


@pytest.mark.parametrize(
    ("size", "env", "said"),
    [
        (4001, {}, 'WARNING:  no index on "v_vector"'),
        (1, {"OM_INDEX_METRIC": "cosine"}, 'WARNING:  no index on "v_vector"'),
        (8, {"OM_INDEX": "none"}, 'NOTICE:  no index on "v_vector"'),
    ],
)
def test_an_index_that_can_not_be_had_is_said_when_the_script_runs(
    server: Server, database: Database, size: int, env: dict[str, str], said: str
) -> None:
    create_table(database)
    load(database, random_rows(3, size))

    done = offline(server, database, "upgrade", "head", env={"OM_VEC_DIM": str(size)} | env)

    assert said in done.stderr
    assert mismatches(database, dim=size) == []
