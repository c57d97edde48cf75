"""A batch costs the same in a small table and in a large one: its plans, the pages that it touches, what it runs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from sqlalchemy.engine import Connection, CursorResult

from demo.openmemory import TABLE
from openmemory_migrations import embedded
from openmemory_migrations.database import Database as PackageDatabase

from .helpers import (
    Database,
    alembic,
    create_database,
    create_table,
    drop_database,
    load,
    mismatches,
    random_rows,
)
from .online import run_backfill
from .proxy import proxy
from .states import EXPAND

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
WRITE = [f"ModifyTable on {TABLE}", "Nested Loop", "Seq Scan on openmemory_migrations_stage", f"Tid Scan on {TABLE}"]


class Explained(PackageDatabase):
    """The package's connection, which keeps the plan of each statement of a batch as the engine really runs it."""

    def __init__(self, connection: Connection, names: Mapping[str, str]) -> None:
        super().__init__(connection, names)
        self.reads: list[dict[str, Any]] = []
        self.writes: list[dict[str, Any]] = []

    def copy_out(self, template: str, /, **names: str) -> bytes | memoryview:
        self.reads.append(self._plan(super().run(EXPLAIN + template, **names)))
        return super().copy_out(template, **names)

    def run(self, template: str, parameters: Mapping[str, Any] | None = None, /, **names: str) -> CursorResult[Any]:
        if not template.lstrip().startswith("UPDATE"):
            return super().run(template, parameters, **names)
        result = super().run(EXPLAIN + template, parameters, **names)
        self.writes.append(self._plan(result))
        return result

    @staticmethod
    def _plan(explained: CursorResult[Any]) -> dict[str, Any]:
        (answer,) = explained.scalar_one()
        return dict(answer["Plan"])


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


@pytest.mark.parametrize("large", [LARGE, pytest.param(HUGE, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
@pytest.mark.parametrize("analyzed", [False, True], ids=["never analyzed", "analyzed"])
def test_every_batch_costs_what_it_costs_in_a_small_table(
    server: embedded.Server, names: Iterator[int], large: int, analyzed: bool
) -> None:
    found = {}
    for rows in (SMALL, large):
        database = filled(create_database(server, f"plans_{next(names)}"), rows)
        if analyzed:
            database.run(f"ANALYZE {TABLE}")
        found[rows] = run_backfill(database, Explained, backfill_batch=BATCH)
        assert mismatches(database) == []
        drop_database(server, database.name)
    small, big = found[SMALL], found[large]

    assert (len(small.writes), len(big.writes)) == (SMALL // BATCH, large // BATCH)
    for db in (small, big):
        assert {tuple(shape(plan)) for plan in db.reads} == {tuple(READ)}
        assert {tuple(shape(plan)) for plan in db.writes} == {tuple(WRITE)}
    most_read, most_written = (max(map(pages, plans)) for plans in (small.reads, small.writes))
    # PostgreSQL 17 and newer reads ahead, up to 16 pages in one go
    assert max(map(pages, big.reads)) <= most_read + 16
    # a deeper tree of the primary key
    assert max(map(pages, big.writes)) <= 3 * most_written


def test_no_index_of_the_operators_changes_a_plan(database: Database) -> None:
    """In any other order than the physical one the scan would pass over rows."""
    filled(database, 20_000)
    for number, index in enumerate(INDEXES):
        database.run(f"CREATE INDEX watched_{number} ON {TABLE} {index}")
    database.run(f"ANALYZE {TABLE}")

    db = run_backfill(database, Explained, backfill_batch=BATCH)

    assert {tuple(shape(plan)) for plan in db.reads} == {tuple(READ)}
    assert {tuple(shape(plan)) for plan in db.writes} == {tuple(WRITE)}
    assert len(db.writes) == 20_000 // BATCH
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
    updates = [i for i, statement in enumerate(run) if statement.startswith("UPDATE ONLY")]
    assert len(updates) == rows // batch
    loop = Counter(run[updates[0] : updates[-1]])

    assert set(loop.values()) == {rows // batch - 1}, "a statement that isn't run once for each batch"
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
