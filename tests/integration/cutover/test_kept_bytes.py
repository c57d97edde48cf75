"""Bytes that no vector can hold: kept beside the table, exactly, and put back where nothing has taken their place."""

from __future__ import annotations

from contextlib import closing

import pytest

from demo.openmemory import TABLE
from openmemory_migrations.cutover.forward import LEFT_INDEX
from openmemory_migrations.cutover.kept import LEFT
from tests.support.commands import result, start_alembic
from tests.support.cutover import (
    BAD,
    DIM,
    LOSS,
    STAMP,
    UP,
    Values,
    both_modes,
    bytes_of,
    changed,
    cut_over,
    stamped,
    table,
    text_of,
    undo,
    vectors_of,
    whole,
)
from tests.support.interruption import holding, waits_for_a_lock
from tests.support.openmemory import Database, expected, load, mismatches, pack, random_rows
from tests.support.sessions import eventually

__all__ = ["table"]  # a fixture

pytestmark = pytest.mark.slow  # many processes: .ci/run has the time

KEPT = f"{TABLE}_v_kept"


def kept(database: Database) -> Values:
    return bytes_of(database, "openmemory_bytes", KEPT)


@both_modes
def test_bytes_are_kept_and_come_back_where_nothing_has_taken_their_place(table: Database, mode: str) -> None:
    load(table, BAD)
    (new,) = random_rows(1, DIM, seed=9)
    before = bytes_of(table)
    updated, replaced, deleted = (f"id = '{row.id}'" for row in BAD[:3])
    vector = "v" if mode == "swap" else "v_vector"

    cut_over(table, mode, {"OM_ACCEPT_LOSS": str(LOSS)})

    assert kept(table) == {(row.id, row.sector): row.v for row in BAD[:LOSS]}
    assert vectors_of(table, vector) == {key: expected(v, DIM) for key, v in before.items()}
    table.run(f"UPDATE {TABLE} SET user_id = 'new' WHERE {updated}")
    table.run(f"UPDATE {TABLE} SET {vector} = %s WHERE {replaced}", text_of(new.v or b""))
    table.run(f"DELETE FROM {TABLE} WHERE {deleted}")
    log = undo(table).log

    if mode == "drop":
        assert f'2 rows of "public.{TABLE}" have the bytes again that no vector can hold' in log
    now = before | {(BAD[1].id, BAD[1].sector): new.v}
    del now[BAD[2].id, BAD[2].sector]
    assert bytes_of(table) == now
    assert mismatches(table) == []
    assert table.value("SELECT to_regclass(%s)", KEPT) is None


@pytest.mark.parametrize("accepted", [None, "1"])
def test_bad_bytes_that_come_just_before_the_switch_are_refused_unless_they_are_accepted(
    table: Database, accepted: str | None
) -> None:
    bad, good = random_rows(2, DIM, seed=11)
    bad = bad._replace(v=pack([float("nan")] * DIM))
    before = bytes_of(table)
    env = {"OM_CUTOVER": "drop"} | ({"OM_ACCEPT_LOSS": accepted} if accepted else {})
    with holding(table, "ACCESS SHARE"):
        process = start_alembic(table, *UP, env=env)
        eventually(lambda: waits_for_a_lock(table, "LOCK TABLE"))
        load(table, [bad, good])
        written = whole(table)
    ended = result(process)

    if accepted == "1":
        assert ended.returncode == 0, ended.log
        assert stamped(table) == [STAMP]
        assert kept(table) == {(bad.id, bad.sector): bad.v}
        undo(table)
    else:
        assert ended.returncode != 0, ended.log
        assert f'1 rows of "public.{TABLE}" have bytes that no vector can hold' in ended.log
        assert stamped(table) is None
        # as if it had never been tried: written holds the index of the time until the switch
        assert set(changed(written, whole(table))) <= {"relations", "indexes"}
        assert table.value("SELECT count(*) FROM pg_class WHERE relname ~ 'left|kept|cutover'") == 0
    assert bytes_of(table) == before | {(row.id, row.sector): row.v for row in (bad, good)}
    assert mismatches(table) == []


def test_a_vector_that_is_missing_just_before_the_switch_is_refused(table: Database) -> None:
    with holding(table, "ACCESS SHARE"):
        process = start_alembic(table, *UP, env={"OM_CUTOVER": "drop"})
        eventually(lambda: waits_for_a_lock(table, "LOCK TABLE"))
        table.run(f"UPDATE {TABLE} SET v_vector = NULL WHERE ctid = (SELECT min(ctid) FROM {TABLE})")
    ended = result(process)
    assert ended.returncode != 0, ended.log
    assert f'1 rows of "public.{TABLE}" have bytes that no vector can hold' in ended.log
    assert stamped(table) is None


@pytest.mark.parametrize("required", [False, True])
def test_what_is_left_is_found_by_its_index_in_the_switch(table: Database, required: bool) -> None:
    names = {"source": "v", "vector": "v_vector", "table": TABLE, "index": "of_left"}
    if required:
        table.run(f"ALTER TABLE {TABLE} ALTER v SET NOT NULL")
    else:
        load(table, BAD)
    table.run(LEFT_INDEX.format_map(names))
    count = f"EXPLAIN SELECT count(*) FROM {TABLE} WHERE {LEFT}".format_map(names)
    with closing(table.connect()) as connection, connection.cursor() as cursor:
        cursor.execute("SET enable_seqscan = off")
        cursor.execute(count)
        assert "of_left" in str(cursor.fetchall())
