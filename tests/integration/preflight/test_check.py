"""`openmemory-migrations check`: what it says of a table and of a migration, against what a migration does."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest

from demo.openmemory import TABLE
from openmemory_migrations.preflight import disk
from openmemory_migrations.preflight.known_faults import faults
from openmemory_migrations.preflight.rows import runs_of
from openmemory_migrations.settings import Settings
from tests.support.commands import NOTHING, ROOT, alembic, om
from tests.support.openmemory import Database, create_table, load, pack, random_rows
from tests.support.preflight import check, finding, severities, unchanged
from tests.support.states import EXPAND, HEAD, INDEX, stamp

ROWS, DIM = 1000, 16
SHARE = ROWS // 20  # of one user
NAN = pack([float("nan")] * DIM)


@pytest.fixture
def table(database: Database) -> Database:
    create_table(database)
    load(database, random_rows(ROWS, DIM))
    return database


def spoil(database: Database) -> None:
    """Three kinds of bad rows, one user each, and one without bytes."""
    for user, v in (("user1", NAN), ("user2", b"\1\2\3"), ("user3", pack([1.0])), ("user4", None)):
        database.run(f"UPDATE {TABLE} SET v = %s WHERE user_id = %s", v, user)


def key(database: Database, user: str) -> str:
    """The key that is shown first: that of the row which comes first in the table."""
    sql = f"SELECT id, sector FROM {TABLE} WHERE user_id = %s ORDER BY ctid LIMIT 1"
    return "(id={}, sector={})".format(*database.rows(sql, user)[0])


def test_a_database_that_can_be_migrated(table: Database) -> None:
    spoil(table)

    found = unchanged(table, 0, env={"OM_VEC_DIM": str(DIM)})

    assert found["rows"] | {"skipped": None} == {
        "total": ROWS,
        "looked_at": ROWS,
        "sampled": False,
        "pending": ROWS - SHARE,
        "convertible": ROWS - 4 * SHARE,
        "without_source": SHARE,
        "skipped": None,
        "dim_differs": 2 * SHARE,
    }
    skipped = {one["reason"]: one for one in found["rows"]["skipped"]}
    assert {reason: one["rows"] for reason, one in skipped.items()} == {
        "NaN or infinite values": SHARE,
        "length not a multiple of 4": SHARE,
        "other dimension": SHARE,
    }
    assert [len(one["keys"]) for one in skipped.values()] == [5, 5, 5]
    assert skipped["NaN or infinite values"]["keys"][0] == key(table, "user1")
    assert skipped["length not a multiple of 4"]["keys"][0] == key(table, "user2")
    assert found["dimensions"] == {
        "value": DIM,
        "origin": "as configured",
        "histogram": [
            {"bytes": 3, "rows": SHARE},
            {"bytes": 4, "rows": SHARE},
            {"bytes": 4 * DIM, "rows": ROWS - 3 * SHARE},
        ],
    }
    assert severities(found) == {"bad-rows": "warning", "dim-differs": "notice"}
    assert found["verdict"] == "can be migrated"
    assert found["pgvector"]["installed"] is False
    assert found["estimate"] == {"seconds": None, "reason": 'extension "vector" is not installed yet'}
    assert found["index"]["options"] == "lists = 1"


def test_what_is_printed_for_people(table: Database) -> None:
    spoil(table)
    table.run("CREATE EXTENSION vector")

    done = om(table, "check", env={"OM_VEC_DIM": str(DIM)})

    assert (done.returncode, done.stderr) == (0, ""), done.log
    lines = done.stdout.splitlines()
    assert f"rows:        {ROWS:,}; {ROWS - 4 * SHARE:,} to convert" in lines
    assert f"             {SHARE:,} would be skipped: NaN or infinite values" in lines
    assert f"dimensions:  {DIM}, as configured" in lines
    assert re.search(r"^time:        1 s, an estimate: 800 rows took .* [\d.]+ s;", done.stdout, re.MULTILINE)
    assert f'WARNING:  {3 * SHARE} rows of "public.{TABLE}" can\'t be converted and would be skipped' in lines
    assert lines[-1] == "verdict: can be migrated"


@pytest.mark.slow
def test_what_is_told_is_what_a_run_does(table: Database) -> None:
    spoil(table)
    env = {"OM_VEC_DIM": str(DIM)}
    found = check(table, 0, env=env)

    log = alembic(table, "upgrade", "head", env=env).stderr

    converted = table.value(f"SELECT count(v_vector) FROM {TABLE}")
    assert converted == found["rows"]["convertible"]
    assert f"{sum(one['rows'] for one in found['rows']['skipped']):,} rows of" in log
    assert finding(found, "bad-rows")["detail"] in log
    after = unchanged(table, 0, env=env)
    assert after["verdict"] == "migrated already"
    assert after["revisions"] == [HEAD]
    assert after["rows"]["convertible"] == 0
    assert after["rows"]["skipped"] == found["rows"]["skipped"]


@pytest.mark.slow
def test_what_is_pending_in_a_migrated_table(table: Database) -> None:
    alembic(table, "upgrade", EXPAND)
    table.run(f"UPDATE {TABLE} SET v = v WHERE user_id IN ('user1', 'user2')")

    found = unchanged(table, 0)

    assert found["rows"]["pending"] == found["rows"]["convertible"] == ROWS - 2 * SHARE
    assert found["verdict"] == f"begun, and can be continued, {ROWS - 2 * SHARE} rows are pending"
    assert found["estimate"]["tried_rows"] == ROWS - 2 * SHARE
    assert stamp(table) == [EXPAND]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["client", "server"])
def test_the_time_is_from_rows_that_are_converted(table: Database, engine: str) -> None:
    table.run("CREATE EXTENSION vector")
    table.run(f"ALTER TABLE {TABLE} ADD later integer GENERATED ALWAYS AS (dim + 1) STORED")
    table.run(f"UPDATE {TABLE} SET v = %s WHERE user_id = 'user1'", NAN)

    found = unchanged(table, 0, env={"OM_BACKFILL_ENGINE": engine, "BACKFILL_BATCH": "200"})

    tried = found["estimate"]["tried_rows"]
    if engine == "client":
        assert 500 <= tried <= 600  # three batches, with what there are of bad ones among them
    else:
        assert tried == ROWS
    rate = found["estimate"]["rows_per_second"]
    least = found["rows"]["convertible"] / rate
    assert found["estimate"]["seconds"] == pytest.approx({"least": least, "most": 2 * least})
    assert 100 < rate < 1e6


@pytest.mark.slow
def test_rests_count_as_time(table: Database) -> None:
    table.run("CREATE EXTENSION vector")

    found = check(table, 0, env={"BACKFILL_BATCH": "100", "OM_BACKFILL_PAUSE_MS": "1000"})

    assert 10 < found["estimate"]["seconds"]["least"] < found["estimate"]["seconds"]["most"] < 12


@pytest.mark.slow
def test_a_sample(database: Database) -> None:
    create_table(database)
    rows = 20_000
    load(database, random_rows(rows, DIM))
    database.run(f"UPDATE {TABLE} SET v = %s WHERE user_id = 'user1'", NAN)
    database.run(f"UPDATE {TABLE} SET v = '' WHERE user_id = 'user2'")
    database.run(f"VACUUM FULL ANALYZE {TABLE}")

    found = unchanged(database, 0, "--sample", "5000")

    assert found["rows"]["sampled"] is True
    assert 3000 < found["rows"]["looked_at"] < 8000
    assert found["rows"]["total"] == pytest.approx(rows, rel=0.1)
    skipped = {one["reason"]: one["rows"] / found["rows"]["looked_at"] for one in found["rows"]["skipped"]}
    assert skipped == {
        "NaN or infinite values": pytest.approx(0.05, abs=0.03),
        "empty": pytest.approx(0.05, abs=0.03),
    }
    assert all(one["keys"] for one in found["rows"]["skipped"])
    assert found["rows"]["convertible"] == pytest.approx(0.9 * rows, rel=0.15)
    assert "of them looked at" in om(database, "check", "--sample", "5000").stdout
    assert check(database, 0, "--sample", "30000")["rows"]["looked_at"] == rows
    for wrong in ("0", "-1", "many", "²"):
        assert om(database, "check", "--sample", wrong).returncode == 2


def test_pages_of_a_sample_are_spread_and_never_twice() -> None:
    assert runs_of(1000, 1.0) == [(0, 1000)]
    assert runs_of(0, 0.5) == [(0, 0)]
    for pages in (1, 7, 16, 100, 12_345):
        for share in (0.001, 0.1, 0.5, 0.99):
            runs = runs_of(pages, share)
            seen = [page for first, end in runs for page in range(first, end)]
            assert len(seen) == len(set(seen))
            assert pages * share <= len(seen) + 16
            assert len(seen) <= pages * share + 16
            assert all(0 <= page < pages for page in seen)


@pytest.mark.slow
@pytest.mark.parametrize("sample", [(), ("--sample", "500")])
def test_hundreds_of_partitions(database: Database, sample: tuple[str, ...]) -> None:
    database.run(
        f"""
        CREATE EXTENSION vector;
        CREATE TABLE {TABLE} (id uuid, sector text, user_id text, v bytea, dim integer, PRIMARY KEY (id, sector))
        PARTITION BY HASH (id)
        """
    )
    for number in range(300):
        database.run(f"CREATE TABLE p{number} PARTITION OF {TABLE} FOR VALUES WITH (MODULUS 300, REMAINDER {number})")
    load(database, random_rows(3000, DIM))
    database.run(f"UPDATE {TABLE} SET v = %s WHERE user_id = 'user1'", NAN)

    found = unchanged(database, 0, *sample)

    assert found["partitions"] == 300
    assert found["estimate"]["tried_rows"] > 0
    if not sample:
        assert found["rows"]["total"] == 3000
        assert {one["reason"]: one["rows"] for one in found["rows"]["skipped"]} == {"NaN or infinite values": 150}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fill", "env", "code", "found"),
    [
        ("DELETE FROM {}", {}, 0, {"no-dimensions": "warning"}),
        ("DELETE FROM {}", {"OM_VEC_DIM": "3"}, 0, {}),
        ("DELETE FROM {} WHERE (id, sector) <> (SELECT id, sector FROM {} LIMIT 1)", {}, 0, {}),
        ("UPDATE {} SET v = NULL", {}, 0, {"no-dimensions": "warning"}),
        (
            "UPDATE {} SET v = '\\x01'",
            {},
            0,
            {"no-dimensions": "warning", "bad-rows": "warning", "dim-differs": "notice"},
        ),
        (
            "UPDATE {} SET v = '\\x01'",
            {"OM_TIER": "fast"},
            1,
            {"dimensions": "error", "bad-rows": "warning", "dim-differs": "notice"},
        ),
        (
            "UPDATE {} SET v = '\\x00000000' WHERE user_id = 'user1'",
            {},
            1,
            {"dimensions": "error", "dim-differs": "notice"},
        ),
        ("SELECT", {"OM_VEC_DIM": "17"}, 1, {"dimensions": "error"}),
        (
            "UPDATE {} SET v = '\\x01' WHERE user_id = 'user1'",
            {"OM_ON_BAD_ROWS": "fail"},
            1,
            {"bad-rows": "error", "dim-differs": "notice"},
        ),
    ],
)
def test_the_verdict_on_rows_is_the_upgrades(
    table: Database, fill: str, env: Mapping[str, str], code: int, found: dict[str, str]
) -> None:
    table.run(fill.format(TABLE, TABLE))

    assert severities(unchanged(table, code, env=env)) == found

    assert (alembic(table, "upgrade", "head", env=env, check=False).returncode != 0) == (code == 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setup", "env", "code", "said"),
    [
        ("SELECT", {"OM_DATABASE_URL": ""}, 2, "no database is configured"),
        ("SELECT", {"OM_DATABASE_URL": "sqlite:///x"}, 2, "SQLite keeps vectors as bytes"),
        ("SELECT", {"OM_DATABASE_URL": "", "OM_METADATA_BACKEND": "sqlite"}, 0, "nothing to do"),
        ("SELECT", {"OM_INDEX": "btree"}, 2, "OM_INDEX must be ivfflat, hnsw or none"),
        ("SELECT", {"OM_DATABASE_URL": "{stranger}"}, 2, "does not exist"),
        ("SELECT", {"OM_VECTOR_TABLE": "elsewhere"}, 1, 'table "public.elsewhere" does not exist'),
        ("SELECT", {"OM_PG_SCHEMA": "elsewhere"}, 1, f'table "elsewhere.{TABLE}" does not exist'),
        (f"ALTER TABLE {TABLE} DROP COLUMN v", {}, 1, 'has no column "v"'),
        (f"ALTER TABLE {TABLE} ALTER v TYPE text USING 'x'", {}, 1, "is of type text"),
        (f"CREATE VIEW seen AS TABLE {TABLE}", {"OM_VECTOR_TABLE": "seen"}, 1, "is a view"),
        (f"CREATE TABLE heir () INHERITS ({TABLE})", {}, 1, "a table that others inherit from"),
    ],
)
def test_what_can_not_be_migrated_or_looked_at(
    table: Database, setup: str, env: Mapping[str, str], code: int, said: str
) -> None:
    table.run(setup)
    stranger = table.url.replace("postgres@", "nobody_here@")

    done = om(table, "check", env={name: value.format(stranger=stranger) for name, value in env.items()})

    assert done.returncode == code, done.log
    assert said in (done.stdout if code == 1 else done.stderr)
    assert (code == 1) == ("verdict: can't be migrated: 1 error" in done.stdout)
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_v_that_is_a_vector_already(database: Database) -> None:
    database.run(f"CREATE EXTENSION vector; CREATE TABLE {TABLE} (id uuid, sector text, v vector(3), dim integer)")

    found = unchanged(database, 0)

    assert found["verdict"] == "nothing to migrate"
    assert severities(found) == {"already-vector": "notice"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "dim", "rows"),
    [("ivfflat", 16, 5000), ("ivfflat", 1000, 300), ("hnsw", 16, 5000), ("hnsw", 1000, 300), ("hnsw", 2100, 300)],
)
def test_the_size_of_the_index(database: Database, method: str, dim: int, rows: int) -> None:
    if dim > 2000:
        database.run("CREATE EXTENSION vector")
        if database.value("SELECT extversion < '0.7' FROM pg_extension WHERE extname = 'vector'"):
            pytest.skip("halfvec came with pgvector 0.7.0")
    create_table(database)
    load(database, random_rows(rows, dim))
    env = {"OM_INDEX": method}
    told = check(database, 0, env=env)["index"]

    alembic(database, "upgrade", "head", env=env)

    assert told["bytes"] == pytest.approx(database.value("SELECT pg_relation_size(%s::regclass)", INDEX), rel=0.15)
    assert told["method"] == method


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 256, 768])
def test_the_growth_of_the_table(database: Database, dim: int) -> None:
    create_table(database)
    load(database, random_rows(4000, dim))
    told = check(database, 0)["growth"]
    alembic(database, "upgrade", EXPAND)
    database.run(f"ALTER TABLE {TABLE} SET (autovacuum_enabled = off, toast.autovacuum_enabled = off)")
    database.run("CHECKPOINT")
    size = f"SELECT pg_total_relation_size('{TABLE}'), pg_current_wal_insert_lsn() - '0/0'"
    before, written = database.rows(size)[0]

    alembic(database, "upgrade", "om_20240107_backfill")

    after, until = database.rows(size)[0]
    assert told["table"] == pytest.approx(after - before, rel=0.35)
    # pages that are met for the first time after a checkpoint are in the WAL as a whole
    assert told["wal"] == pytest.approx(int(until - written), rel=0.6)


def test_growth_is_what_the_docs_say() -> None:
    text = (ROOT / "docs/scale.md").read_text().split("<!-- figures: growth -->")[1].split("\n\nThe largest run")[0]
    rows = re.findall(r"^\| ([\d,]+) \| (\w+) \| [\d,]+ \| ([\d,]+) \| [\d,]+ \| ([\d,]+) \|$", text, re.MULTILINE)
    documented: dict[str, list[tuple[int, ...]]] = {}
    for dimensions, engine, *figures in rows:
        documented.setdefault(engine, []).append(tuple(int(n.replace(",", "")) for n in (dimensions, *figures)))

    assert list(disk.MEASURED) == documented["client"]
    for others in documented.values():
        assert [figures for row in others for figures in row] == pytest.approx(
            [figures for row in disk.MEASURED for figures in row], rel=0.01
        )


def test_growth_between_and_beyond_what_was_measured() -> None:
    def table(dimensions: int) -> int:
        return disk.growth(dimensions, 1000).table

    assert table(256) == 2_381_000
    assert table(128) == 2_381_000 / 2
    assert table(320) == (2_381_000 + 3_327_000) / 2
    assert table(6144) == 2 * 13_965_000
    assert disk.growth(1536, 0) == disk.Growth(0, 0)


@pytest.mark.parametrize(
    ("server", "pgvector", "env", "found"),
    [
        (180_004, (0, 8, 7), {}, {}),
        (140_003, None, {}, {"postgresql-14-concurrently": "warning"}),
        (140_003, None, {"index": "none"}, {}),
        (140_004, None, {}, {}),
        (150_000, (0, 8, 6), {}, {"pgvector-cve-2026-103484": "warning"}),
        (150_000, (0, 8, 6), {"index": "hnsw"}, {"pgvector-cve-2026-103484": "notice"}),
        (
            150_000,
            (0, 8, 1),
            {"index": "hnsw"},
            {
                "pgvector-cve-2026-3172": "warning",
                "pgvector-hnsw-vacuum-corruption": "warning",
                "pgvector-hnsw-not-repaired": "warning",
                "pgvector-cve-2026-103484": "notice",
            },
        ),
        (
            150_000,
            (0, 5, 1),
            {},
            {
                "pgvector-no-iterative-scan": "notice",
                "pgvector-hnsw-vacuum-corruption": "notice",
                "pgvector-hnsw-not-repaired": "notice",
                "pgvector-cve-2026-103484": "warning",
            },
        ),
        (150_000, (0, 3, 0), {}, {"pgvector-ivfflat-inserts": "warning", "pgvector-no-iterative-scan": "notice"}),
    ],
)
def test_releases_with_a_fault(
    server: int, pgvector: tuple[int, ...] | None, env: Mapping[str, str], found: dict[str, str]
) -> None:
    told = {one.code: one.severity for one in faults(server, pgvector, Settings.load(env, NOTHING))}

    assert found.items() <= told.items()
    assert told.keys() - found.keys() <= {"pgvector-cve-2026-103484"}
