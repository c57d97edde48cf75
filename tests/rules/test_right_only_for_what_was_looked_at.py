"""R9: exit 0 and "right" only for what was looked at, all of it: what was not, or could not be, is not right."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import psycopg2
import pytest

from demo.openmemory import TABLE
from openmemory_migrations import embedded
from openmemory_migrations.backfill.reader import Scan
from openmemory_migrations.cli import main
from openmemory_migrations.columns.cutover_mark import DO, UNDO, names
from openmemory_migrations.db import catalog
from openmemory_migrations.db.context import Context
from openmemory_migrations.db.database import Database as PackageDatabase
from openmemory_migrations.encoding import codec, dimensions
from openmemory_migrations.errors import ANEW
from openmemory_migrations.preflight import state
from openmemory_migrations.settings import Settings
from openmemory_migrations.verify import queries, stream, verification
from tests.support.cases import by_turns
from tests.support.commands import NOTHING, alembic, om
from tests.support.cutover import DOWN, UP
from tests.support.interruption import holding, killed
from tests.support.native import create_newer
from tests.support.openmemory import Database, checksum, create_table, load, mismatches, pack, random_rows
from tests.support.package import TARGET, package
from tests.support.proxy import Verdict
from tests.support.scripts import offline
from tests.support.states import EXPAND, guards, refused
from tests.support.verification import UNSEARCHED, behind_its_back, compared, verify

DIM = 8
EXCLUSIVE = "IN ACCESS EXCLUSIVE MODE"
ROWS = random_rows(300, DIM)
IVFFLAT = f"CREATE INDEX made ON {TABLE} USING ivfflat ({{}} vector_l2_ops) WITH (lists = 30)"


@pytest.fixture
def table(database: Database) -> Database:
    create_table(database)
    load(database, ROWS)
    alembic(database, "upgrade", "head", env={"OM_INDEX": "none"})
    return database


class Run(NamedTuple):
    code: int
    found: dict[str, Any]
    log: str


Here = Callable[..., Run]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """Runs `verify`, or another command, in this process, whose functions a test can slow down or break."""

    def run(database: Database, *args: str, command: str = "verify", env: Mapping[str, str] = NOTHING) -> Run:
        for name, value in {"OM_DATABASE_URL": database.url, **env}.items():
            monkeypatch.setenv(name, value)
        code = main([command, "--json", *args])
        said = capsys.readouterr()
        return Run(code, json.loads(said.out or "{}"), said.err)

    return run


# -- by absence


@pytest.mark.parametrize(
    ("key", "value", "setting"),
    [
        ("id integer, tag text, PRIMARY KEY (id) INCLUDE (tag)", "n, CASE WHEN n % 2 = 0 THEN 'x' END", "SELECT"),
        (
            "id float8 PRIMARY KEY",
            "n / 3.0",
            "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET extra_float_digits = 0', current_database()); END $$",
        ),
    ],
    ids=["a nullable column beside the key", "keys that lose digits as text"],
)
def test_a_row_that_is_not_found_by_its_key_is_not_right(
    database: Database, key: str, value: str, setting: str
) -> None:
    database.run(f"CREATE TABLE {TABLE} ({key}, v bytea, dim integer)")
    v = pack([1.0] * DIM).hex()
    into = "id, tag, v, dim" if "tag" in key else "id, v, dim"
    database.run(f"INSERT INTO {TABLE} ({into}) SELECT {value}, '\\x{v}', {DIM} FROM generate_series(1, 100) AS n")
    alembic(database, "upgrade", "head", env={"OM_INDEX": "none"})
    with behind_its_back(database):
        database.run(f"UPDATE {TABLE} SET v = %s WHERE id > 20", pack([2.0] * DIM))
    database.run(setting)
    wrong = database.value(f"SELECT count(*) FROM {TABLE} WHERE id > 20")

    found, _ = compared(database, 1)

    assert (found["equal"], found["wrong"][0]["rows"]) == (100 - wrong, wrong)
    assert all("tag" not in one for one in found["wrong"][0]["keys"])
    refused = alembic(database, *UP, env={"OM_CUTOVER": "drop", "OM_INDEX": "none"}, check=False)
    assert f"{wrong} rows of" in refused.log
    assert refused.returncode != 0
    assert database.value(f"SELECT count(v) FROM {TABLE}") == 100


def test_rows_that_the_comparison_never_came_to_are_not_right(
    table: Database, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hasty(Scan):
        def advance(self, rows_read: int, last_tid: tuple[int, int] | None) -> None:
            self.position = (self.end_page, 0)

    monkeypatch.setattr(stream, "BATCH_ROWS", 100)
    monkeypatch.setattr(stream, "Scan", Hasty)

    done = here(table, *UNSEARCHED)

    assert (done.code, done.found["not_looked_at"], done.found["comparison"]["wrong"]) == (1, len(ROWS) - 100, [])


def test_a_sample_is_of_rows_and_not_of_pages_that_hold_none(table: Database, here: Here) -> None:
    """As a table is right after an upgrade: what was rewritten is dead in the first pages."""
    table.run(f"DELETE FROM {TABLE} WHERE ctid < (SELECT max(ctid) FROM {TABLE} WHERE ctid < '(100,1)')")
    table.run(f"INSERT INTO {TABLE} (id, sector, v, dim) SELECT gen_random_uuid(), sector, v, dim FROM {TABLE}")
    with behind_its_back(table):
        table.run(f"UPDATE {TABLE} SET v_vector = '[1,2,3,4,5,6,7,8]'")

    done = here(table, *UNSEARCHED, "--sample", "1")

    found = done.found["comparison"]
    assert (done.code, found["rows"] + done.found["not_looked_at"]) == (1, 2)
    assert found["wrong"][0]["rows"] == found["rows"] >= 1


def test_a_sample_says_how_much_was_not_looked_at(table: Database, here: Here) -> None:
    done = here(table, *UNSEARCHED, "--sample", "30")

    seen = done.found["comparison"]["rows"]
    assert (done.code, done.found["not_looked_at"]) == (0, len(ROWS) - seen)
    assert 30 <= seen < len(ROWS)


def test_a_vector_without_bytes_is_right_only_before_a_cutover(table: Database) -> None:
    """Where it may have been carried over from an adopted column; after one, bytes are rebuilt of every vector."""
    table.run(f"UPDATE {TABLE} SET v = NULL, v_vector = v_vector WHERE dim = {DIM}")
    with behind_its_back(table):
        table.run(f"UPDATE {TABLE} SET v_vector = '[1,2,3,4,5,6,7,8]'")
    found, _ = compared(table, 0)
    assert (found["without_source"], found["sourceless"]) == (len(ROWS), len(ROWS))
    alembic(table, *UP, env={"OM_CUTOVER": "drop", "OM_INDEX": "none"})
    table.run(f"ALTER TABLE {TABLE} ADD v_bytea bytea")

    now = TARGET.dropped
    with package(table, PackageDatabase) as db:
        db.take_over()
        with db.transaction():
            known, extension = catalog.table(db, "public", TABLE), catalog.extension(db)
        assert known
        assert extension
        there = Context(db.at(names(now)), now, Settings.load({}, {}))
        again = verification.compare(there.with_table(known).with_extension(extension))

    assert not again.fine
    assert (again.wrong["sourceless"].rows, again.equal) == (len(ROWS), 0)
    assert again.problems(known).startswith(f"{len(ROWS)}: there is a vector, but no bytes, such as (id=")


# -- another table


def test_a_table_that_another_has_taken_the_name_of_is_not_what_was_looked_at(
    table: Database, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock on a table keeps nobody from renaming its schema."""
    table.run(f"CREATE SCHEMA app; ALTER TABLE {TABLE} SET SCHEMA app; CREATE SCHEMA spare")
    table.run(f"CREATE TABLE spare.{TABLE} (LIKE app.{TABLE} INCLUDING COMMENTS)")
    search = verification.search

    def swapped(*args: Any) -> object:
        table.run("ALTER SCHEMA app RENAME TO old; ALTER SCHEMA spare RENAME TO app")
        return search(*args)

    monkeypatch.setattr(verification, "search", swapped)

    done = here(table, "--queries", "2", env={"OM_PG_SCHEMA": "app"})

    assert done.code == 1
    assert "was changed just now" in done.log


