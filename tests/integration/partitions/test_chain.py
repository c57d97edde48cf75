"""Partitioned tables of any depth: converted leaf by leaf, followed by the trigger, and left as they were."""

from __future__ import annotations

import pytest

from demo.openmemory import TABLE
from tests.support.cases import exhaustive
from tests.support.commands import alembic, result, start_alembic
from tests.support.openmemory import Database, checksum, load, mismatches
from tests.support.partitions import (
    BAD,
    COLUMNS,
    DIM,
    ELSEWHERE,
    ENV,
    LEAVES,
    ODD,
    ROWS,
    SLOW,
    TREE,
    assert_followed,
    assert_indexed,
    assert_migrated,
    engines,
    leaves,
    tree,
)
from tests.support.sessions import converted, eventually
from tests.support.states import BACKFILL, HEAD, column_type, snapshot, stamp, without_extension
from tests.support.writers import remembered, v_of, writing, written

__all__ = ["tree"]  # a fixture

NAME = f'"public.{TABLE}"'
OWN = f"'[{','.join(['1e-45', '-0'] * (DIM // 2))}]'"


@engines
def test_a_tree_goes_up_down_and_up_again(tree: Database, engine: str) -> None:
    load(tree, BAD)
    before, v = without_extension(snapshot(tree)), checksum(tree)
    assert sorted(leaves(tree)) == sorted(LEAVES)

    log = alembic(tree, "upgrade", "head", env={**ENV, "OM_BACKFILL_ENGINE": engine}).stderr

    assert f"5 rows of {NAME} can't be converted and were skipped" in log
    assert "NaN or infinite values: 2 (" in log
    for row in BAD[:5]:
        assert f"(id={row.id}, sector={row.sector})" in log
    assert mismatches(tree) == []
    assert converted(tree) == len(ROWS)
    assert checksum(tree) == v
    assert_indexed(tree)
    assert_followed(tree)
    head = snapshot(tree)

    alembic(tree, "downgrade", "base")
    assert without_extension(snapshot(tree)) == before
    alembic(tree, "upgrade", "head", env={**ENV, "OM_BACKFILL_ENGINE": engine})
    assert snapshot(tree) == head


@pytest.mark.parametrize("engine", ["client", pytest.param("server", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "by",
    [
        pytest.param("HASH (id)", id="hash", marks=pytest.mark.slow),
        pytest.param("RANGE (sector, id)", id="range"),
    ],
)
def test_trees_by_hash_and_by_range(database: Database, by: str, engine: str) -> None:
    database.run(f"CREATE TABLE {TABLE} ({COLUMNS}, PRIMARY KEY (id, sector)) PARTITION BY {by}")
    if by.startswith("HASH"):
        for n in range(3):
            database.run(f"CREATE TABLE part{n} PARTITION OF {TABLE} FOR VALUES WITH (MODULUS 3, REMAINDER {n})")
    else:
        bounds = ["MINVALUE, MINVALUE", "'f', MINVALUE", "'s', MINVALUE", "MAXVALUE, MAXVALUE"]
        for n in range(3):
            database.run(
                f"CREATE TABLE part{n} PARTITION OF {TABLE} FOR VALUES FROM ({bounds[n]}) TO ({bounds[n + 1]})"
            )
    load(database, ROWS)
    before = without_extension(snapshot(database))

    alembic(database, "upgrade", "head", env={"OM_BACKFILL_ENGINE": engine})

    assert_migrated(database)
    alembic(database, "downgrade", "base")
    assert without_extension(snapshot(database)) == before


@pytest.mark.slow
def test_a_table_without_primary_key_is_converted_by_the_client(database: Database) -> None:
    database.run(f"CREATE TABLE {TABLE} ({COLUMNS}) PARTITION BY HASH (id)")
    for n in range(3):
        database.run(f"CREATE TABLE part{n} PARTITION OF {TABLE} FOR VALUES WITH (MODULUS 3, REMAINDER {n})")
    load(database, [*ROWS, *ROWS[:10]])
    load(database, BAD[:1])

    log = alembic(database, "upgrade", "head", env=ENV).stderr

    assert "1 rows of " + NAME in log
    assert mismatches(database) == []
    assert converted(database) == len(ROWS) + 10
    assert_indexed(database)


LATE = f"CREATE TABLE late PARTITION OF {TABLE} FOR VALUES IN ('late')"
INSERT_LATE = """
INSERT INTO {} (id, sector, user_id, v, dim) SELECT gen_random_uuid(), 'late', 'late', v, dim FROM semantic LIMIT 100
"""
MEANWHILE = {
    "created": f"{LATE}; {INSERT_LATE.format(TABLE)}",
    "attached with rows": f"CREATE TABLE late (LIKE {TABLE}); {INSERT_LATE.format('late')};"
    f"ALTER TABLE {TABLE} ATTACH PARTITION late FOR VALUES IN ('late')",
    "dropped": "DROP TABLE {}",
    "detached": f"ALTER TABLE {TABLE} DETACH PARTITION {{}}",
    "detached and renamed": f"ALTER TABLE {TABLE} DETACH PARTITION {{0}}; ALTER TABLE {{0}} RENAME TO away",
    "truncated": "TRUNCATE {}",
    "rewritten": "CLUSTER {} USING semantic_pkey",
    "moved": f"ALTER TABLE {{}} SET SCHEMA {ELSEWHERE}",
}


@pytest.mark.parametrize(
    ("what", "engine"),
    [
        ("dropped", "client"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("created", "server"),
                ("attached with rows", "client"),
                ("dropped", "server"),
                ("detached", "server"),
                ("detached and renamed", "client"),
                ("truncated", "server"),
                ("rewritten", "client"),
                ("moved", "server"),
            ]
        ),
        *(
            pytest.param(*case, marks=[pytest.mark.slow, pytest.mark.exhaustive])
            for case in [
                ("created", "client"),
                ("attached with rows", "server"),
                ("detached", "client"),
                ("detached and renamed", "server"),
                ("truncated", "client"),
                ("rewritten", "server"),
                ("moved", "client"),
            ]
        ),
    ],
)
def test_what_happens_to_a_partition_during_the_backfill_does_not_fail_it(
    database: Database, what: str, engine: str
) -> None:
    # the order of the backfill: what is changed comes last
    database.run(TREE.replace(f"{ELSEWHERE}.semantic ", f"{ELSEWHERE}.other "))
    load(database, ROWS)
    process = start_alembic(database, "upgrade", "head", env={**SLOW, "OM_BACKFILL_ENGINE": engine})
    eventually(lambda: converted(database) > 200)
    assert converted(database) < len(ROWS) * 0.5

    database.run(MEANWHILE[what].format("semantic"))
    assert converted(database) < len(ROWS) * 0.9

    ended = result(process)
    assert ended.returncode == 0, ended.log
    assert_migrated(database)
    if engine == "client" and what in ("dropped", "detached and renamed"):
        assert 'NOTICE:  backfill openmemory_vectors: partition "public.semantic" is gone' in ended.log
    if what not in ("created", "attached with rows"):
        assert_followed(database)
    alembic(database, "downgrade", "base")
    assert column_type(database) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "leaf",
    [
        *(ODD, "procedural_rest", f"{ELSEWHERE}.deepest"),
        *map(exhaustive, ["nothing", "procedural_low", "semantic", f"{ELSEWHERE}.semantic"]),
    ],
)
def test_any_leaf_may_be_dropped_at_any_moment(tree: Database, leaf: str) -> None:
    process = start_alembic(tree, "upgrade", "head", env=SLOW)
    eventually(lambda: converted(tree) > 300 * (1 + LEAVES.index(leaf)))

    tree.run(f"DROP TABLE {leaf}")

    ended = result(process)
    assert ended.returncode == 0, ended.log
    assert_migrated(tree)


