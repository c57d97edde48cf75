"""Whatever ends a backfill in its middle, the same command carries on, and ends as if nothing had happened."""

from __future__ import annotations

import pytest

from demo.openmemory import TABLE
from openmemory_migrations import embedded
from tests.support.cases import exhaustive
from tests.support.commands import alembic, result, start_alembic
from tests.support.engines import FILLS, by_each, only_client
from tests.support.interruption import (
    DATA,
    DIM,
    ROWS,
    SLOWLY,
    TO_HEAD,
    Ends,
    assert_carries_on,
    done,
    end,
    ends,
    filled,
    in_the_middle,
    kill,
    life_cycle,
    reported,
    table,
    wait_until_gone,
)
from tests.support.openmemory import Database, checksum, create_database, load, mismatches, random_rows
from tests.support.proxy import Verdict, proxy
from tests.support.servers import OPTIONS, programs
from tests.support.sessions import converted, eventually, terminate

__all__ = ["by_each", "ends", "table"]  # fixtures


def test_killed_in_the_middle(table: Database, ends: Ends) -> None:
    before = checksum(table)
    process = start_alembic(table, "upgrade", "head", env=SLOWLY)
    eventually(lambda: in_the_middle(table))
    kill(process)
    wait_until_gone(table)

    assert checksum(table) == before
    assert_carries_on(table, ends)
    assert checksum(table) == before
    life_cycle(table, ends)


@pytest.mark.slow
def test_what_is_written_between_a_kill_and_the_next_run_is_kept(table: Database) -> None:
    process = start_alembic(table, "upgrade", "head", env=SLOWLY)
    eventually(lambda: in_the_middle(table))
    kill(process)
    wait_until_gone(table)
    load(table, random_rows(100, DIM, seed=1))
    # some of them done, some not
    for old, new in zip(DATA[:: ROWS // 100], random_rows(100, DIM, seed=2), strict=True):
        table.run(f"UPDATE {TABLE} SET v = %s WHERE id = %s AND sector = %s", new.v, old.id, old.sector)
    before = checksum(table)

    alembic(table, "upgrade", "head")

    assert converted(table) == ROWS + 100
    assert mismatches(table) == []
    assert checksum(table) == before


@only_client  # which reads on one connection and writes on another
@pytest.mark.slow
@pytest.mark.parametrize("whose", [exhaustive("all"), "the writer's", exhaustive("the advisory locks'")])
def test_sessions_terminated_in_the_middle(table: Database, ends: Ends, whose: str) -> None:
    holders = "(SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted)"
    which = {"all": "", "the writer's": f"AND pid NOT IN {holders}", "the advisory locks'": f"AND pid IN {holders}"}
    process = start_alembic(table, "upgrade", "head", env=SLOWLY)
    eventually(lambda: in_the_middle(table))
    before = done(table)
    assert terminate(table, which[whose])

    ended = result(process)

    assert ended.returncode == 0, ended.log
    assert 0.2 * ROWS < len(before) < 0.8 * ROWS
    assert before <= done(table), "a row was converted twice"
    assert mismatches(table) == []
    assert end(table) == ends[TO_HEAD]
    wait_until_gone(table)
    life_cycle(table, ends)


@pytest.mark.slow
def test_the_network_fails_in_the_middle(server: embedded.Server, table: Database, ends: Ends) -> None:
    batches = 0

    def watch(statement: str) -> Verdict:
        nonlocal batches
        batch = statement.lstrip().startswith(("COPY pg_temp", *FILLS))
        batches += batch
        return "after" if batch and batches == 100 else None

    with proxy(server, watch) as between:
        ended = alembic(between.to(table), "upgrade", "head", env=SLOWLY)

    assert "connection was lost" in ended.log
    # some batches are smaller, where a part of the table ends
    assert 0 <= reported(ended.log) - (ROWS - 99 * 50) < 500
    assert end(table) == ends[TO_HEAD]
    life_cycle(table, ends)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["waits for it", "is killed", "gives up"])
def test_the_server_crashes_in_the_middle(ends: Ends, run: str) -> None:
    with embedded.temporary(bin=programs(), options=OPTIONS) as server:
        table = filled(create_database(server, "crash"))
        patch = "connections.RECONNECT_PAUSES = (1, 1)" if run == "gives up" else None
        process = start_alembic(table, "upgrade", "head", env=SLOWLY, patch=patch)
        eventually(lambda: in_the_middle(table))
        server.stop("immediate")
        if run == "is killed":
            kill(process)
        elif run == "gives up":
            ended = result(process)
            assert ended.returncode != 0
            assert "FAILED: " in ended.log
            assert "Traceback" not in ended.log
        server.start()

        if run == "waits for it":
            ended = result(process)
            assert ended.returncode == 0, ended.log
            assert 0.2 * ROWS < reported(ended.log) < 0.8 * ROWS
            assert end(table) == ends[TO_HEAD]
        else:
            assert_carries_on(table, ends)
        life_cycle(table, ends)