# -- recall


@pytest.mark.parametrize("kind", ["native", "swap", "drop"])
def test_a_gate_is_measured_where_there_are_no_bytes(database: Database, kind: str) -> None:
    if kind == "native":
        create_newer(
            database, ROWS, f"CREATE TABLE {TABLE} (id uuid, sector text, user_id text, v vector, dim integer)"
        )
        alembic(database, "upgrade", "head", env={"OM_INDEX": "none"})
    else:
        create_table(database)
        load(database, ROWS)
        alembic(database, "upgrade", "head", env={"OM_INDEX": "none"})
        alembic(database, *UP, env={"OM_CUTOVER": kind, "OM_INDEX": "none"})
    database.run(IVFFLAT.format("v_vector" if kind == "drop" else "v"))

    found = verify(database, 1, "--queries", "10", "--fail-under", "0.9")

    assert found["comparison"] is None
    assert found["search"]["session"]["recall"] < 0.9
    assert found["search"]["every_row"]["recall"] == 1
    assert found["findings"][0]["code"] == "fail-under"
    report = om(database, "report", "--json", "--queries", "10", "--fail-under", "0.9")
    assert report.returncode == 1
    assert json.loads(report.stdout)["verify"]["fine"] is False
    passed = om(database, "verify", "--queries", "10", "--fail-under", "0.01")
    assert passed.returncode == 0, passed.log
    assert f"{len(ROWS)}; none compared: there are no bytes" in passed.stdout


