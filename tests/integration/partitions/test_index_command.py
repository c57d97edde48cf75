"""`openmemory-migrations index` on a partitioned table: all its indexes change at once, and searches go on."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from demo.openmemory import TABLE
from openmemory_migrations import embedded
from tests.support.commands import alembic, om, start_om
from tests.support.databases import Databases
from tests.support.index_builds import HNSW, always_searchable, index
from tests.support.interruption import FIRST, killed
from tests.support.openmemory import Database, load, mismatches, random_rows
from tests.support.partitions import DIM, ROWS, assert_indexed, assert_migrated, filled, leaves, options, vector_indexes
from tests.support.proxy import Verdict, proxy
from tests.support.sessions import sessions
from tests.support.states import BACKFILL, INDEX
from tests.support.writers import writing

AS_HNSW = {"m=16,ef_construction=64"}
POINTS = 5


def at_head(database: Database) -> None:
    filled(database)
    alembic(database, "upgrade", "head")


@pytest.fixture
def indexed(databases: Databases) -> Iterator[Database]:
    """At the head, with an ivfflat index on every leaf."""
    with databases.copy(at_head) as database:
        yield database


@pytest.fixture(scope="module")
def numbers(server: embedded.Server, databases: Databases) -> range:
    """Those of the statements that an undisturbed run sends after it has its lock."""
    with databases.copy(at_head) as database, proxy(server) as between:
        assert om(between.to(database), "index", env=HNSW).returncode == 0
    first = next(i for i, text in enumerate(between.statements, 1) if FIRST in text)
    return range(first, len(between.statements) - 1)  # its last few vary


def vector_names(database: Database) -> set[str]:
    """The names of all vector indexes, whatever table they are on."""
    sql = "SELECT c.relname FROM pg_class c JOIN pg_am a ON a.oid = relam WHERE amname IN ('ivfflat', 'hnsw')"
    return {name for (name,) in database.rows(sql)}


def assert_ends_as(database: Database, wanted: set[str]) -> None:
    assert_migrated(database)
    assert set(options(database).values()) == wanted
    assert not [name for name in vector_names(database) if name.endswith(("_new", "_old"))]


@pytest.mark.slow
def test_every_leaf_goes_from_one_index_to_another(indexed: Database) -> None:
    before = vector_names(indexed)
    with always_searchable(indexed):
        log = index(indexed, env=HNSW).stderr
    assert_ends_as(indexed, AS_HNSW)
    assert vector_names(indexed) == before
    assert f'index "{INDEX}" is not as wanted: it is ivfflat' in log

    assert "exists already and is as wanted" in index(indexed, env=HNSW).stderr


@pytest.mark.slow
def test_back_none_and_anew(indexed: Database) -> None:
    before = options(indexed)
    index(indexed, env=HNSW)
    with always_searchable(indexed):
        index(indexed)
        assert options(indexed) == before
        index(indexed, "--rebuild")
    assert_migrated(indexed)
    assert options(indexed) == before

    index(indexed, env={"OM_INDEX": "none"})
    assert vector_names(indexed) == set()
    index(indexed, "-x", "index_lists=4")
    assert_ends_as(indexed, {"lists=4"})
    alembic(indexed, "downgrade", BACKFILL)
    assert vector_names(indexed) == set()


@pytest.mark.slow
def test_a_leaf_that_its_rows_have_outgrown(indexed: Database) -> None:
    load(indexed, [row._replace(sector="nothing") for row in random_rows(3_000, DIM, seed=5)])

    log = index(indexed).stderr

    assert "has lists = 1, its rows ask for 3 now" in log
    assert_migrated(indexed)
    assert options(indexed)["nothing"] == "lists=3"
    assert "exists already and is as wanted" in index(indexed).stderr


@pytest.mark.slow
def test_writers_go_on(indexed: Database) -> None:
    rows = ROWS[:500]
    with writing(indexed, rows) as threads:
        index(indexed, env=HNSW)
        index(indexed, "-x", "index_lists=2")
    assert max(thread.longest_wait for thread in threads) < 10
    assert_indexed(indexed)
    assert set(options(indexed).values()) == {"lists=2"}
    assert mismatches(indexed) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["semantic_vvector_idx_new", "semantic_vvector_idx_old"])
def test_a_name_that_is_taken_on_a_leaf_is_said_before_anything_is_built(indexed: Database, name: str) -> None:
    indexed.run(f"CREATE TABLE {name} ()")
    before = vector_indexes(indexed)

    done = index(indexed, "--quiet", env=HNSW, code=1)

    assert f'ERROR:  no index: the name "{name}" is taken by something that is no index' in done.stderr
    assert vector_indexes(indexed) == before


@pytest.mark.slow
def test_too_little_memory_for_a_leaf_is_an_error_that_says_so(indexed: Database) -> None:
    before = options(indexed)

    done = index(indexed, "--quiet", "-x", "index_memory=1MB", "-x", "index_lists=3000", code=1)

    assert "of memory even for one list, and gets 1 MB" in done.stderr
    valid = {part: [one for one in these if one[0]] for part, these in vector_indexes(indexed).items()}
    assert {part: one[2] for part, (one,) in valid.items()} == before
    index(indexed, env=HNSW)
    assert_ends_as(indexed, AS_HNSW)


@pytest.mark.slow
def test_an_incomplete_index_is_completed_in_its_place(indexed: Database) -> None:
    alembic(indexed, "downgrade", BACKFILL)
    indexed.run("CREATE TABLE semantic_vvector_idx ()")
    alembic(indexed, "upgrade", "head")
    indexed.run("DROP TABLE semantic_vvector_idx")
    (kept,) = indexed.rows("SELECT to_regclass('nothing_vvector_idx')::oid")
    assert om(indexed, "status").returncode == 1

    index(indexed)

    assert_migrated(indexed)
    assert indexed.rows("SELECT to_regclass('nothing_vvector_idx')::oid") == [kept]
    assert om(indexed, "status").returncode == 0


SEMANTIC = '"semantic_vvector_idx_new" ON'
LATE = f"CREATE TABLE late PARTITION OF {TABLE} FOR VALUES IN ('late')"
DETACH = f"ALTER TABLE {TABLE} DETACH PARTITION semantic"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "moment"),
    [
        pytest.param(LATE, " ON ONLY ", id="created before the parents'"),
        pytest.param(LATE, "CREATE INDEX CONCURRENTLY", id="created between the parents' and a leaf's"),
        pytest.param(LATE, "IN SHARE UPDATE EXCLUSIVE MODE", id="created before the renaming"),
        pytest.param(LATE, "DROP INDEX", id="created before the drop"),
        pytest.param("DROP TABLE semantic", SEMANTIC, id="dropped just before its index is built"),
        pytest.param("DROP TABLE semantic", "IN SHARE UPDATE EXCLUSIVE MODE", id="dropped before the renaming"),
        pytest.param("DROP TABLE semantic", "DROP INDEX", id="dropped before the drop"),
        pytest.param(DETACH, SEMANTIC, id="detached just before its index is built"),
        pytest.param(DETACH, "IN SHARE UPDATE EXCLUSIVE MODE", id="detached before the renaming"),
        pytest.param(DETACH, "DROP INDEX", id="detached before the drop"),
    ],
)
def test_what_happens_to_a_partition_meanwhile_does_not_fail_it(
    server: embedded.Server, indexed: Database, change: str, moment: str
) -> None:
    done = False

    def watch(statement: str) -> Verdict:
        nonlocal done
        if not done and moment in statement:
            done = True
            indexed.run(f"SET lock_timeout = '5s'; {change}")
        return None

    with proxy(server, watch) as between:
        log = om(between.to(indexed), "index", env=HNSW)

    assert done
    assert log.returncode == 0, log.log
    if change == DETACH:
        left = {name for name in vector_names(indexed) if name.startswith("semantic_vvector_idx")}
        assert left == {"semantic_vvector_idx"}
        indexed.run("DROP TABLE semantic")
    assert_ends_as(indexed, AS_HNSW)
    assert len(leaves(indexed)) == (8 if change == LATE else 6)
    # the next one has an index of each name to come by
    index(indexed)
    assert_migrated(indexed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("statement", "verdict"),
    [
        (SEMANTIC, "before"),
        (SEMANTIC, "after"),
        ("ATTACH PARTITION", "after"),
        ("RENAME TO", "before"),
        ("DROP INDEX", "before"),
        ("DROP INDEX", "after"),
    ],
)
def test_killed_at_a_statement(server: embedded.Server, indexed: Database, statement: str, verdict: Verdict) -> None:
    killed(server, indexed, ("index",), lambda _, text: verdict if statement in text else None, HNSW, start_om)
    assert_carries_on(indexed)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("point", range(POINTS))
def test_killed_at_a_random_point(server: embedded.Server, indexed: Database, numbers: range, point: int) -> None:
    chosen = random.Random(f"tree {point}")
    number = numbers[int((point + chosen.random()) / POINTS * len(numbers))]
    verdict: Verdict = chosen.choice(["before", "after"])
    print(f"killed {verdict} statement {number} of {numbers}")

    killed(server, indexed, ("index",), lambda seen, _: verdict if seen == number else None, HNSW, start_om)

    assert_carries_on(indexed)


def assert_carries_on(database: Database) -> None:
    """Old or new, one is valid on the whole tree; the same command once more ends it, and leaves nothing else."""
    valid = database.value("SELECT indisvalid FROM pg_index WHERE indexrelid = %s::regclass", INDEX)
    assert valid
    with always_searchable(database):
        index(database, env=HNSW)
    assert_ends_as(database, AS_HNSW)
    assert sessions(database) == 0
