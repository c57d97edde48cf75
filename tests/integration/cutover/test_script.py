"""The scripts of the cutover, run by psql on databases with rows, leave what the online run leaves."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from demo.openmemory import TABLE
from openmemory_migrations.embedded import Server
from openmemory_migrations.target import NEWER_INDEX
from tests.support.commands import alembic, om
from tests.support.databases import Databases
from tests.support.openmemory import Database, create_table, load, mismatches, pack, random_rows
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
    twins,
)
from tests.support.sessions import eventually
from tests.support.states import column_type, follows, indexes, snapshot, stamp

UP, BACK = ("-n", "cutover", "upgrade", "head"), ("-n", "cutover", "downgrade", "head:base")
MAIN = ("upgrade", "head")
SWAP, DROP = {"OM_CUTOVER": "swap"}, {"OM_CUTOVER": "drop"}
ELEVEN = {"OM_ACCEPT_LOSS": "11"}  # rows of Case
SAID = f'"public.{TABLE}" was cut over: '
STAMPED = [("om_20240109_cutover",)]


def state(database: Database, schema: str = "public") -> dict[str, Any]:
    """Everything, with the stamps of both lineages, and kept bytes without the transactions that wrote their rows."""
    found = everything(database, schema)
    kept = [row for row in found["rows"] if row[1].endswith("_v_kept")]
    found["rows"] = [row for row in found["rows"] if row not in kept]
    bytes_of = "SELECT id::text, sector, encode(openmemory_bytes, 'hex') FROM {} ORDER BY 1, 2"
    found["kept"] = [database.rows(bytes_of.format(f'"{row[0]}"."{row[1]}"')) for row in kept]
    return found


def stamped(database: Database, schema: str = "public") -> list[tuple[Any, ...]]:
    return database.rows(f'SELECT version_num FROM "{schema}".openmemory_cutover_version')


@dataclass(frozen=True)
class Cut:
    """`before` is run in the migrated database, `between` between cutover and undoing."""

    settings: Mapping[str, str]
    rows: Case = field(default_factory=Case)
    before: str = "SELECT 1"
    between: str = "SELECT 1"

    @property
    def env(self) -> dict[str, str]:
        return {**self.rows.env, **self.settings}


NEW = "'[1,2,3,4,5,6,7,8]'"
# in a swapped table: a row that is new, and one whose bytes go
WRITTEN = f"""
INSERT INTO {TABLE} (id, sector, dim, v) VALUES ('00000000-0000-0000-0000-000000000001', 'new', 8, {NEW});
UPDATE {TABLE} SET v = {NEW} WHERE user_id = 'user3' AND v IS NOT NULL;
DELETE FROM {TABLE} WHERE user_id = 'user4'
"""
BESIDE = f"""
GRANT SELECT (v), UPDATE (v) ON {TABLE} TO PUBLIC;
GRANT SELECT (v_vector), REFERENCES (v) ON {TABLE} TO pg_monitor WITH GRANT OPTION;
COMMENT ON COLUMN {TABLE}.v IS 'it''s "mine": 100%';
ALTER TABLE {TABLE} ALTER v SET NOT NULL, ALTER v SET DEFAULT '\\x00'::bytea, ALTER v SET STORAGE EXTERNAL,
  ALTER v SET STATISTICS 50
