"""R6: whether the trigger works is tried; what it is made of names nothing that may move, nor anything of others'."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest

from demo.openmemory import TABLE
from openmemory_migrations.embedded import Server
from tests.support import host_styles, partitions
from tests.support.cases import quickly
from tests.support.commands import alembic, om, result, start_alembic
from tests.support.cutover import cut_over, undo
from tests.support.databases import Databases
from tests.support.openmemory import (
    Database,
    create_database,
    create_table,
    drop_database,
    load,
    mismatches,
    random_rows,
)
from tests.support.preflight import check, finding
from tests.support.scripts import offline, stopped
from tests.support.states import HEAD, column_type, refused, snapshot, stamp

DIM = 8
SYNC = f"{TABLE}_vvector_sync"
FUNCTION = f"{SYNC}()"
ROW = random_rows(1, DIM, seed=5)[0]


def at_head(database: Database) -> None:
    create_table(database)
    load(database, random_rows(120, DIM))
    alembic(database, "upgrade", "head")


@pytest.fixture
def table(databases: Databases) -> Iterator[Database]:
    with databases.copy(at_head) as database:
        yield database


def write(database: Database, table: str = TABLE) -> None:
    database.run(
        f"INSERT INTO {table} (id, sector, user_id, v, dim) VALUES (gen_random_uuid(), 'x', 'u', %s, {DIM})", ROW.v
    )
    database.run(f"UPDATE {table} SET v = %s WHERE id = (SELECT id FROM {table} LIMIT 1)", ROW.v)


def codes(database: Database, **env: str) -> dict[str, int]:
    commands = (["status"], ["check"], ["verify", "--queries", "0"])
    return {command[0]: om(database, *command, env=env).returncode for command in commands}


def test_the_extension_moves_and_writes_go_on(table: Database) -> None:
    table.run("CREATE SCHEMA extensions; ALTER EXTENSION vector SET SCHEMA extensions")
    write(table)
    assert mismatches(table) == []
    assert set(codes(table).values()) == {0}

    alembic(table, "-n", "cutover", "upgrade", "head", env={"OM_CUTOVER": "swap"})
    table.run("ALTER EXTENSION vector SET SCHEMA public")
    alembic(table, "-n", "cutover", "downgrade", "base")
    table.run("ALTER SCHEMA extensions RENAME TO others; ALTER EXTENSION vector SET SCHEMA others")
    write(table)
    assert mismatches(table) == []
    alembic(table, "downgrade", "base")


def test_the_schema_gets_another_name_and_writes_go_on(databases: Databases) -> None:
    with databases.empty() as database:
        create_table(database, schema="app")
        load(database, random_rows(120, DIM), schema="app")
        alembic(database, "upgrade", "head", env={"OM_PG_SCHEMA": "app"})
        database.run("ALTER SCHEMA app RENAME TO app2")
        write(database, f"app2.{TABLE}")
        assert mismatches(database, schema="app2") == []
        assert set(codes(database, OM_PG_SCHEMA="app2").values()) == {0}
        alembic(database, "downgrade", "base", env={"OM_PG_SCHEMA": "app2"})
        write(database, f"app2.{TABLE}")


def test_nothing_is_shared_between_tables(table: Database) -> None:
    create_table(table, "other")
    load(table, random_rows(60, DIM), "other")
    table.run("DROP TABLE openmemory_alembic_version")
    alembic(table, "upgrade", "head", env={"OM_VECTOR_TABLE": "other"})
    alembic(table, "downgrade", "base", env={"OM_VECTOR_TABLE": "other"})
    write(table)
    assert mismatches(table) == []
    own = table.rows("SELECT proname FROM pg_proc WHERE proname LIKE '%%openmemory%%' OR proname LIKE 'other%%'")
    assert own == [(SYNC,)]


EACH = f"ON {TABLE} FOR EACH ROW EXECUTE FUNCTION {FUNCTION}; ALTER TABLE {TABLE} ENABLE ALWAYS TRIGGER {SYNC}"
QUICK = ("missing with its function", "belongs to")
NEVER = EACH.replace("ROW", "ROW WHEN (false)")
BROKEN = {
    "missing": f"DROP TRIGGER {SYNC} ON {TABLE}",
    "missing with its function": f"DROP FUNCTION {FUNCTION} CASCADE",
    "disabled": f"ALTER TABLE {TABLE} DISABLE TRIGGER {SYNC}",
    "for replicas only": f"ALTER TABLE {TABLE} ENABLE REPLICA TRIGGER {SYNC}",
    "isn't ENABLE ALWAYS": f"ALTER TABLE {TABLE} ENABLE TRIGGER {SYNC}",
    "of INSERT only": f"CREATE OR REPLACE TRIGGER {SYNC} BEFORE INSERT {EACH}",
    "of another column": f"CREATE OR REPLACE TRIGGER {SYNC} BEFORE INSERT OR UPDATE OF dim {EACH}",
    "on a condition": f"CREATE OR REPLACE TRIGGER {SYNC} BEFORE INSERT OR UPDATE OF v {NEVER}",
    "afterwards": f"CREATE OR REPLACE TRIGGER {SYNC} AFTER INSERT OR UPDATE OF v {EACH}",
    "isn't what this version makes it": f"CREATE OR REPLACE FUNCTION {FUNCTION} RETURNS trigger LANGUAGE plpgsql"
    " AS 'BEGIN RETURN NEW; END'",
    "belongs to": f"ALTER FUNCTION {FUNCTION} OWNER TO pg_monitor",
}


@pytest.mark.parametrize("how", [pytest.param(how, marks=[] if how in QUICK else pytest.mark.slow) for how in BROKEN])
def test_what_keeps_it_from_its_work_is_told_and_repaired(table: Database, how: str) -> None:
    table.run(f"CREATE SCHEMA IF NOT EXISTS public; GRANT CREATE ON SCHEMA public TO pg_monitor; {BROKEN[how]}")
    later = how in ("isn't ENABLE ALWAYS", "belongs to")  # nothing that is written today is wrong
    code = 0 if later else 1
    assert codes(table) == {"status": 1, "check": code, "verify": code}
    told = finding(check(table, code), "trigger")
    if how in ("isn't ENABLE ALWAYS", "isn't what this version makes it", "belongs to"):
        assert how in told["message"]
    assert told["hint"] == "openmemory-migrations repair."
    before = snapshot(table)
    planned = om(table, "repair", "--dry-run")
    assert f'CREATE OR REPLACE FUNCTION "public"."{SYNC}"()' in planned.stdout
    assert snapshot(table) == before

    done = om(table, "repair")

    assert done.returncode == 0, done.log
    assert told["message"] in done.log
    assert set(codes(table).values()) == {0}
    assert "nothing to repair" in om(table, "repair").log
    assert om(table, "repair", "--dry-run").stdout == ""
    write(table)
    assert mismatches(table) == []
    alembic(table, "downgrade", "base")


def test_our_own_environment_repairs_at_head(table: Database) -> None:
    table.run(BROKEN["missing with its function"])
    log = alembic(table, "upgrade", "head").log
    assert f'trigger "{SYNC}" of "public.{TABLE}" is repaired' in log
    assert stamp(table) == [HEAD]
    write(table)
    assert mismatches(table) == []


def test_a_definer_that_may_not_convert_is_named_with_the_line(table: Database) -> None:
    table.run("CREATE ROLE definer; GRANT CREATE ON SCHEMA public TO definer")
    try:
        table.run(
            f"ALTER TABLE {TABLE} OWNER TO definer; ALTER FUNCTION {FUNCTION} OWNER TO definer;"
            " REVOKE ALL ON FUNCTION array_to_vector(double precision[], integer, boolean) FROM PUBLIC"
        )
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            write(table)
        told = finding(check(table, 1), "trigger")
        assert "may not execute" in told["message"]
        table.run(told["hint"])
        assert set(codes(table).values()) == {0}
        write(table)
    finally:
        table.run(f"ALTER TABLE {TABLE} OWNER TO CURRENT_USER; DROP OWNED BY definer CASCADE; DROP ROLE definer")


def test_a_trigger_that_is_tried_and_fails_is_told(table: Database) -> None:
    """What no catalog says: the library is another."""
    table.run(
        "CREATE OR REPLACE FUNCTION array_to_vector(double precision[], integer, boolean) RETURNS vector"
        " LANGUAGE plpgsql AS $$ BEGIN RETURN '[9,9,9,9,9,9,9,9]'; END $$"
    )
    found = json.loads(om(table, "status", "--json").stdout)
    assert "was tried" in found["next"]
    assert codes(table) == {"status": 1, "check": 1, "verify": 1}


def test_a_partial_restore_is_repaired(server: Server, table: Database, tmp_path: Path) -> None:
    """Such a dump has neither functions nor trigger."""
    copy = create_database(server, f"{table.name}_copy")
    copy.run("CREATE EXTENSION vector")
    programs, dump = server.psql.parent, str(tmp_path / "dump")
    tables = ["-t", TABLE, "-t", "openmemory_*_version"]
    subprocess.run([programs / "pg_dump", "-Fc", *tables, "-f", dump, table.url], check=True)
    # the trigger's function is not there
    subprocess.run([programs / "pg_restore", "-d", copy.url, dump], check=False, capture_output=True)
    assert om(copy, "status").returncode == 1

    assert om(copy, "repair").returncode == 0
    assert set(codes(copy).values()) == {0}
    write(copy)
    assert mismatches(copy) == []
    drop_database(server, copy.name)


def test_a_table_that_was_never_migrated_has_nothing_to_repair(database: Database) -> None:
    create_table(database)
    load(database, random_rows(10, DIM))
    done = om(database, "repair")
    assert done.returncode == 1
    assert "has no column" in done.log


def test_a_host_repairs_in_a_revision_of_its_own(table: Database, tmp_path: Path) -> None:
    """Under `alembic stamp`, as the table was migrated by our own chain."""
    host = host_styles.create(tmp_path, "generic", table)
    host.alembic("stamp", "head")
    head = host.alembic("heads").stdout.split()[0]
    (host.folder / "migrations/versions/repaired.py").write_text(
        f"from openmemory_migrations import ops\nrevision, down_revision = 'repaired', {head!r}\n"
        "def upgrade(**kw):\n    ops.repair()\n\n\ndef downgrade(**kw):\n    pass\n"
    )
    table.run(BROKEN["missing with its function"])

    log = host.alembic("upgrade", "head").log

    assert "is repaired" in log
    write(table)
    assert mismatches(table) == []
    assert "online only" in host.alembic("upgrade", f"{head}:repaired", "--sql", check=False).log


@pytest.mark.slow
@pytest.mark.parametrize("how", ["a clone is disabled", "the trigger is missing"])
def test_a_partitioned_table_is_repaired_with_its_clones(databases: Databases, how: str) -> None:
    def migrated(database: Database) -> None:
        partitions.filled(database)
        alembic(database, "upgrade", "head", env=partitions.ENV)

    with databases.copy(migrated) as tree:
        leaf = partitions.LEAVES[-1]
        tree.run(f"ALTER TABLE {leaf} DISABLE TRIGGER {SYNC}" if "clone" in how else BROKEN["missing"])
        assert om(tree, "status", env=partitions.ENV).returncode == 1
        assert om(tree, "repair", env=partitions.ENV).returncode == 0
        assert om(tree, "status", env=partitions.ENV).returncode == 0
        partitions.assert_followed(tree)


RENAMED = {"OM_VECTOR_TABLE": "memory_vectors"}


@pytest.mark.parametrize("where", quickly("renamed", "in another schema"))
def test_a_table_that_is_called_otherwise_now_keeps_what_is_its_own(table: Database, where: str) -> None:
    if where == "renamed":
        table.run(f"ALTER TABLE {TABLE} RENAME TO memory_vectors")
        env, name, schema = RENAMED, "memory_vectors", "public"
    else:
        table.run(
            f"CREATE SCHEMA app; ALTER TABLE {TABLE} SET SCHEMA app;"
            " ALTER TABLE openmemory_alembic_version SET SCHEMA app"
        )
        env, name, schema = {"OM_PG_SCHEMA": "app"}, TABLE, "app"
    at = f"{schema}.{name}"
    assert codes(table, **env)["verify"] == 0
    assert "repair" not in om(table, "status", env=env).stdout
    indexes = f"SELECT indexname FROM pg_indexes WHERE tablename = '{name}' AND indexdef ~ 'ivfflat'"
    there = table.rows(indexes)
    assert len(there) == 1
    alembic(table, "downgrade", "om_20240107_backfill", env=env)
    assert table.rows(indexes) == []
    alembic(table, "upgrade", "head", env=env)
    if where == "renamed":
        table.run(f"ALTER INDEX {name}_vvector_idx RENAME TO {TABLE}_vvector_idx")
    # somebody's own, whatever it is called, is not taken for ours
    theirs = f"CREATE INDEX my_search_vvector_idx ON {at} USING hnsw (v_vector vector_cosine_ops)"
    table.run(theirs)
    assert om(table, "index", "--rebuild", env=env).returncode == 0
    assert table.rows(indexes) == there
    table.run(f"DROP INDEX {schema}.my_search_vvector_idx")

    for mode in ("swap", "drop"):
        alembic(table, "-n", "cutover", "upgrade", "head", env={**env, "OM_CUTOVER": mode})
        alembic(table, "-n", "cutover", "downgrade", "base", env=env)
        write(table, at)
        assert mismatches(table, name, schema) == []
    table.run(f"ALTER TABLE {at} DISABLE TRIGGER USER")
    assert om(table, "repair", env=env).returncode == 0

    alembic(table, "downgrade", "base", env=env)
    write(table, at)
    assert table.rows("SELECT tgname FROM pg_trigger WHERE NOT tgisinternal") == []
    assert table.rows("SELECT proname FROM pg_proc WHERE proname LIKE '%%sync'") == []


def test_a_script_finds_the_trigger_of_a_table_that_is_called_otherwise_now(server: Server, table: Database) -> None:
    table.run(f"ALTER TABLE {TABLE} RENAME TO memory_vectors")
    offline(server, table, "downgrade", "head:base", env={**RENAMED, "OM_VEC_DIM": str(DIM)})
    write(table, "memory_vectors")
    assert table.rows("SELECT tgname FROM pg_trigger WHERE NOT tgisinternal") == []


def test_a_table_with_the_name_that_another_had_gets_a_function_of_its_own(server: Server, table: Database) -> None:
    table.run(f"ALTER TABLE {TABLE} RENAME TO memory_vectors; DROP TABLE openmemory_alembic_version")
    create_table(table)
    load(table, random_rows(60, 2 * DIM))
    stopped(server, table, {"OM_VEC_DIM": str(2 * DIM)}, "is that of a trigger on public.memory_vectors")

    alembic(table, "upgrade", "head")

    write(table, "memory_vectors")
    assert mismatches(table, "memory_vectors") == []
    assert mismatches(table) == []
    assert codes(table)["verify"] == 0
    alembic(table, "downgrade", "base")
    write(table, "memory_vectors")
    assert mismatches(table, "memory_vectors") == []


@pytest.mark.parametrize("broken", quickly("DROP", "DISABLE"))
@pytest.mark.parametrize("by", quickly("repair", "what it prints"))
def test_the_trigger_of_a_table_that_was_swapped_is_repaired_too(table: Database, broken: str, by: str) -> None:
    alembic(table, "-n", "cutover", "upgrade", "head", env={"OM_CUTOVER": "swap"})
    back = f"{TABLE}_v_bytea_sync"
    table.run(f"DROP TRIGGER {back} ON {TABLE}" if broken == "DROP" else f"ALTER TABLE {TABLE} DISABLE TRIGGER {back}")
    assert om(table, "status").stdout.count("openmemory-migrations repair") == 1
    printed = om(table, "repair", "--dry-run").stdout
    assert f'CREATE TRIGGER "{back}"' in printed

    if by == "repair":
        assert om(table, "repair").returncode == 0
    else:
        table.run(printed)
        marked = "SELECT obj_description(oid, 'pg_trigger') FROM pg_trigger WHERE tgname = %s"
        assert table.value(marked, back).startswith("openmemory_migrations: ")

    assert om(table, "status").returncode == 0
    assert "nothing to repair" in om(table, "repair").log
    first = f"(SELECT id FROM {TABLE} LIMIT 1)"
    key = table.value(f"UPDATE {TABLE} SET v = '[{','.join('1' * DIM)}]' WHERE id = {first} RETURNING id")
    assert table.value(f"SELECT v_bytea FROM {TABLE} WHERE id = %s", key) is None
    alembic(table, "-n", "cutover", "downgrade", "base")
    assert mismatches(table) == []


BACK = f"{TABLE}_v_bytea_sync"
BACK_BROKEN = {
    "a function that does nothing": f"CREATE OR REPLACE FUNCTION {BACK}() RETURNS trigger LANGUAGE plpgsql"
    " AS 'BEGIN RETURN NEW; END'",
    "on a condition": f"CREATE OR REPLACE TRIGGER {BACK} BEFORE UPDATE OF v ON {TABLE} FOR EACH ROW WHEN (false)"
    f" EXECUTE FUNCTION {BACK}(); ALTER TABLE {TABLE} ENABLE ALWAYS TRIGGER {BACK}",
    "another's": f"ALTER FUNCTION {BACK}() OWNER TO pg_monitor",
}


@pytest.mark.slow
@pytest.mark.parametrize("how", BACK_BROKEN)
def test_what_the_trigger_of_a_swapped_table_is_made_of_is_looked_at(table: Database, how: str) -> None:
    alembic(table, "-n", "cutover", "upgrade", "head", env={"OM_CUTOVER": "swap"})
    assert om(table, "status").returncode == 0
    table.run(f"GRANT CREATE ON SCHEMA public TO pg_monitor; {BACK_BROKEN[how]}")
    assert om(table, "status").returncode == 1
    assert om(table, "repair").returncode == 0
    assert om(table, "status").returncode == 0
    alembic(table, "-n", "cutover", "downgrade", "base")
    assert mismatches(table) == []


def test_a_table_that_was_cut_over_and_has_lost_its_marks_goes_no_way_down(table: Database) -> None:
    """As a dump without comments leaves it."""
    alembic(table, "-n", "cutover", "upgrade", "head", env={"OM_CUTOVER": "swap"})
    table.run(f"COMMENT ON COLUMN {TABLE}.v IS NULL; COMMENT ON TRIGGER {TABLE}_v_bytea_sync ON {TABLE} IS NULL")
    assert "isn't what the cutover has put there" in om(table, "status").log
    refused(table, "isn't what the cutover has put there", command=("downgrade", "base"))


WITHOUT_MARKS = f"COMMENT ON COLUMN {TABLE}.v_vector IS NULL; COMMENT ON TRIGGER {SYNC} ON {TABLE} IS NULL"


@pytest.mark.parametrize("followed", [True, False], ids=["with its trigger", "without"])
def test_a_dump_without_comments_is_adopted_when_every_row_is_right(table: Database, followed: bool) -> None:
    table.run(
        f"INSERT INTO {TABLE} (id, sector, dim, v_vector) VALUES (gen_random_uuid(), 'x', 8, '[1,2,3,4,5,6,7,8]')"
    )
    before = snapshot(table)
    table.run(WITHOUT_MARKS)
    if not followed:
        table.run(BROKEN["missing with its function"])
    refused(table, "has no mark of this package", "openmemory-migrations repair --adopt")

    assert om(table, "repair").returncode == 1
    done = om(table, "repair", "--adopt")

    assert done.returncode == 0, done.log
    assert "120 rows are equal to the bit" in done.log
    assert snapshot(table) == before
    assert set(codes(table).values()) == {0}
    alembic(table, "upgrade", "head")


@pytest.mark.parametrize("followed", [True, False], ids=["with its trigger", "without"])
def test_a_column_with_other_values_is_not_adopted(table: Database, followed: bool) -> None:
    table.run(WITHOUT_MARKS)
    if not followed:
        table.run(BROKEN["missing with its function"])
    table.run(f"UPDATE {TABLE} SET v_vector = '[9,9,9,9,9,9,9,9]' WHERE user_id = 'user1'")
    before = snapshot(table)

    done = om(table, "repair", "--adopt")

    assert done.returncode == 1
    assert "6 rows of" in done.log
    assert "have another" in done.log
    after = snapshot(table)
    assert {what for what in before if before[what] != after[what]} == set()


@pytest.mark.slow
def test_several_tables_at_once_find_nothing_of_each_others(database: Database) -> None:
    """The extension is all that they share, and the first that comes makes it."""
    schemas = [f"s{number}" for number in range(6)]
    for schema in schemas:
        create_table(database, schema=schema)
        load(database, random_rows(60, DIM), schema=schema)

    def all_of_them(*command: str, **env: str) -> None:
        runs = [start_alembic(database, *command, env={"OM_PG_SCHEMA": schema, **env}) for schema in schemas]
        for run in runs:
            done = result(run)
            assert done.returncode == 0, done.log

    for _ in range(2):
        all_of_them("upgrade", "head")
        all_of_them("-n", "cutover", "upgrade", "head", OM_CUTOVER="swap")
        all_of_them("-n", "cutover", "downgrade", "base")
        for schema in schemas:
            assert mismatches(database, schema=schema) == []
        all_of_them("downgrade", "base")
        database.run("DROP EXTENSION vector")


def test_at_head_who_may_not_mend_what_works_is_told_only(server: Server, table: Database) -> None:
    table.run(
        "CREATE ROLE deploys LOGIN; GRANT pg_read_all_data TO deploys; GRANT UPDATE ON openmemory_vectors TO deploys"
    )
    by = Database(table.name, server.url(table.name, "deploys"))
    try:
        table.run(BROKEN["isn't ENABLE ALWAYS"])
        assert "WARNING:  trigger" in alembic(by, "upgrade", "head").log
        table.run(BROKEN["disabled"])
        refused(table, "does not own table", by=by)
    finally:
        table.run("DROP OWNED BY deploys; DROP ROLE deploys")


def test_a_copy_of_a_migrated_table_is_not_taken_for_one(server: Server, table: Database) -> None:
    """It carries the mark of the column, and stale values may be in it."""
    env = {"OM_VECTOR_TABLE": "copied"}
    table.run(f"CREATE TABLE copied (LIKE {TABLE} INCLUDING ALL); INSERT INTO copied SELECT * FROM {TABLE}")
    table.run(
        "UPDATE copied SET v = set_byte(v, 0, 255) WHERE user_id = 'user1'; DROP TABLE openmemory_alembic_version"
    )
    said = refused(table, "has the mark of this package, and the table no trigger", env=env).log
    stopped(server, table, {**env, "OM_VEC_DIM": str(DIM)}, "has the mark of this package, and the table no trigger")
    assert finding(check(table, 1, env=env), "column-copied")["message"] in said

    table.run("COMMENT ON COLUMN copied.v_vector IS NULL")
    alembic(table, "upgrade", "head", env=env)
    assert mismatches(table, "copied") == []


@pytest.mark.parametrize("step", quickly("downgrade", "swap", "drop"))
def test_a_partition_that_was_migrated_by_itself_is_taken_along(database: Database, step: str) -> None:
    """Its own trigger would fail every write that goes there."""
    create_table(database, "first")
    load(database, random_rows(60, DIM), "first")
    alembic(database, "upgrade", "head", env={"OM_VECTOR_TABLE": "first"})
    database.run(
        f"CREATE TABLE {TABLE} (LIKE first, PRIMARY KEY (id, sector)) PARTITION BY HASH (id);"
        f" ALTER TABLE {TABLE} DROP v_vector; DROP TABLE openmemory_alembic_version;"
        f" CREATE TABLE second PARTITION OF {TABLE} FOR VALUES WITH (MODULUS 2, REMAINDER 1)"
    )
    alembic(database, "upgrade", "head", env={"OM_VEC_DIM": str(DIM)})
    database.run(f"DELETE FROM first WHERE NOT satisfies_hash_partition('{TABLE}'::regclass, 2, 0, id)")
    database.run(f"ALTER TABLE {TABLE} ATTACH PARTITION first FOR VALUES WITH (MODULUS 2, REMAINDER 0)")
    write(database, TABLE)

    if step == "downgrade":
        alembic(database, "downgrade", "base")
        load(database, random_rows(50, DIM, seed=3))
        assert column_type(database, table="first") is None
    else:
        env = {"OM_CUTOVER": step, "OM_INDEX": "none"}
        alembic(database, "-n", "cutover", "upgrade", "head", env=env)
        database.run(f"UPDATE {TABLE} SET user_id = 'z'")
        alembic(database, "-n", "cutover", "downgrade", "base", env=env)
        load(database, random_rows(50, DIM, seed=3))
        assert mismatches(database, dim=DIM) == []
    assert database.rows("SELECT tgname FROM pg_trigger WHERE tgname LIKE 'first%%' AND tgparentid = 0") == []


@pytest.mark.parametrize("moved", quickly("RENAME TO former", "SET SCHEMA former"))
@pytest.mark.parametrize("mode", ["swap", pytest.param("drop", marks=pytest.mark.slow)])
def test_a_table_that_was_cut_over_shares_nothing_with_the_next_of_its_name(
    table: Database, moved: str, mode: str
) -> None:
    """Its trigger keeps its function, whose name the other's would have."""
    cut_over(table, "swap")
    table.run(f"CREATE SCHEMA former; ALTER TABLE {TABLE} {moved}")
    table.run("DROP TABLE openmemory_alembic_version, openmemory_cutover_version")
    former = "former.openmemory_vectors" if "SCHEMA" in moved else "former"
    create_table(table)
    load(table, random_rows(60, DIM))
    none = {"OM_INDEX": "none"}
    alembic(table, "upgrade", "head", env=none)

    cut_over(table, mode, env=none)
    undo(table)

    table.run(f"UPDATE {former} SET v = '[{','.join(['1'] * DIM)}]' WHERE v_bytea IS NOT NULL")
    assert table.value(f"SELECT count(v_bytea) FROM {former}") == 0
    alembic(table, "downgrade", "base")
    load(table, random_rows(9, DIM, seed=3))


@pytest.mark.slow
def test_the_index_of_a_tree_that_is_called_otherwise_now_is_found(databases: Databases) -> None:
    with databases.copy(partitions.filled) as tree:
        alembic(tree, "upgrade", "head", env=partitions.ENV)
        tree.run(f"ALTER TABLE {TABLE} RENAME TO memory_vectors")
        env = partitions.ENV | RENAMED
        there = tree.rows("SELECT indexname FROM pg_indexes WHERE indexdef ~ 'ivfflat' ORDER BY 1")

        assert "index:       missing" not in om(tree, "status", env=env).stdout
        assert om(tree, "index", env=env).returncode == 0
        alembic(tree, "upgrade", "head", env=env)

        assert tree.rows("SELECT indexname FROM pg_indexes WHERE indexdef ~ 'ivfflat' ORDER BY 1") == there
        alembic(tree, "downgrade", "base", env=env)
        assert tree.rows("SELECT indexname FROM pg_indexes WHERE indexdef ~ 'ivfflat' ORDER BY 1") == []
