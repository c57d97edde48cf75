"""The vector index of a partitioned table: one for each leaf by its own rows, and whole whatever happens meanwhile."""

from __future__ import annotations

import re
from contextlib import closing

import pytest

from demo.openmemory import TABLE
from openmemory_migrations import embedded
from tests.support.commands import alembic
from tests.support.openmemory import Database, load, mismatches, random_rows
from tests.support.partitions import (
    DIM,
    ELSEWHERE,
    ODD,
    ROWS,
    TREE,
    assert_indexed,
    assert_migrated,
    leaves,
    options,
    parents,
    tree,
    vector_indexes,
)
from tests.support.proxy import Verdict, proxy
from tests.support.states import BACKFILL, INDEX, SECOND_INDEX, nearest

__all__ = ["tree"]  # a fixture

LISTS = re.compile(r"lists=(\d+)")


def found(database: Database) -> int:
    """Count the rows that a search over all indexes finds, with what probes the server has by default."""
    with closing(database.connect()) as connection, connection.cursor() as cursor:
        cursor.execute("SET enable_seqscan = off; SET enable_sort = off")
        cursor.execute(f"SELECT id FROM {TABLE} {nearest(DIM)}")
        return len(cursor.fetchall())


def test_each_leaf_has_lists_by_its_own_rows_and_small_ones_lose_nothing(database: Database) -> None:
    database.run(TREE)
    sizes = {"episodic": 3_100, "semantic": 40, "procedural": 3, "emotional": 4_000}
    sectors = [sector for sector, size in sizes.items() for _ in range(size)]
    rows = [row._replace(sector=sector) for row, sector in zip(random_rows(len(sectors), DIM), sectors, strict=True)]
    load(database, rows)

    log = alembic(database, "upgrade", "head").stderr

    assert_migrated(database)
    half = {part: options(database).pop(part) for part in (f"{ELSEWHERE}.semantic", f"{ELSEWHERE}.deepest")}
    assert set(half.values()) <= {"lists=1", "lists=2"}
    assert options(database) == half | {ODD: "lists=3"} | {
        part: "lists=1" for part in parents(database) if part not in half and part != ODD
    }
    # of the lists of the largest leaf, as many as find enough
    assert set(re.findall(r"SET ivfflat\.probes = (\d+)", log)) <= {"2", "3"}
    # one probe reads one list: nothing is lost where there is one only
    database.run(f"DELETE FROM {TABLE} WHERE sector IN ('episodic', 'emotional')")
    assert found(database) == 43
    # and a leaf that was empty
    load(database, [row._replace(sector="nothing") for row in random_rows(30, DIM, seed=3)])
    assert found(database) == 73


@pytest.mark.parametrize(
    ("env", "wanted"),
    [
        pytest.param({"OM_INDEX_LISTS": "5"}, "lists=5", id="lists"),
        pytest.param(
            {"OM_INDEX": "hnsw", "OM_INDEX_M": "8"}, "m=8,ef_construction=64", id="hnsw", marks=pytest.mark.slow
        ),
    ],
)
def test_what_is_configured_holds_for_every_table_of_the_tree(tree: Database, env: dict[str, str], wanted: str) -> None:
    alembic(tree, "upgrade", "head", env=env)

    assert_migrated(tree)
    assert set(options(tree).values()) == {wanted}
    alembic(tree, "upgrade", "head", env=env)
    alembic(tree, "downgrade", BACKFILL)
    assert set(map(len, vector_indexes(tree).values())) == {0}


@pytest.mark.parametrize(
    ("rows", "env", "reason"),
    [(3_000, {"OM_INDEX": "none"}, "OM_INDEX is none"), (49, {}, "ivfflat needs 50 rows to learn from, there are 49")],
)
def test_where_there_is_no_index_the_log_says_why(
    database: Database, rows: int, env: dict[str, str], reason: str
) -> None:
    database.run(TREE)
    load(database, ROWS[:rows])

    log = alembic(database, "upgrade", "head", env=env).stderr

    assert f'NOTICE:  no index on "v_vector" of "public.{TABLE}": {reason}' in log
    assert set(map(len, vector_indexes(database).values())) == {0}
    assert mismatches(database) == []


@pytest.mark.parametrize(
    "made",
    [
        pytest.param([INDEX], id="first", marks=pytest.mark.slow),
        pytest.param([SECOND_INDEX], id="second", marks=pytest.mark.slow),
        pytest.param([INDEX, SECOND_INDEX], id="both", marks=pytest.mark.slow),
    ],
)
def test_an_index_made_by_hand_on_the_parent_is_adopted_and_a_duplicate_dropped(
    tree: Database, made: list[str]
) -> None:
    alembic(tree, "upgrade", BACKFILL)
    for name in made:
        tree.run(f"CREATE INDEX {name} ON {TABLE} USING ivfflat (v_vector vector_l2_ops) WITH (lists = 1)")

    log = alembic(tree, "upgrade", "head").stderr

    assert_migrated(tree)
    if SECOND_INDEX in made:
        assert f'NOTICE:  index "{SECOND_INDEX}" is a duplicate of "{INDEX}"; dropping it' in log
    alembic(tree, "downgrade", BACKFILL)
    assert set(map(len, vector_indexes(tree).values())) == {0}


