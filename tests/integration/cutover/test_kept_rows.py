"""Rows that no vector can hold, and that come when the cutover has taken the others out already."""

from __future__ import annotations

from contextlib import closing

import pytest

from demo.openmemory import TABLE
from openmemory_migrations.cutover.kept import FEW, LEFT
from openmemory_migrations.cutover.preparations import LEFT_INDEX
from tests.support.commands import result, start_alembic
from tests.support.cutover import (
    BAD,
    DIM,
    STAMP,
    UP,
    bytes_of,
    changed,
    stamped,
    table,
    undo,
    whole,
)
from tests.support.interruption import holding, waits_for_a_lock
from tests.support.openmemory import Database, load, mismatches, pack, random_rows
from tests.support.sessions import eventually
from tests.support.states import guards

__all__ = ["table"]  # a fixture

pytestmark = pytest.mark.slow  # many processes: .ci/run has the time

KEPT = f"{TABLE}_v_kept"


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
        assert bytes_of(table, "v", KEPT) == {(bad.id, bad.sector): bad.v}
        assert table.value(f"SELECT count(*) FROM {TABLE} WHERE v_vector IS NULL") == 0
        undo(table)
    else:
        assert ended.returncode != 0, ended.log
        assert f'1 rows of "public.{TABLE}" have bytes that no vector can hold' in ended.log
        assert stamped(table) is None
        # as if it had never been tried: written holds what is there for the time until the switch
        assert set(changed(written, whole(table))) <= {"relations", "indexes", "triggers", "functions"}
        assert guards(table) == []
        assert table.value("SELECT count(*) FROM pg_class WHERE relname ~ 'left|kept|cutover'") == 0
    assert bytes_of(table) == before | {(row.id, row.sector): row.v for row in (bad, good)}
    assert mismatches(table) == []


@pytest.mark.parametrize("required", [False, True])
def test_what_is_left_is_found_by_its_index_in_the_switch(table: Database, required: bool) -> None:
    names = {"source": "v", "vector": "v_vector", "table": TABLE, "index": "of_left"}
    if required:
        table.run(f"ALTER TABLE {TABLE} ALTER v SET NOT NULL")
    else:
        load(table, BAD)
    table.run(LEFT_INDEX.format_map(names))
    count = f"EXPLAIN SELECT count(*) FROM (SELECT FROM {TABLE} WHERE {LEFT} LIMIT {FEW}) AS l".format_map(names)
    with closing(table.connect()) as connection, connection.cursor() as cursor:
        cursor.execute("SET enable_seqscan = off")
        cursor.execute(count)
        assert "of_left" in str(cursor.fetchall())