def test_a_gate_that_nothing_can_be_held_against_does_not_hold(database: Database) -> None:
    create_newer(database, [*random_rows(3, 4), *random_rows(3, 5)])

    found = verify(database, 1, "--fail-under", "0.5")

    assert found["not_searched"] == "the vectors have different dimensions"


@pytest.mark.parametrize(
    ("sizes", "options", "why"),
    [((4, 5), (), "the vectors have different dimensions"), ((4,), ("--queries", "0"), "no queries were asked for")],
)
def test_where_nothing_is_compared_or_searched_nothing_is_right(
    database: Database, sizes: tuple[int, ...], options: tuple[str, ...], why: str
) -> None:
    create_newer(database, [row for size in sizes for row in random_rows(3, size)])

    found = verify(database, 1, *options)

    assert (found["fine"], found["comparison"], found["not_looked_at"]) == (False, None, 3 * len(sizes))
    assert [(one["code"], one["detail"]) for one in found["findings"]] == [
        ("nothing-looked-at", f"No searches: {why}.")
    ]
    assert "verdict:  NOT right" in om(database, "verify", *options).stdout
    assert om(database, "report", *options).returncode == 1


def test_where_there_is_nothing_to_look_at_nothing_is_wrong(database: Database) -> None:
    create_newer(database, [])
    verify(database, 0, "--queries", "0")
    database.run(f"INSERT INTO {TABLE} (id, sector, v, dim) VALUES (gen_random_uuid(), 'semantic', NULL, 4)")
    verify(database, 0)


@pytest.mark.parametrize("command", ["verify", "report"])
def test_without_postgres_a_gate_never_holds(command: str) -> None:
    done = om(None, command, "--fail-under", "0.5", env={"OM_METADATA_BACKEND": "sqlite"})

    assert (done.returncode, done.stdout) == (2, "")
    assert "ERROR:  there is no Postgres in which searches could be measured" in done.stderr


# -- no longer than so many seconds


