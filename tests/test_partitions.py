"""Partitioned tables of any depth: converted leaf by leaf, followed by the trigger, and left as they were."""

from __future__ import annotations

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy.engine import CursorResult

from demo.openmemory import TABLE
from openmemory_migrations import backfill, catalog, reading
from openmemory_migrations.database import Database as PackageDatabase
from openmemory_migrations.settings import Settings

from .helpers import Database, alembic, checksum, load, mismatches, random_rows, start_alembic
from .interruption import result
from .online import TARGET, converted, package, wait_until
from .partitioned import (
    BAD,
    COLUMNS,
    DIM,
    ELSEWHERE,
    ENV,
    LEAVES,
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
from .states import BACKFILL, EXPAND, HEAD, column_type, snapshot, stamp, without_extension
from .test_writers import remembered, v_of, written
from .writers import writing

__all__ = ["tree"]  # a fixture

BATCH = 25
NAME = f'"public.{TABLE}"'
OWN = f"'[{','.join(['1e-45', '-0'] * (DIM // 2))}]'"


@engines
def test_a_tree_goes_up_down_and_up_again(tree: Database, engine: str) -> None:
    load(tree, BAD)
    before, v = without_extension(snapshot(tree)), checksum(tree)
    assert sorted(leaves(tree)) == sorted(LEAVES)

    for _ in range(2):
        log = alembic(tree, "upgrade", "head", env={**ENV, "OM_BACKFILL_ENGINE": engine}).stderr

        assert "5 rows of " + NAME + " can't be converted and were skipped" in log
        assert "NaN or infinite values: 2 (" in log
        for row in BAD[:5]:
            assert f"(id={row.id}, sector={row.sector})" in log
        assert mismatches(tree) == []
        assert converted(tree) == len(ROWS)
        assert checksum(tree) == v
        assert_indexed(tree)
        assert_followed(tree)

        alembic(tree, "downgrade", "base")
        assert without_extension(snapshot(tree)) == before
        assert checksum(tree) == v


@engines
@pytest.mark.parametrize(
    "by",
    [
        pytest.param("HASH (id)", id="hash"),
        pytest.param("RANGE (sector, id)", id="range", marks=pytest.mark.slow),
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
            database.run(f"CREATE TABLE part{n} PARTITION OF {TABLE} FOR VALUES FROM ({bounds[n]}) TO ({bounds[n + 1]})")
    load(database, ROWS)
    before = without_extension(snapshot(database))

    alembic(database, "upgrade", "head", env={"OM_BACKFILL_ENGINE": engine})

    assert_migrated(database)
    alembic(database, "downgrade", "base")
    assert without_extension(snapshot(database)) == before


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
INSERT_LATE = f"""
INSERT INTO {{}} (id, sector, user_id, v, dim) SELECT gen_random_uuid(), 'late', 'late', v, dim FROM semantic LIMIT 100
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


@engines
@pytest.mark.parametrize(
    "what",
    [
        *("created", "dropped"),
        *(pytest.param(what, marks=pytest.mark.slow) for what in MEANWHILE if what not in ("created", "dropped")),
    ],
)
def test_what_happens_to_a_partition_during_the_backfill_does_not_fail_it(
    database: Database, what: str, engine: str
) -> None:
    # the order of the backfill: what is changed comes last
    database.run(TREE.replace(f"{ELSEWHERE}.semantic ", f"{ELSEWHERE}.other "))
    load(database, ROWS)
    process = start_alembic(database, "upgrade", "head", env={**SLOW, "OM_BACKFILL_ENGINE": engine})
    wait_until(lambda: converted(database) > 200)
    assert converted(database) < len(ROWS) * 0.5

    database.run(MEANWHILE[what].format("semantic"))
    assert converted(database) < len(ROWS) * 0.9

    ended = result(process)
    assert ended.returncode == 0, ended.log
    assert_migrated(database)
    if engine == "client" and what in ("dropped", "detached and renamed"):
        assert 'NOTICE:  backfill openmemory_vectors: partition "public.semantic" is gone' in ended.log
    assert_followed(database) if what not in ("created", "attached with rows", "moved") else None
    alembic(database, "downgrade", "base")
    assert column_type(database) is None


@pytest.mark.slow
@pytest.mark.parametrize("leaf", LEAVES)
def test_any_leaf_may_be_dropped_at_any_moment(tree: Database, leaf: str) -> None:
    process = start_alembic(tree, "upgrade", "head", env=SLOW)
    wait_until(lambda: converted(tree) > 300 * (1 + LEAVES.index(leaf)))

    tree.run(f"DROP TABLE {leaf}")

    ended = result(process)
    assert ended.returncode == 0, ended.log
    assert_migrated(tree)


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
@engines
def test_up_down_and_up_again_while_the_application_writes(tree: Database, engine: str) -> None:
    env = {**ENV, "BACKFILL_BATCH": "100", "OM_BACKFILL_ENGINE": engine}
    meanwhile = []

    with writing(tree, ROWS) as writers:
        for command in [("upgrade", "head"), ("downgrade", "base"), ("upgrade", "head")]:
            before = written(writers)
            alembic(tree, *command, env=env, timeout=280)
            meanwhile.append(written(writers) - before)

    assert min(meanwhile) > 100
    assert stamp(tree) == [HEAD]
    assert mismatches(tree) == []
    assert v_of(tree) == remembered(writers)
    assert_indexed(tree)


@engines
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


class Counting(PackageDatabase):
    """The package's connections; `written` counts the batches of each server process that writes."""

    written: Counter[int]

    def copy_in(self, table: str, data: bytes) -> None:
        self.written[self.driver.pid] += 1
        super().copy_in(table, data)

    def run(self, template: str, *args: Any, **names: str) -> CursorResult[Any]:
        self.written[self.driver.pid] += template.startswith("UPDATE {table}")
        return super().run(template, *args, **names)


def convert(database: Database, engine: str, runs: int = 1, workers: int = 1) -> list[Counter[int]]:
    """Run the package's own backfill, several at once if wanted; returns the batches of each."""
    makes = [type("Counted", (Counting,), {"written": Counter()}) for _ in range(runs)]
    settings = Settings.load({"backfill_engine": engine, "backfill_batch": BATCH, "backfill_workers": workers}, {})

    def run(make: type[Counting]) -> None:
        with package(database, make) as db:
            with db.transaction():
                table, extension = catalog.table(db, "public", TABLE), catalog.extension(db)
            assert table
            assert extension
            backfill.run(db, TARGET, settings, table, extension)

    with ThreadPoolExecutor() as pool:
        list(pool.map(run, makes))
    return [make.written for make in makes]


@engines
@pytest.mark.parametrize(("runs", "workers"), [(2, 1), (1, 3)], ids=["two runs", "three workers"])
def test_the_leaves_are_shared_and_every_row_is_converted_once(
    tree: Database, engine: str, runs: int, workers: int
) -> None:
    alembic(tree, "upgrade", EXPAND)
    v = checksum(tree)
    tree.run(
        "CREATE TABLE converted (id uuid, sector text);"
        "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN INSERT INTO converted VALUES (NEW.id, NEW.sector); RETURN NULL; END';"
        f"CREATE TRIGGER note AFTER UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION note()"
    )
    pages = f"SELECT sum(pg_relation_size(relid)) / 8192 FROM pg_partition_tree('{TABLE}')"
    units = math.ceil(tree.value(pages) / reading.UNIT) + len(LEAVES)

    written = convert(tree, engine, runs, workers)

    assert all(written), "one run has done it all"
    assert len(sum(written, Counter())) > 1, "one worker has done it all"
    if engine == "client":  # the pages of the other end where another worker's begin, so there may be more of them
        assert len(ROWS) // BATCH <= sum(written, Counter()).total() <= len(ROWS) // BATCH + units
    assert tree.rows("SELECT count(*), count(DISTINCT (id, sector)) FROM converted") == [(len(ROWS), len(ROWS))]
    assert mismatches(tree) == []
    assert checksum(tree) == v
    assert converted(tree) == len(ROWS)