@pytest.mark.slow
def test_partitions_made_between_the_steps_and_after_them_are_as_the_others(tree: Database) -> None:
    alembic(tree, "upgrade", BACKFILL)
    tree.run(f"{LATE}; {INSERT_LATE.format(TABLE)}")
    alembic(tree, "upgrade", "head")
    assert_migrated(tree)

    tree.run(f"CREATE TABLE later PARTITION OF {TABLE} FOR VALUES IN ('later')")
    tree.run(INSERT_LATE.format(TABLE).replace("'late'", "'later'"))

    assert tree.value("SELECT count(v_vector) FROM later") == 100
    assert_migrated(tree)
    alembic(tree, "downgrade", "base")
    assert column_type(tree, table="later") is None
    state = snapshot(tree)
    assert state["triggers"] == state["functions"] == []
    assert "vvector" not in repr(state["indexes"]) + repr(state["relations"])


@pytest.mark.slow
@pytest.mark.parametrize("engine", [exhaustive("client"), "server"])
def test_up_down_and_up_again_while_the_application_writes(tree: Database, engine: str) -> None:
    env = {**ENV, "BACKFILL_BATCH": "100", "OM_BACKFILL_ENGINE": engine}
    meanwhile = []

    with writing(tree, ROWS) as writers:
        for command in [("upgrade", "head"), ("downgrade", "base"), ("upgrade", "head")]:
            before = written(writers)
            alembic(tree, *command, env=env, timeout=90)
            meanwhile.append(written(writers) - before)

    assert min(meanwhile) > 100
    assert stamp(tree) == [HEAD]
    assert mismatches(tree) == []
    assert v_of(tree) == remembered(writers)
    assert_indexed(tree)


@pytest.mark.parametrize("engine", ["client", pytest.param("server", marks=pytest.mark.slow)])
def test_values_without_source_are_carried_over_in_all_leaves(tree: Database, engine: str) -> None:
    tree.run("CREATE EXTENSION vector")
    tree.run(f"ALTER TABLE {TABLE} ADD v_vector vector")
    tree.run(f"UPDATE {TABLE} SET v_vector = '[1,2,3]' WHERE user_id = 'user1'")
    sectors = ["episodic", "semantic", "procedural", "emotional", "nothing"]
    for sector in sectors:
        tree.run(
            f"INSERT INTO {TABLE} (id, sector, user_id, dim, v_vector)"
            f" SELECT gen_random_uuid(), '{sector}', 'own', {DIM}, {OWN} FROM generate_series(1, 20)"
        )
    own = f"SELECT id, tableoid, vector_send(v_vector)::text FROM {TABLE} WHERE user_id = 'own' ORDER BY id"
    before, v = tree.rows(own), checksum(tree)
    assert len({place for _, place, _ in before}) == len(LEAVES)

    log = alembic(tree, "upgrade", "head", env={"OM_BACKFILL_ENGINE": engine}).stderr

    assert 'NOTICE:  100 values without source in "v" carried over' in log
    assert tree.rows(own) == before
    assert len(mismatches(tree)) == 100
    assert checksum(tree) == v
    assert column_type(tree, "v_vector_adopted") is column_type(tree, "v_vector_adopted", "semantic") is None
    assert_indexed(tree)