def test_a_comparison_that_ran_out_of_time_says_what_it_has_seen(
    table: Database, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = codec.records

    def slowly(*args: Any) -> object:
        time.sleep(0.1)
        return records(*args)

    monkeypatch.setattr(stream, "BATCH_ROWS", 50)
    monkeypatch.setattr(codec, "records", slowly)
    monkeypatch.setattr(verification, "TELL_AFTER", 0.1)

    done = here(table, *UNSEARCHED, "--max-seconds", "0.35")

    found = done.found["comparison"]
    assert (done.code, done.found["stopped"], found["rows"], found["wrong"]) == (1, True, len(ROWS), [])
    assert 50 <= found["equal"] == len(ROWS) - done.found["not_looked_at"] < len(ROWS)
    assert f'NOTICE:  verifying "public.{TABLE}" takes about ' in done.log
    assert "VACUUM doesn't remove what dies meanwhile" in done.log


def test_a_statement_of_a_search_is_ended_when_the_time_is_up(
    table: Database, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "search", lambda ctx, *_: ctx.db.run("SELECT pg_sleep(60)"))
    began = time.monotonic()

    done = here(table, "--max-seconds", "1")

    assert time.monotonic() - began < 10
    assert (done.code, done.found["comparison"]["equal"], done.found["search"]) == (1, len(ROWS), None)
    assert [one["code"] for one in done.found["findings"]] == ["max-seconds"]
    assert here(table, "--max-seconds", "1", *UNSEARCHED).code == 0


@pytest.mark.parametrize("command", ["verify", "report"])
def test_queries_that_can_not_be_chosen_are_no_reason_to_search_nothing(
    table: Database, here: Here, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Unless the comparison comes upon the same row."""
    monkeypatch.setattr(queries.BLOCKS, "sizes", "SELECT sector, 1 / (dim - dim) FROM {table}", raising=False)

    done = here(table, command=command)

    assert (done.code, done.found) == (1, {})
    assert "division by zero (SQLSTATE 22012)" in done.log


@pytest.mark.parametrize("command", ["verify", "report"])
def test_a_lock_is_waited_for_no_longer_than_so_many_seconds(table: Database, here: Here, command: str) -> None:
    began = time.monotonic()

    with holding(table, "ACCESS EXCLUSIVE"):
        done = here(table, *UNSEARCHED, "--max-seconds", "1", command=command)

    assert time.monotonic() - began < 5
    assert (done.code, done.found) == (3, {})
    assert f'the 1 seconds of --max-seconds were over before "public.{TABLE}" could be looked at' in done.log


def test_a_report_that_ran_out_of_time_has_what_was_seen(
    table: Database, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dimensions, "survey", lambda db, *_: db.run("SELECT pg_sleep(60)"))
    began = time.monotonic()

    done = here(table, "--max-seconds", "1", command="report")

    assert time.monotonic() - began < 10
    assert (done.code, done.found["fine"], done.found["verify"]) == (1, False, None)
    assert done.found["stopped"].startswith("the 1 seconds of --max-seconds were over")
    assert done.found["status"]["rows"]["converted"] == len(ROWS)


def test_lines_of_a_verification_without_time(table: Database) -> None:
    done = om(table, "verify", "--max-seconds", "0")

    assert done.returncode == 1
    assert done.stdout.endswith("verdict:  NOT verified\n")
    assert "ERROR:  the 0 seconds of --max-seconds were over before all was looked at" in done.stdout


# -- nothing there


@pytest.mark.parametrize("command", ["verify", "check", "status", "report", "tune"])
def test_a_table_that_is_not_there(database: Database, command: str) -> None:
    done = om(database, command)

    assert done.returncode == 1
    said = done.stdout if command == "check" else done.stderr
    assert f'ERROR:  table "public.{TABLE}" does not exist\nHINT:  Set OM_PG_SCHEMA and OM_VECTOR_TABLE' in said
    assert command == "check" or not done.stdout


# -- half done, or changed


def status(database: Database, code: int, index: str = "none") -> dict[str, Any]:
    done = om(database, "status", "--json", env={"OM_INDEX": index})
    assert done.returncode == code, done.log
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("goes_on", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_what_a_killed_cutover_has_left_is_named_and_goes(
    server: embedded.Server, table: Database, goes_on: bool
) -> None:
    table.run(f"ALTER TABLE {TABLE} ALTER v SET NOT NULL; {IVFFLAT.format('v_vector')}")
    env = {"OM_CUTOVER": "swap"}
    killed(server, table, UP, lambda _, text: "before" if EXCLUSIVE in text else None, env)
    unfit = f"INSERT INTO {TABLE} (id, sector, v, dim) VALUES (gen_random_uuid(), 'unfit', '\\x01', 1)"
    with pytest.raises(psycopg2.errors.CheckViolation):
        table.run(unfit)

    found = status(table, 1)

    left = f"{TABLE}_vvector_left"
    assert found["left"] == [
        'index "openmemory_vectors_hnsw_idx"',
        f'index "{left}"',
        f'constraint "{left}", which refuses rows without a vector',
    ]
    assert found["next"].startswith("alembic -n cutover upgrade head goes on with the cutover")
    assert 'by a run that was interrupted: index "' in om(table, "status").stdout
    alembic(table, *(UP if goes_on else DOWN), env=env)
    if not goes_on:
        table.run(unfit)
    assert status(table, 0)["next"] == "nothing"
    assert table.value("SELECT count(*) FROM pg_class WHERE relname = %s", left) == 0
    assert guards(table) == []


@pytest.mark.parametrize("dimensions", ["", pytest.param("(4)", marks=pytest.mark.slow)])
def test_a_cutover_whose_vectors_have_other_dimensions_now(table: Database, dimensions: str) -> None:
    """After a drop: a swap's trigger keeps the server from changing the type."""
    alembic(table, *UP, env={"OM_CUTOVER": "drop", "OM_INDEX": "none"})
    using = " USING subvector(v_vector, 1, 4)" if dimensions else ""
    table.run(f"ALTER TABLE {TABLE} ALTER v_vector TYPE vector{dimensions}{using}")
    said = f'column "v_vector" of "public.{TABLE}" has {"4" if dimensions else "no"} dimensions, and had {DIM}'
    mending = f'ALTER TABLE "public"."{TABLE}" ALTER COLUMN "v_vector" TYPE public.vector({DIM})'

    next_ = status(table, 1)["next"]
    assert next_.startswith(f"{said}: {mending}")
    refused(table, said, f"HINT:  {mending}", command=DOWN, env={"OM_INDEX": "none"})

    if not dimensions:
        table.run(mending)
        status(table, 0)
        alembic(table, *DOWN, env={"OM_INDEX": "none"})
        compared(table, 0)


def test_a_swap_whose_trigger_does_not_take_bytes_away_any_more(table: Database) -> None:
    alembic(table, *UP, env={"OM_CUTOVER": "swap", "OM_INDEX": "none"})
    status(table, 0)
    trigger = f"{TABLE}_v_bytea_sync"
    table.run(f"ALTER TABLE {TABLE} DISABLE TRIGGER {trigger}")

    assert status(table, 1)["next"].startswith(f'trigger "{trigger}" of "public.{TABLE}" is disabled')

    table.run(f"ALTER TABLE {TABLE} ENABLE ALWAYS TRIGGER {trigger}")
    status(table, 0)


def test_an_index_that_a_killed_replacement_has_left_is_named(table: Database) -> None:
    table.run(f"CREATE INDEX {TABLE}_vvector_idx_new ON {TABLE} USING hnsw (v_vector vector_l2_ops)")

    found = status(table, 1)

    assert found["left"] == [f'index "{TABLE}_vvector_idx_new"']
    assert found["next"].startswith("openmemory-migrations index clears up ")
    assert om(table, "index", env={"OM_INDEX": "none"}).returncode == 0
    assert status(table, 0)["left"] == []


def stamps(_: int, text: str) -> Verdict:
    """Before the last stamp of a command, up or down."""
    return "before" if "_version" in text and text.startswith(("INSERT INTO", "DELETE FROM")) else None


@pytest.mark.parametrize("mode", ["swap", pytest.param("drop", marks=pytest.mark.slow)])
def test_a_cutover_that_was_killed_before_its_stamp_is_not_done(
    server: embedded.Server, table: Database, mode: str
) -> None:
    env = {"OM_CUTOVER": mode, "OM_INDEX": "none"}

    killed(server, table, UP, stamps, env)
    assert status(table, 1)["next"] == f"With OM_CUTOVER={mode}: {DO}, which only stamps it"
    alembic(table, *UP, env=env)
    assert status(table, 0)["next"] == "nothing"

    killed(server, table, DOWN, stamps, env)
    assert status(table, 1)["next"] == f"{UNDO}, which was interrupted before its stamp"
    alembic(table, *DOWN, env=env)
    assert status(table, 0)["next"] == "nothing"


def test_a_downgrade_that_was_killed_before_its_stamp_is_ended_by_the_same(
    server: embedded.Server, table: Database
) -> None:
    killed(server, table, ("downgrade", "base"), stamps)

    assert status(table, 1)["next"] == ANEW

    alembic(table, "downgrade", "om_20240107_pgvector-1")
    assert status(table, 1)["next"] == "openmemory-migrations upgrade"


@pytest.mark.parametrize("mode", ["drop", pytest.param("swap", marks=pytest.mark.slow)])
def test_a_table_that_was_cut_over_is_not_fine_without_its_index(table: Database, mode: str) -> None:
    alembic(table, *UP, env={"OM_CUTOVER": mode, "OM_INDEX": "none"})
    assert status(table, 0)["next"] == "nothing"

    assert status(table, 1, "hnsw")["next"] == "openmemory-migrations index"

    assert om(table, "index", env={"OM_INDEX": "hnsw"}).returncode == 0
    assert status(table, 0, "hnsw")["next"] == "nothing"


def test_an_adopted_column_whose_values_were_not_carried_over_is_named(database: Database) -> None:
    """In a host's chain, whose version table only the host knows, nothing else says that the revision hasn't run."""
    create_table(database)
    load(database, ROWS)
    database.run(f"CREATE EXTENSION vector; ALTER TABLE {TABLE} ADD v_vector vector({DIM})")
    database.run(f"UPDATE {TABLE} SET v_vector = '[1,2,3,4,5,6,7,8]', v = NULL WHERE user_id = 'user1'")
    alembic(database, "upgrade", "om_20240107_pgvector")
    database.run("DROP TABLE openmemory_alembic_version")
    assert om(database, "backfill").returncode == 0

    next_ = status(database, 1)["next"]

    assert next_.startswith(
        'alembic upgrade head, or openmemory-migrations upgrade: "v_vector_adopted" may have values'
    )
    alembic(database, "upgrade", "head", env={"OM_INDEX": "none"})
    assert status(database, 0)["next"] == "nothing"


@pytest.mark.parametrize("good", [0, 1])
def test_rows_that_no_vector_can_hold_are_pending_however_many_only_beside_one_that_can(
    table: Database, here: Here, monkeypatch: pytest.MonkeyPatch, good: int
) -> None:
    monkeypatch.setattr(state, "LOOK_INTO", 2)
    bad = "SELECT gen_random_uuid(), 'x', %s, 8 FROM generate_series(1, 3)"
    table.run(f"INSERT INTO {TABLE} (id, sector, v, dim) {bad}", pack([float("nan")] * DIM))
    if good:
        table.run(f"UPDATE {TABLE} SET v_vector = NULL WHERE id = %s", ROWS[0].id)

    done = here(table, command="status", env={"OM_INDEX": "none"})

    assert (done.code, done.found["rows"]["pending"]) == (good, good)
    assert done.found["rows"]["skipped"] == {"NaN or infinite values": 3}


# -- a value that a trigger changes on its way

CONVERTING = ("client", "server", "native", "script")

TO_UNIT = f"""
CREATE FUNCTION to_unit() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN NEW.v_vector := public.l2_normalize(NEW.v_vector); RETURN NEW; END $$;
CREATE TRIGGER to_unit BEFORE UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION to_unit()
"""


AFTERWARDS = f"""
CREATE FUNCTION to_unit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
  UPDATE {TABLE} SET v_vector = public.l2_normalize(v_vector)
   WHERE id = NEW.id AND sector = NEW.sector AND v_vector IS DISTINCT FROM public.l2_normalize(v_vector);
  RETURN NULL; END $$;
CREATE TRIGGER to_unit AFTER UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION to_unit()
"""
DEFERRED = AFTERWARDS.replace("CREATE TRIGGER", "CREATE CONSTRAINT TRIGGER").replace(
    "FOR EACH", "DEFERRABLE INITIALLY DEFERRED FOR EACH"
)


@pytest.mark.parametrize(
    ("trigger", "engine"), by_turns((TO_UNIT, AFTERWARDS, DEFERRED), CONVERTING, ids=("before", "after", "deferred"))
)
def test_a_vector_that_a_trigger_has_changed_is_none(
    server: embedded.Server, database: Database, engine: str, trigger: str
) -> None:
    """Or it would be found there by the next run, and taken for converted."""
    table = database
    create_table(table)
    load(table, ROWS)
    alembic(table, "upgrade", EXPAND)
    table.run(trigger)

    for _ in range(2):
        if engine == "script":
            done = offline(server, table, "upgrade", f"{EXPAND}:head", env={"OM_VEC_DIM": str(DIM)}, check=False)
            assert f"{len(ROWS)} rows can't be updated" in done.stderr
            assert "not changed by an UPDATE, perhaps because of trigger to_unit" in done.stderr
        else:
            done = alembic(table, "upgrade", "head", env={"OM_BACKFILL_ENGINE": engine}, check=False)
            assert f"FAILED: {len(ROWS)} rows" in done.log
            assert "that keeps a row as it was or changes the value" in done.log
        assert done.returncode > 0
        assert table.value(f"SELECT count(v_vector) FROM {TABLE}") == 0

    table.run(f"DROP TRIGGER to_unit ON {TABLE}")
    alembic(table, "upgrade", "head", env={} if engine == "script" else {"OM_BACKFILL_ENGINE": engine})
    assert mismatches(table, dim=DIM) == []


STUBBORN = TO_UNIT.replace("l2_normalize(NEW.v_vector)", "l2_normalize(coalesce(NEW.v_vector, OLD.v_vector))")
CONSTANT = TO_UNIT.replace("public.l2_normalize(NEW.v_vector)", "'[1,0,0,0,0,0,0,0]'")
SPOILS = TO_UNIT.replace("NEW.v_vector := public.l2_normalize(NEW.v_vector)", "NEW.v := set_byte(NEW.v, 0, 7)")
HERE = "id = NEW.id AND sector = NEW.sector"


def instead(statement: str) -> str:
    """BEFORE, of rows that get a vector, in the place of the UPDATE."""
    return f"""
    CREATE FUNCTION instead() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
      IF NEW.sector = 'semantic' AND OLD.v_vector IS NULL AND NEW.v_vector IS NOT NULL THEN
        {statement}; return NULL; END IF;
      return NEW; END $$;
    CREATE TRIGGER instead BEFORE UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION instead()
    """


def afterwards(statement: str) -> str:
    return f"""
    CREATE FUNCTION rewrites() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {statement}; RETURN NULL; END $$;
    CREATE TRIGGER rewrites AFTER UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION rewrites()
    """


CHAIN = f"""
CREATE TABLE notes (id uuid, times integer);
CREATE FUNCTION noted() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN UPDATE {TABLE} SET v_vector = '[1,0,0,0,0,0,0,0]' WHERE id = NEW.id; RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER noted AFTER INSERT ON notes DEFERRABLE INITIALLY DEFERRED
FOR EACH ROW EXECUTE FUNCTION noted();
CREATE FUNCTION notes() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN IF NEW.v_vector <> '[1,0,0,0,0,0,0,0]' AND NEW.sector = 'semantic' THEN
     INSERT INTO notes VALUES (NEW.id, 1); END IF;
   RETURN NEW; END $$;
CREATE TRIGGER notes BEFORE UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION notes()
"""
TRIGGERS = {
    "stubborn": STUBBORN,
    "constant": CONSTANT,
    "spoils": SPOILS,
    "sets again": afterwards(
        f"UPDATE {TABLE} SET v_vector = '[1,0,0,0,0,0,0,0]' WHERE {HERE} AND v_vector <> '[1,0,0,0,0,0,0,0]'"
    ),
    "clears": afterwards(f"UPDATE {TABLE} SET v = NULL WHERE {HERE} AND v IS NOT NULL"),
    "scales": afterwards(f"UPDATE {TABLE} SET v = set_byte(v, 0, 7) WHERE {HERE} AND get_byte(v, 0) <> 7"),
    "deletes": afterwards(f"DELETE FROM {TABLE} WHERE {HERE}"),
    "replaces": afterwards(
        f"DELETE FROM {TABLE} WHERE {HERE}; INSERT INTO {TABLE} (id, sector, user_id, v, dim, v_vector)"
        " VALUES (NEW.id, NEW.sector, NEW.user_id, NEW.v, NEW.dim, '[1,0,0,0,0,0,0,0]')"
    ),
    "in a chain": CHAIN,
    "deletes instead": instead(f"DELETE FROM {TABLE} WHERE {HERE}"),
    "scales instead": instead(f"UPDATE {TABLE} SET v = set_byte(v, 0, 7) WHERE {HERE}"),
    "sets another instead": instead(f"UPDATE {TABLE} SET v_vector = '[1,0,0,0,0,0,0,0]' WHERE {HERE}"),
    "takes what is taken back": f"""
    CREATE FUNCTION unit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
      IF NEW.sector = 'semantic' AND NEW.v_vector IS NULL THEN NEW.v := NULL;
      ELSIF NEW.sector = 'semantic' THEN NEW.v_vector := '[1,0,0,0,0,0,0,0]'; END IF;
      return NEW; END $$;
    CREATE TRIGGER unit BEFORE UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION unit()
    """,
    "spoils, and another touches": SPOILS
    + f""";
    CREATE FUNCTION touched() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN UPDATE {TABLE} SET user_id = 'touched' WHERE {HERE} AND sector = 'semantic' AND user_id <> 'touched';RETURN
       NULL; END $$;
    CREATE TRIGGER touched AFTER UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION touched()
    """,
    "of a generated column": f"""
    ALTER TABLE {TABLE} ADD has boolean GENERATED ALWAYS AS (v_vector IS NOT NULL) STORED;
    CREATE FUNCTION gen() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN NEW.v := set_byte(NEW.v, 0, 7); RETURN NEW; END $$;
    CREATE TRIGGER gen BEFORE UPDATE OF has ON {TABLE} FOR EACH ROW EXECUTE FUNCTION gen()
    """,
}


OFF = ("clears", "scales", "deletes instead", "takes what is taken back")


@pytest.mark.parametrize(
    ("case", "engine"),
    by_turns(
        [*((trigger, "on") for trigger in TRIGGERS.values()), *((TRIGGERS[name], "off") for name in OFF)],
        CONVERTING,
        ids=[*TRIGGERS, *(f"{name}, and ours is off" for name in OFF)],
    ),
)
def test_what_a_trigger_writes_in_spite_of_us_is_not_kept(
    server: embedded.Server, database: Database, engine: str, case: tuple[str, str]
) -> None:
    """A vector in the place of NULL, too, or other bytes: nothing of that is committed."""
    trigger, sync = case
    create_table(database)
    load(database, ROWS[:40])
    env = {"OM_SYNC_TRIGGER": sync}
    alembic(database, "upgrade", EXPAND, env=env)
    if trigger is not CHAIN:
        trigger = re.sub(r"BEGIN (NEW|UPDATE|DELETE)", r"BEGIN IF NEW.sector = 'semantic' THEN \1", trigger, count=1)
        trigger = trigger.replace(" RETURN N", " END IF; RETURN N")
    database.run(trigger)
    before = checksum(database)
    held = database.value(f"SELECT count(*) FROM {TABLE} WHERE sector = 'semantic'")

    for _ in range(2):
        if engine == "script":
            env |= {"OM_VEC_DIM": str(DIM)}
            done = offline(server, database, "upgrade", f"{EXPAND}:head", env=env, check=False)
            assert f"{held} rows can't be updated" in done.stderr
        else:
            done = alembic(database, "upgrade", "head", env=env | {"OM_BACKFILL_ENGINE": engine}, check=False)
            assert f"FAILED: {held} rows" in done.log
        assert done.returncode > 0
        assert checksum(database) == before
        assert database.value(f"SELECT count(v_vector) FROM {TABLE}") == 40 - held
