"""A batch costs the same in a small table and in a large one: its plans, the pages that it touches, what it runs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
from sqlalchemy.engine import CursorResult

from demo.openmemory import TABLE
from openmemory_migrations import embedded
from openmemory_migrations.db.database import Database as PackageDatabase
from openmemory_migrations.sql import Fragment
from tests.support.commands import alembic
from tests.support.databases import Databases
from tests.support.engines import by_client
from tests.support.openmemory import (
    Database,
    create_table,
    load,
    mismatches,
    random_rows,
)
from tests.support.package import run_backfill
from tests.support.proxy import proxy
from tests.support.sessions import eventually, sessions
from tests.support.states import EXPAND

__all__ = ["by_client"]

DIM, BATCH = 8, 500
SMALL, LARGE, HUGE = 1_000, 20_000, 1_000_000
INDEXES = [
    "(id) WHERE v_vector IS NULL",
    "(octet_length(v))",
    "(octet_length(v)) WHERE v_vector IS NULL",
    "(dim, sector)",
]
EXPLAIN = "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) "
READ = ["Limit", f"Tid Range Scan on {TABLE}"]


class Explained(PackageDatabase):
    """The package's connections, which keep the plan of each read as it is really run, and count the writes."""

    reads: list[dict[str, Any]]  # of all connections together: one reads, another writes
    writes: list[int]  # bytes

    def copy_out(self, template: str, /, **names: Fragment) -> bytes | memoryview:
        self.reads.append(self._plan(super().run(EXPLAIN + template, **names)))
        return super().copy_out(template, **names)

    def copy_in(self, table: str, data: bytes) -> None:
        self.writes.append(len(data))
        super().copy_in(table, data)

    @staticmethod
    def _plan(explained: CursorResult[Any]) -> dict[str, Any]:
        (answer,) = explained.scalar_one()
        return dict(answer["Plan"])


def explained() -> type[Explained]:
    return type("Counting", (Explained,), {"reads": [], "writes": []})


def scans(database: Database) -> tuple[int, ...]:
    """How often the table was read from end to end, or by an index, in sessions that are over."""
    eventually(lambda: sessions(database) == 0)  # a session's figures come with its end
    columns = "seq_scan, idx_scan, heap_blks_hit + heap_blks_read"
    sql = (
        f"SELECT {columns} FROM pg_stat_user_tables JOIN pg_statio_user_tables USING (relid) WHERE relid = %s::regclass"
    )
    return database.rows(sql, TABLE)[0]


def shape(plan: Mapping[str, Any]) -> list[str]:
    """The plan's nodes from the top, with the tables that they read or change."""
    node = plan["Node Type"] + (f" on {plan['Relation Name']}" if "Relation Name" in plan else "")
    return [node, *(line for child in plan.get("Plans", ()) for line in shape(child))]


def pages(plan: Mapping[str, Any]) -> int:
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


def filled(database: Database, rows: int) -> Database:
    """The table with its column, and nothing that could analyze it behind our backs."""
    create_table(database)
    database.run(f"ALTER TABLE {TABLE} SET (autovacuum_enabled = off)")
    database.run(
        f"""
        INSERT INTO {TABLE} SELECT gen_random_uuid(), 'semantic', 'user' || i %% 20,
                                   decode(repeat(lpad(to_hex(i), 6, '0') || '3f', {DIM}), 'hex'), {DIM}
        FROM generate_series(1, %s) AS i
        """,
        rows,
    )
    alembic(database, "upgrade", EXPAND)
    return database


@pytest.mark.parametrize(
    "large", [LARGE, pytest.param(HUGE, marks=[pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.timeout(900)])]
)
@pytest.mark.parametrize("analyzed", [False, True], ids=["never analyzed", "analyzed"])
def test_every_batch_costs_what_it_costs_in_a_small_table(databases: Databases, large: int, analyzed: bool) -> None:
    found, blocks = {}, {}
    for rows in (SMALL, large):
        with databases.empty() as database:
            filled(database, rows)
            if analyzed:
                database.run(f"ANALYZE {TABLE}")
            before = scans(database)
            found[rows] = run_backfill(database, explained(), backfill_batch=BATCH)
            seq, by_index, pages_met = (b - a for a, b in zip(before, scans(database), strict=True))
            # before and after the batches the rows are counted, on a large table with two parallel workers; a plan that
            # scans or looks up would do so for each batch
            assert seq in (2, 4, 6)
            assert by_index == 0
            blocks[rows] = pages_met / rows
            assert mismatches(database) == []
    small, big = found[SMALL], found[large]

    assert len(small.writes) == SMALL // BATCH
    # a batch ends with the pages that a worker has claimed
    assert large // BATCH <= len(big.writes) <= 1.1 * large // BATCH + 32
    for db in (small, big):
        assert {tuple(shape(plan)) for plan in db.reads} == {tuple(READ)}
    # PostgreSQL 17 and newer reads ahead, up to 16 pages in one go
    assert max(map(pages, big.reads)) <= max(map(pages, small.reads)) + 16
    assert blocks[large] <= 1.5 * blocks[SMALL]


def test_no_index_of_the_operators_changes_a_plan(database: Database) -> None:
    """In any other order than the physical one the scan would pass over rows."""
    filled(database, 20_000)
    for number, index in enumerate(INDEXES):
        database.run(f"CREATE INDEX watched_{number} ON {TABLE} {index}")
    database.run(f"ANALYZE {TABLE}")
    before = scans(database)

    db = run_backfill(database, explained(), backfill_batch=BATCH)

    assert {tuple(shape(plan)) for plan in db.reads} == {tuple(READ)}
    # what is left may be counted by an index
    assert scans(database)[1] - before[1] <= 4
    assert len(db.writes) >= 20_000 // BATCH
    assert mismatches(database) == []


def test_between_the_first_batch_and_the_last_there_are_only_batches(
    server: embedded.Server, database: Database
) -> None:
    rows, batch = 2_000, 100
    create_table(database)
    load(database, random_rows(rows, DIM))
    alembic(database, "upgrade", EXPAND)
    with proxy(server) as between:
        alembic(between.to(database), "upgrade", "head", env={"BACKFILL_BATCH": str(batch)})

    # as one batch differs from the next only in numbers
    run = [" ".join(re.sub(r"\d+", "N", statement).split()) for statement in between.statements]
    writes = [i for i, statement in enumerate(run) if statement.startswith("COPY pg_temp")]
    assert len(writes) == rows // batch
    loop = Counter(run[writes[0] : writes[-1]])
    del loop["ROLLBACK"]  # the end of what reads ahead

    # what reads is up to three batches ahead of what writes
    assert min(loop.values()) >= rows // batch - 4, "a statement that isn't run once for each batch"
    assert loop["COMMIT"]
    assert sum(statement.startswith("COPY (") for statement in loop) == 1
    for statement in loop:
        assert not re.search(r"\boffset\b|\bcount\s*\(|\border by\b", statement, re.IGNORECASE)


def test_one_commit_for_each_batch(database: Database) -> None:
    create_table(database)
    load(database, random_rows(1_042, DIM))

    alembic(database, "upgrade", "head", env={"BACKFILL_BATCH": "100"})

    commits = database.rows(f"SELECT xmin::text, count(*) FROM {TABLE} WHERE v_vector IS NOT NULL GROUP BY 1")
    assert sorted(rows for _, rows in commits) == [42] + [100] * 10
