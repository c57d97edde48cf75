"""A partitioned table is cut over as one, whatever is below it."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from demo.openmemory import TABLE
from tests.support.commands import alembic, result, start_alembic
from tests.support.cutover import (
    DOWN,
    UP,
    both_modes,
    bytes_of,
    changed,
    cut_over,
    refuses,
    text_of,
    undo,
    vectors_of,
    whole,
)
from tests.support.interruption import holding, waits_for_a_lock
from tests.support.native import NEWER
from tests.support.openmemory import Database, expected, load, random_rows
from tests.support.partitions import BAD, DIM, ENV, assert_followed, tree, vector_indexes
from tests.support.sessions import eventually
from tests.support.states import EXPAND, column_type

__all__ = ["tree"]  # a fixture

pytestmark = pytest.mark.slow  # many processes: .ci/run has the time

ACCEPTED = {**ENV, "OM_ACCEPT_LOSS": str(sum(row.v is not None for row in BAD))}
FILES = "SELECT oid::regclass::text, pg_relation_filenode(oid) FROM pg_class WHERE relkind = 'r' AND relname !~ '^pg_'"


@both_modes
def test_a_tree_is_cut_over_and_back(tree: Database, mode: str) -> None:
    load(tree, BAD)
    tree.run(f"GRANT SELECT (v) ON {TABLE} TO PUBLIC; GRANT UPDATE (v) ON procedural_low TO PUBLIC")
    alembic(tree, "upgrade", "head", env=ENV)
    before, v, files = whole(tree), bytes_of(tree), dict(tree.rows(FILES))
    sync = f"{TABLE}_vvector_sync"
    tree.run(f"ALTER TABLE procedural_low DISABLE TRIGGER {sync}")
    refuses(tree, f'trigger "{sync}" of "public.{TABLE}" is missing or disabled', mode=mode, env=ACCEPTED)
    tree.run(f"ALTER TABLE procedural_low ENABLE TRIGGER {sync}")

    cut_over(tree, mode, ACCEPTED)

    vector = "v" if mode == "swap" else "v_vector"
    of_bad = {(row.id, row.sector) for row in BAD if row.v is not None}
    assert vectors_of(tree, vector) == {key: expected(value, DIM) for key, value in v.items() if key not in of_bad}
    now = dict(tree.rows(FILES))
    assert {name: now[name] for name in files} == files
    # newer OpenMemory's index is beside our own, on every part
    each = {len(found) for found in vector_indexes(tree).values()}
    assert each == ({2} if mode == "swap" else {1})
    assert all(valid for found in vector_indexes(tree).values() for valid, *_ in found)
    assert not tree.rows("SELECT relname FROM pg_class WHERE relname ~ 'left'")
    undo(tree)
    assert bytes_of(tree) == v
    assert not changed(before, whole(tree))
    assert_followed(tree)


@pytest.mark.parametrize("step", ["cutover", "undoing", "newer"])
def test_a_partition_that_is_attached_with_rows_just_before_the_switch_is_not_passed_over(
    database: Database, step: str
) -> None:
    env = {"OM_VEC_DIM": "8", "OM_INDEX": "none", "OM_CUTOVER": "drop"}
    row, late = random_rows(2, 8)
    assert row.v is not None
    assert late.v is not None
    database.run("CREATE EXTENSION vector;" + NEWER.replace("v vector", "v vector" if step == "newer" else "v bytea"))
    database.run(
        f"CREATE TABLE one (LIKE {TABLE} INCLUDING ALL); DROP TABLE {TABLE};"
        f"CREATE TABLE {TABLE} (LIKE one INCLUDING ALL) PARTITION BY LIST (sector);"
        f"ALTER TABLE {TABLE} ATTACH PARTITION one FOR VALUES IN ('{row.sector}')"
    )
    load(database, [row._replace(v=text_of(row.v) if step == "newer" else row.v)])  # type: ignore[arg-type]
    alembic(database, "upgrade", EXPAND if step == "newer" else "head", env=env)
    if step == "undoing":
        cut_over(database, "drop", env)
    column = "v_vector" if step == "undoing" else "v"
    v = late.v if step == "cutover" else text_of(late.v)
    command = {"cutover": UP, "undoing": DOWN, "newer": ("upgrade", "head")}[step]
    with ExitStack() as held:
        if step != "undoing":
            held.enter_context(holding(database, "ACCESS SHARE"))
        process = start_alembic(database, *command, env={**env, "OM_BACKFILL_PAUSE_MS": "2000"})
        if step == "undoing":  # whose first change needs a lock as well
            eventually(lambda: column_type(database, "v_bytea"))
            eventually(lambda: database.value(f"SELECT count(v_bytea) FROM {TABLE}"))
            held.enter_context(holding(database, "ACCESS SHARE"))
        eventually(lambda: waits_for_a_lock(database, "LOCK TABLE"))
        database.run(f"CREATE TABLE late (LIKE {TABLE} INCLUDING ALL)")
        insert = f"INSERT INTO late (id, sector, dim, {column}) VALUES (%s, %s, 8, %s)"
        database.run(insert, late.id, late.sector, v)
        if step == "cutover":  # another vector than its bytes
            database.run("UPDATE late SET v_vector = '[1,2,3,4,5,6,7,8]'")
        database.run(f"ALTER TABLE {TABLE} ATTACH PARTITION late FOR VALUES IN ('{late.sector}')")
    ended = result(process)

    assert f'"public"."{TABLE}" was changed since its rows were looked at; looking again' in ended.log
    assert (ended.returncode == 0) == (step != "cutover"), ended.log
    if step != "newer":
        assert bytes_of(database) == {(one.id, one.sector): one.v for one in (row, late)}
    if step == "cutover":
        assert "1 rows of" in ended.log
        assert "are not right" in ended.log
    else:
        values = vectors_of(database, "v" if step == "newer" else "v_vector")
        assert values == {(one.id, one.sector): expected(one.v) for one in (row, late)}


def test_what_a_partition_has_of_its_own_is_named_before_any_change(tree: Database) -> None:
    tree.run("ALTER TABLE semantic ALTER v SET NOT NULL; ALTER TABLE nothing ALTER v SET DEFAULT '\\x01'")
    alembic(tree, "upgrade", "head", env=ENV)
    # after a swap the first would refuse every row that newer OpenMemory writes
    refuses(
        tree, "NOT NULL of column v of table public.semantic; the default of column v of table public.nothing", env=ENV
    )


def test_privileges_on_a_v_of_a_partition_s_own_go_over(database: Database) -> None:
    row, *_ = random_rows(1, 8)
    database.run("CREATE EXTENSION vector;" + NEWER)
    database.run(
        f"CREATE TABLE one (LIKE {TABLE} INCLUDING ALL); DROP TABLE {TABLE};"
        f"CREATE TABLE {TABLE} (LIKE one INCLUDING ALL) PARTITION BY LIST (sector);"
        f"ALTER TABLE {TABLE} ATTACH PARTITION one DEFAULT; GRANT SELECT (v) ON one TO PUBLIC"
    )
    load(database, [row._replace(v=text_of(row.v or b""))])  # type: ignore[arg-type]
    before = whole(database)["columns"]
    env = {"OM_VEC_DIM": "8", "OM_INDEX": "none"}
    alembic(database, "upgrade", "head", env=env)
    alembic(database, "downgrade", "base", env=env)
    assert whole(database)["columns"] == before


@both_modes
def test_what_vectors_of_a_partition_have_of_their_own_stays(tree: Database, mode: str) -> None:
    alembic(tree, "upgrade", "head", env=ENV)
    zeros = f"[{','.join('0' * DIM)}]"
    tree.run("DELETE FROM procedural_low WHERE v_vector IS NULL")
    tree.run(f"ALTER TABLE procedural_low ALTER v_vector SET NOT NULL, ALTER v_vector SET DEFAULT '{zeros}'")
    before = whole(tree)

    cut_over(tree, mode, ENV)

    column = "v" if mode == "swap" else "v_vector"
    there = (
        "SELECT is_nullable, column_default FROM information_schema.columns WHERE table_name = %s AND column_name = %s"
    )
    assert tree.rows(there, "procedural_low", column) == [("NO", f"'{zeros}'::vector")]
    undo(tree, ENV)
    assert not changed(before, whole(tree))