"""
PLAIN = Case(bad=False)
CUTS = {
    "swap, bad rows": Cut(SWAP | ELEVEN, between=WRITTEN),
    "swap, bad rows, one transaction": Cut(SWAP | ELEVEN | SINGLE, between=WRITTEN),
    "drop, bad rows": Cut(DROP | ELEVEN, between=re.sub(r"\bv\b", "v_vector", WRITTEN)),
    "swap, what v has beside, its index already": Cut(
        SWAP | {"OM_INDEX": "hnsw", "OM_INDEX_METRIC": "cosine"}, PLAIN, before=BESIDE
    ),
    "drop, what v has beside, one transaction": Cut(DROP | SINGLE, PLAIN, before=BESIDE),
    "swap, odd names": Cut(
        SWAP | {"OM_INDEX": "none"},
        Case(
            before='CREATE SCHEMA "Ex""t\'s"; CREATE EXTENSION vector SCHEMA "Ex""t\'s"', schema="$script$", bad=False
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CUTS)
def test_the_cutovers_script_and_the_way_back_leave_what_the_online_runs_leave(
    server: Server, databases: Databases, case: str
) -> None:
    cut = CUTS[case]
    schema = cut.rows.schema

    def prepare(database: Database) -> None:
        cut.rows.prepare(database)
        offline(server, database, *MAIN, env={**cut.env, "OM_SINGLE_TRANSACTION": ""})
        database.run(cut.before)

    with twins(databases, prepare) as (online, by_script):
        before = state(by_script, schema)
        alembic(online, *UP, env=cut.env)
        offline(server, by_script, *UP, env=cut.env)
        assert_same(state(online, schema), state(by_script, schema))
        assert stamped(by_script, schema) == STAMPED

        for database in (online, by_script):
            database.run(cut.between)
        alembic(online, "-n", "cutover", "downgrade", "base", env=cut.env)
        offline(server, by_script, *BACK, env=cut.env)

        after = state(by_script, schema)
        assert_same(state(online, schema), after)
        assert stamped(by_script, schema) == []
        if cut.between == "SELECT 1":
            versions = ("relations", "columns", "constraints", "indexes", "rows")
            assert_same({what: before[what] for what in before if what not in versions}, after)


def migrated(server: Server, database: Database, case: Case = PLAIN, env: Mapping[str, str] = DIM8) -> Database:
    case.prepare(database)
    offline(server, database, *MAIN, env=env)
    return database


def test_up_back_and_up_again_by_script(server: Server, database: Database) -> None:
    before = snapshot(migrated(server, database))

    for _ in range(2):
        offline(server, database, *UP, env=DIM8 | SWAP)
        assert (column_type(database, "v"), column_type(database, "v_bytea")) == ("vector(8)", "bytea")
        assert list(indexes(database)) == [f"{TABLE}_vvector_idx", NEWER_INDEX]
        offline(server, database, *BACK)
        assert snapshot(database)["functions"] == before["functions"]
        assert mismatches(database) == []
    assert follows(database, 8)


@pytest.mark.slow
def test_the_online_run_takes_back_what_the_script_did_and_the_other_way_round(
    server: Server, databases: Databases
) -> None:
    with twins(databases, lambda database: migrated(server, database, Case())) as (one, other):
        before = state(one)
        offline(server, one, *UP, env=DIM8 | SWAP | ELEVEN)
        alembic(one, "-n", "cutover", "downgrade", "base", env=DIM8)
        alembic(other, *UP, env=DIM8 | DROP | ELEVEN)
        offline(server, other, *BACK)

        assert state(one)["kept"] == state(other)["kept"] == []
        assert before["functions"] == state(one)["functions"] == state(other)["functions"]
        assert before["triggers"] == state(one)["triggers"] == state(other)["triggers"]
        for database in (one, other):
            assert mismatches(database, dim=8) == []


@pytest.mark.slow
def test_it_needs_to_know_which_and_the_console_script_prints_the_same() -> None:
    unset = alembic(None, *UP, "--sql", env=DIM8, check=False)
    assert unset.returncode != 0
    assert "FAILED: what the cutover is to do isn't set\nDETAIL:  OM_CUTOVER=swap: " in unset.log
    assert "BEGIN" not in unset.stdout

    printed = om(None, "cutover", "upgrade", "--sql", "-x", "vec_dim=8", "-x", "cutover=drop")
    assert printed.stdout == script(*UP, env=DIM8 | DROP)


@pytest.mark.slow
def test_in_one_transaction_nothing_commits_and_nothing_is_psqls_own() -> None:
    for command, mode in ((UP, SWAP), (UP, DROP), (BACK, {})):
        text = script(*command, env=DIM8 | SINGLE | mode)
        assert not re.search(r"\b(COMMIT|ROLLBACK|CONCURRENTLY|BEGIN;)", text)
        assert "\\" not in text
        assert "-- in one transaction the table is locked from here to the end" in text


@pytest.mark.slow
def test_what_is_cut_over_is_left_alone_by_every_script_and_not_taken_away_by_the_chains(
    server: Server, database: Database
) -> None:
    migrated(server, database)
    for env, said in ((DIM8 | SWAP, '"v" is the vector'), (DIM8 | DROP, '"v" was dropped')):
        offline(server, database, *UP, env=env)
        before = state(database)
        again = offline(server, database, *UP, env=env)
        assert f"NOTICE:  {SAID}{said}" in again.stderr
        assert "; nothing to do" in again.stderr
        assert_same(before, state(database))
        other = DROP if "is the vector" in said else SWAP
        mode = other["OM_CUTOVER"]
        wrong = offline(server, database, *UP, env=DIM8 | other, check=False)
        assert wrong.returncode == 3
        assert f"HINT:  For {mode} first undo that: alembic -n cutover downgrade base." in wrong.stderr

        for single in ({}, SINGLE):
            database.run("DROP TABLE openmemory_alembic_version")
            upgraded = offline(server, database, *MAIN, env=DIM8 | single)
            assert upgraded.stderr.count(f"NOTICE:  {SAID}{said}") == 3
        assert_same(before, state(database))
        for single in ({}, SINGLE):
            for command in (("downgrade", "head:base"), ("downgrade", "om_20240107_pgvector:base")):
                refused = offline(server, database, *command, env=DIM8 | single, check=False)
                assert refused.returncode == 3
                assert f"ERROR:  {SAID}{said}" in refused.stderr
                assert "HINT:  First undo the cutover: alembic -n cutover downgrade base" in refused.stderr
                assert_same(before, state(database))
        offline(server, database, *BACK)
        nothing = offline(server, database, *BACK)
        assert f'NOTICE:  "public.{TABLE}" is not cut over, nothing to undo' in nothing.stderr
        assert mismatches(database) == []


FIRST = f"(id, sector) = (SELECT id, sector FROM {TABLE} WHERE v IS NOT NULL ORDER BY 1, 2 LIMIT 1)"
QUIETLY = "SET session_replication_role = replica;"
# what is wrong, what puts it right, and what the script says of it
WRONG = {
    "other dimensions": ("SELECT 1", "SELECT 1", "vector(8)"),
    "no trigger": (
        f"ALTER TABLE {TABLE} DISABLE TRIGGER {TABLE}_vvector_sync",
        f"ALTER TABLE {TABLE} ENABLE TRIGGER {TABLE}_vvector_sync",
        f'trigger "{TABLE}_vvector_sync" of "public.{TABLE}" is missing or disabled',
    ),
    "a view": (
        f"CREATE VIEW report AS SELECT v FROM {TABLE}",
        "DROP VIEW report",
        f'what hangs on "v" of "public.{TABLE}" would not go over: rule _RETURN on view report',
    ),
    "an index": (f"CREATE INDEX mine ON {TABLE} (octet_length(v))", "DROP INDEX mine", "would not go over: index mine"),
    "a column in the way": (
        f"ALTER TABLE {TABLE} ADD v_bytea bytea",
        f"ALTER TABLE {TABLE} DROP v_bytea",
        f'"public.{TABLE}" has a column "v_bytea" already',
    ),
    "a table in the way": (
        f"CREATE SEQUENCE {TABLE}_v_kept",
        f"DROP SEQUENCE {TABLE}_v_kept",
        f'the name "{TABLE}_v_kept" is taken',
    ),
    "an adopted column": (
        (
            f"ALTER TABLE {TABLE} ADD v_vector_adopted vector;"
            f" COMMENT ON COLUMN {TABLE}.v_vector_adopted IS 'openmemory_migrations: set aside; '"
        ),
        f"ALTER TABLE {TABLE} DROP v_vector_adopted",
        'has not ended: "v_vector_adopted" is still there',
    ),
    "not ours": (
        f"COMMENT ON COLUMN {TABLE}.v_vector IS 'mine'",
        f"COMMENT ON COLUMN {TABLE}.v_vector IS 'openmemory_migrations: kept equal to v'",
        'has no column "v_vector" of this package',
    ),
    "no index": (
        (
            f"ALTER INDEX {TABLE}_vvector_idx RENAME TO away; UPDATE pg_index SET indisvalid = false"
            " WHERE indexrelid = 'away'::regclass"
        ),
        (
            "UPDATE pg_index SET indisvalid = true WHERE indexrelid = 'away'::regclass;"
            f" ALTER INDEX away RENAME TO {TABLE}_vvector_idx"
        ),
        'no valid index on "v_vector"',
    ),
    "another vector": (
        f"{QUIETLY} UPDATE {TABLE} SET v_vector = {NEW} WHERE {FIRST}",
        f"UPDATE {TABLE} SET v = v WHERE {FIRST}",
        "1 rows of",
        "DETAIL:  1: the vector is another than the bytes, such as (id=",
        'HINT:  UPDATE … SET "v" = "v" for those rows lets the trigger mend them',
    ),
    "no vector": (
        f"{QUIETLY} UPDATE {TABLE} SET v_vector = NULL WHERE {FIRST}",
        f"UPDATE {TABLE} SET v = v WHERE {FIRST}",
        "DETAIL:  1: the bytes have no vector",
    ),
    "bytes that are none": (
        (
            f"CREATE TABLE old AS SELECT * FROM {TABLE} WHERE {FIRST};"
            f" {QUIETLY} UPDATE {TABLE} SET v = 'NaNs' WHERE {FIRST}"
        ),
        f"UPDATE {TABLE} t SET v = old.v FROM old WHERE (t.id, t.sector) = (old.id, old.sector); DROP TABLE old",
        "DETAIL:  1: there is a vector, but the bytes are none",
    ),
    "bad rows": (
        (
            f"INSERT INTO {TABLE} (id, sector, dim, v) VALUES (gen_random_uuid(), 'bad', 8, 'NaN'), (gen_random_uuid(),"
            " 'bad', 8, '')"
        ),
        f"DELETE FROM {TABLE} WHERE sector = 'bad'",
        "2 rows of",
        "have bytes that no vector can hold",
        "empty: 1",
        "OM_ACCEPT_LOSS=2: their bytes are then kept in table",
    ),
    "NULL in what is to be NOT NULL": (
        (
            f"ALTER TABLE {TABLE} ALTER v SET NOT NULL;"
            f" INSERT INTO {TABLE} (id, sector, dim, v) VALUES (gen_random_uuid(), 'bad', 8, 'NaN')"
        ),
        f"DELETE FROM {TABLE} WHERE sector = 'bad'; ALTER TABLE {TABLE} ALTER v DROP NOT NULL",
        '1 rows of "public.openmemory_vectors" have no "v_vector", which is to be NOT NULL',
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("single", [{}, SINGLE], ids=["", "one transaction"])
def test_what_can_not_be_cut_over_stops_the_script_before_any_change(
    server: Server, database: Database, single: dict[str, str]
) -> None:
    migrated(server, database)
    for number, (what, (wrong, mended, *said)) in enumerate(WRONG.items()):
        more = {"other dimensions": {"OM_VEC_DIM": "9"}, "NULL in what is to be NOT NULL": {"OM_ACCEPT_LOSS": "1"}}
        database.run(wrong)
        before = state(database)
        result = offline(server, database, *UP, env=DIM8 | SWAP | single | more.get(what, {}), check=False)
        assert result.returncode == 3, what
        for text in said:
            assert text in result.stderr, what
        after = state(database)
        if not number:  # a refusal of the first block leaves not even an empty version table
            assert_same(before, after)
        for found in (before, after):  # the others come after the first commit, as online
            found["columns"] = [row for row in found["columns"] if row[1] != "openmemory_cutover_version"]
        for same in ("columns", "triggers", "functions", "kept", "stamp"):
            assert before[same] == after[same]
        assert [row for row in before["rows"] if row[1] == TABLE] == [row for row in after["rows"] if row[1] == TABLE]
        database.run(mended)
    offline(server, database, *UP, env=DIM8 | SWAP | single)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [SWAP, DROP], ids=["swap", "drop"])
def test_interrupted_after_any_of_its_statements_the_same_script_continues(
    server: Server, databases: Databases, mode: dict[str, str]
) -> None:
    env = DIM8 | mode | ELEVEN

    def prepare(database: Database) -> None:
        migrated(server, database, Case())
        if mode == DROP:
            database.run(f"ALTER TABLE {TABLE} ALTER v SET DEFAULT '\\x00'::bytea")

    with twins(databases, prepare) as (straight, interrupted):
        for command in (UP, BACK):
            text = script(*command, env=env)
            parts = re.split(r"(?<=\n\n)(?=DO |SELECT |SET |INSERT |BEGIN)", text)
            assert len(parts) > 7
            for number in range(2, len(parts) + 1):
                psql(server, interrupted, "".join(parts[:number]))
            psql(server, straight, text)
            assert_same(state(straight), state(interrupted))


@pytest.mark.slow
def test_what_an_interrupted_script_has_prepared_goes_with_the_chains_downgrade(
    server: Server, database: Database
) -> None:
    before = snapshot(migrated(server, database, Case()))
    text = script(*UP, env=DIM8 | SWAP | ELEVEN)
    psql(server, database, text.rpartition("DO $script$")[0])
    prepared = [name for _, name, *_ in snapshot(database)["relations"]]
    assert {f"{TABLE}_v_kept", f"{TABLE}_vvector_left", NEWER_INDEX} <= set(prepared)
    assert snapshot(database)["triggers"] == before["triggers"]

    offline(server, database, "downgrade", "head:base")

    names = {name for _, name, *_ in snapshot(database)["relations"]}
    assert names == {TABLE, f"{TABLE}_pkey", "openmemory_vectors_user_idx"} | {
        name for name in names if name.startswith("openmemory_cutover_version")
    }


@pytest.mark.slow
def test_a_table_that_keeps_updates_away_ends_the_rebuilding_soon(server: Server, database: Database) -> None:
    offline(server, migrated(server, database), *UP, env=DIM8 | DROP)
    database.run(f"CREATE RULE never AS ON UPDATE TO {TABLE} DO INSTEAD NOTHING")
    online = alembic(database, "-n", "cutover", "downgrade", "base", env=DIM8, check=False)
    by_script = offline(server, database, *BACK, check=False)
    for ended in (online, by_script):
        assert ended.returncode != 0
        assert "still have no bytes" in ended.log
        assert ended.log.count("rebuilding") <= 4
        assert "keeps updates from them" in ended.log

    database.run(f"DROP RULE never ON {TABLE}")
    offline(server, database, *BACK)
    assert mismatches(database) == []


@pytest.mark.slow
def test_killed_while_it_rebuilds_bytes_it_goes_on_where_it_was(server: Server, database: Database) -> None:
    env = {"OM_VEC_DIM": "256", "BACKFILL_BATCH": "20", "OM_INDEX": "none", **DROP}
    create_table(database)
    load(database, random_rows(3000, 256))
    offline(server, database, *MAIN, env=env)
    before = database.rows(f"SELECT id, sector, v FROM {TABLE} ORDER BY 1, 2")
    offline(server, database, *UP, env=env)

    def rebuilt() -> dict[str, str]:
        if not column_type(database, "v_bytea"):
            return {}
        return dict(database.rows(f"SELECT id::text, xmin::text FROM {TABLE} WHERE v_bytea IS NOT NULL"))

    process = start_psql(server, database, script(*BACK, env=env))
    eventually(lambda: len(rebuilt()) > 300)
    backend = "FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'psql'"
    database.run(f"SELECT pg_terminate_backend(pid, 10000) {backend}")
    process.communicate()
    assert process.returncode == 2
    done = rebuilt()
    assert 300 < len(done) < 3000
    database.run(f"UPDATE {TABLE} SET user_id = 'moved' WHERE id::text > '8'")
    done = {key: version for key, version in done.items() if key <= "8"}

    offline(server, database, *BACK, env=env)

    assert [tuple(row) for row in database.rows(f"SELECT id, sector, v FROM {TABLE} ORDER BY 1, 2")] == before
    after = dict(database.rows(f"SELECT id::text, xmin::text FROM {TABLE}"))
    assert done.items() <= after.items(), "rows that had their bytes were written again"
    assert mismatches(database) == []


@pytest.mark.slow
def test_who_writes_meanwhile_loses_nothing(server: Server, database: Database) -> None:
    env = {"OM_VEC_DIM": "64", "BACKFILL_BATCH": "50", **SWAP}
    create_table(database)
    load(database, random_rows(3000, 64))
    offline(server, database, *MAIN, env=env)
    keys = [key for (key,) in database.rows(f"SELECT id FROM {TABLE} ORDER BY 1")]
    values = [row.v for row in random_rows(100, 64, 1)]
    texts = [str(v) for (v,) in database.rows(f"SELECT v_vector::text FROM {TABLE} ORDER BY id LIMIT 100")]
    written: dict[str, Any] = {}
    writes = [0, 0]

    def write(share: int, column: str, sent: list[Any], cast: str) -> None:
        """Until the server says that the column is of another type by now."""
        with closing(database.connect()) as connection, connection.cursor() as cursor:
            for number in range(1_000_000):
                key, value = keys[(number * 7 + share) % len(keys) // 4 * 4 + share], sent[number % len(sent)]
                try:
                    cursor.execute(f"UPDATE {TABLE} SET {column} = %s::{cast} WHERE id = %s", (value, key))
                except psycopg2.errors.DatatypeMismatch:
                    return
                written[key] = value
                writes[cast == "vector"] += 1

    for command, sent, cast in ((UP, values, "bytea"), (BACK, texts, "vector")):
        written.clear()
        writers = [threading.Thread(target=write, args=(share, "v", sent, cast)) for share in (0, 1, 2)]
        for writer in writers:
            writer.start()
        offline(server, database, *command, env=env)
        for writer in writers:
            writer.join(60)
        found = dict(database.rows(f"SELECT id, {'v_bytea' if command == UP else 'v_vector::text'} FROM {TABLE}"))
        assert len(written) > 50
        for key, value in written.items():
            assert (bytes(found[key]) if command == UP else found[key]) == value
    assert mismatches(database) == []
    assert min(writes) > 50


@pytest.mark.slow
def test_a_lock_that_is_held_is_tried_again_until_it_is_free(server: Server, database: Database) -> None:
    migrated(server, database)
    with closing(psycopg2.connect(database.url)) as reader, reader.cursor() as cursor:
        env = DIM8 | DROP | {"OM_LOCK_TIMEOUT_MS": "50"}
        parts = script(*UP, env=env).rpartition("DO $script$")
        psql(server, database, parts[0])
        cursor.execute(f"LOCK TABLE {TABLE} IN ACCESS SHARE MODE")
        process = start_psql(server, database, parts[1] + parts[2])
        try:
            assert process.stderr
            said = ""
            while "try 2 of 30" not in said:
                line = process.stderr.readline()
                assert line, said
                said += line
            assert column_type(database, "v") == "bytea"
            reader.rollback()
            _, rest = process.communicate(timeout=120)
        finally:
            process.kill()

    assert process.returncode == 0, said + rest
    assert stamped(database) == STAMPED
    assert column_type(database, "v") is None


@pytest.mark.slow
def test_a_timeout_of_the_roles_does_not_end_it(server: Server, database: Database) -> None:
    migrated(server, database, Case(rows=400, bad=False))
    offline(server, database, *UP, env=DIM8 | DROP)
    database.run(SLOWLY)

    offline(server, database, *BACK)

    assert column_type(database, "v") == "bytea"


@pytest.mark.slow
def test_bytes_that_are_not_what_the_vectors_say_stop_the_way_back(server: Server, database: Database) -> None:
    migrated(server, database)
    offline(server, database, *UP, env=DIM8 | SWAP)
    database.run(f"{QUIETLY} UPDATE {TABLE} SET v = {NEW} WHERE user_id = 'user7'")

    refused = offline(server, database, *BACK, check=False)
    assert refused.returncode == 3
    assert f'ERROR:  in 6 rows of "public.{TABLE}" "v_bytea" is not what "v" says' in refused.stderr
    assert 'HINT:  If the vectors are right, UPDATE … SET "v_bytea" = NULL for those rows' in refused.stderr

    database.run(f"UPDATE {TABLE} SET v_bytea = NULL WHERE user_id = 'user7'")
    offline(server, database, *BACK)
    assert database.value(f"SELECT count(*) FROM {TABLE} WHERE v = %s", pack(range(1, 9))) == 6
    assert mismatches(database) == []
    assert stamp(database) == ["om_20240108_finalize"]


@pytest.mark.slow
def test_a_row_that_comes_without_a_vector_while_that_is_made_not_null_stops_it(
    server: Server, database: Database
) -> None:
    migrated(server, database)
    database.run(f"ALTER TABLE {TABLE} ALTER v SET NOT NULL")
    parts = script(*UP, env=DIM8 | SWAP | {"OM_ACCEPT_LOSS": "1"}).split("\n\n")
    (prove,) = [part for part in parts if "VALIDATE CONSTRAINT" in part]
    database.run(f"INSERT INTO {TABLE} (id, sector, dim, v) VALUES (gen_random_uuid(), 'bad', 8, 'NaN')")
    before = snapshot(database)

    refused = psql(server, database, prove, check=False)

    assert refused.returncode == 3
    assert f'ERROR:  1 rows of "public.{TABLE}" have no "v_vector", which is to be NOT NULL' in refused.stderr
    assert_same(before, snapshot(database))


@pytest.mark.slow
def test_a_publication_and_a_role_that_is_no_more_are_warned_about(server: Server, database: Database) -> None:
    migrated(server, database)
    database.run(f"CREATE ROLE reader; GRANT SELECT (v) ON {TABLE} TO reader; CREATE PUBLICATION p FOR ALL TABLES")
    up = offline(server, database, *UP, env=DIM8 | DROP)
    assert f'WARNING:  publication "p" sends "public.{TABLE}" to its subscribers\n' in up.stderr
    database.run("DROP ROLE reader")

    back = offline(server, database, *BACK)

    assert 'WARNING:  there is no role "reader" any more that had privileges on a column of' in back.stderr
    assert mismatches(database) == []


@pytest.mark.slow
@pytest.mark.parametrize("command", [UP, BACK], ids=["up", "back"])
@pytest.mark.parametrize("mode", [SWAP, DROP, SWAP | SINGLE], ids=["swap", "drop", "one transaction"])
def test_squawk_finds_nothing_but_alembics_version_table(
    command: tuple[str, ...], mode: dict[str, str], tmp_path: Path
) -> None:
    squawk = shutil.which("squawk", path=Path(sys.executable).parent) or shutil.which("squawk")
    if squawk is None:
        pytest.skip("squawk is not installed: pip install squawk-cli")
    file = tmp_path / "cutover.sql"
    file.write_text(script(*command, env=DIM8 | mode))

    done = subprocess.run([squawk, "--reporter", "json", file], capture_output=True, text=True)

    found = {violation["rule_name"] for violation in json.loads(done.stdout)}
    assert found == ({"prefer-text-field"} if command == UP else set()), done.stdout