@pytest.mark.slow
def test_an_index_made_by_hand_on_a_leaf_is_attached(tree: Database) -> None:
    alembic(tree, "upgrade", BACKFILL)
    tree.run("CREATE INDEX semantic_vvector_idx ON semantic USING ivfflat (v_vector vector_l2_ops) WITH (lists = 7)")

    log = alembic(tree, "upgrade", "head").stderr

    assert 'index "semantic_vvector_idx" exists already and is as wanted' in log
    assert_migrated(tree)
    assert options(tree)["semantic"] == "lists=7"


@pytest.mark.slow
def test_something_else_under_the_name_of_a_leafs_index_leaves_it_incomplete_and_says_so(tree: Database) -> None:
    alembic(tree, "upgrade", BACKFILL)
    tree.run("CREATE TABLE semantic_vvector_idx (); CREATE TABLE procedural_low_vvector_idx ()")

    log = alembic(tree, "upgrade", "head").stderr

    assert 'the name "semantic_vvector_idx" is taken by something that is no index' in log
    said = f'index "{INDEX}" on "public.{TABLE}" is not complete: 2 of its tables have none, such as "public.'
    assert said in log
    built = {part for part, found in vector_indexes(tree).items() if found}
    assert set(leaves(tree)) - built == {"semantic", "procedural_low"}, "all others have theirs"
    # and mended as the hint says
    tree.run("DROP TABLE semantic_vvector_idx; DROP TABLE procedural_low_vvector_idx")
    alembic(tree, "downgrade", BACKFILL)
    assert set(map(len, vector_indexes(tree).values())) == {0}
    alembic(tree, "upgrade", "head")
    assert_migrated(tree)


SEMANTIC = '"semantic_vvector_idx" ON'
LATE = f"CREATE TABLE late PARTITION OF {TABLE} FOR VALUES IN ('late')"
FULL = (
    f"CREATE TABLE late (LIKE {TABLE}); INSERT INTO late SELECT gen_random_uuid(), 'late', 'late', v, dim, v_vector"
    f" FROM semantic; ALTER TABLE {TABLE} ATTACH PARTITION late FOR VALUES IN ('late')"
)


@pytest.mark.parametrize(
    ("change", "moment"),
    [
        pytest.param(
            LATE, "CREATE INDEX CONCURRENTLY", id="created between the parents' and a leaf's", marks=pytest.mark.slow
        ),
        pytest.param("DROP TABLE semantic", "CREATE INDEX CONCURRENTLY", id="dropped before its index is built"),
        *(
            pytest.param(change, moment, id=what, marks=pytest.mark.slow)
            for change, moment, what in [
                (FULL, "LOCK TABLE ONLY ", "attached with rows"),
                (LATE, "LOCK TABLE ONLY ", "created before the first is attached"),
                (LATE, " ON ONLY ", "created before the parents'"),
                ("DROP TABLE semantic", " ON ONLY ", "dropped before the parents'"),
                ("DROP TABLE semantic", SEMANTIC, "dropped just before its index is built"),
                ("DROP TABLE semantic", f"{SEMANTIC} then LOCK TABLE ONLY ", "dropped before it is attached"),
                (f"ALTER TABLE {TABLE} DETACH PARTITION semantic", " ON ONLY ", "detached before the parents'"),
                (
                    f"ALTER TABLE {TABLE} DETACH PARTITION semantic",
                    SEMANTIC,
                    "detached just before its index is built",
                ),
                (
                    f"ALTER TABLE {TABLE} DETACH PARTITION semantic",
                    f"{SEMANTIC} then LOCK TABLE ONLY ",
                    "detached before it is attached",
                ),
            ]
        ),
    ],
)
def test_what_happens_to_a_partition_during_the_build_does_not_fail_it(
    server: embedded.Server, tree: Database, change: str, moment: str
) -> None:
    alembic(tree, "upgrade", BACKFILL)
    waiting = moment.split(" then ")

    def watch(statement: str) -> Verdict:
        if waiting and waiting[0] in statement:
            waiting.pop(0)
            if waiting:
                return None
            tree.run(f"SET lock_timeout = '5s'; {change}")
        return None

    with proxy(server, watch) as between:
        log = alembic(between.to(tree), "upgrade", "head").stderr

    assert not waiting
    if "DETACH" in change:
        tree.run("DROP TABLE semantic")
    assert_migrated(tree)
    assert "is valid on all" in log
    assert_indexed(tree)
    assert len(leaves(tree)) == (8 if "late" in change else 6)
    alembic(tree, "downgrade", BACKFILL)
    assert set(map(len, vector_indexes(tree).values())) == {0}


@pytest.mark.slow
@pytest.mark.parametrize("env", [{"OM_INDEX": "hnsw"}, {"OM_INDEX_LISTS": "2"}, {}])
def test_a_tree_without_partitions_is_migrated_too(database: Database, env: dict[str, str]) -> None:
    database.run(
        f"CREATE TABLE {TABLE} (id uuid, sector text, user_id text, v bytea, dim integer NOT NULL,"
        " PRIMARY KEY (id, sector)) PARTITION BY LIST (sector)"
    )
    alembic(database, "upgrade", "head", env={"OM_VEC_DIM": str(DIM), **env})
    database.run(f"CREATE TABLE later PARTITION OF {TABLE} FOR VALUES IN ('semantic', 'episodic')")
    load(database, [row for row in random_rows(50, DIM) if row.sector in ("semantic", "episodic")])

    assert mismatches(database) == []
    alembic(database, "downgrade", "base", env={"OM_VEC_DIM": str(DIM)})
