"""Several workers and several runs on one partitioned table: nothing twice, nothing missed, whichever leaf it is in."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy.engine import CursorResult

from demo.openmemory import TABLE
from openmemory_migrations.backfill import reader
from openmemory_migrations.db import catalog
from openmemory_migrations.db.context import Context
from openmemory_migrations.db.database import Database as PackageDatabase
from openmemory_migrations.settings import Settings
from openmemory_migrations.sql import Fragment
from openmemory_migrations.steps import backfill
from tests.support.commands import alembic
from tests.support.engines import FILLS
from tests.support.openmemory import Database, checksum, mismatches
from tests.support.package import TARGET, package
from tests.support.partitions import LEAVES, ROWS, engines, tree
from tests.support.sessions import converted
from tests.support.states import EXPAND

pytestmark = pytest.mark.slow  # many processes: .ci/run has the time

__all__ = ["tree"]  # a fixture

BATCH = 25


class Counting(PackageDatabase):
    """The package's connections; `written` counts the batches of each server process that writes."""

    written: Counter[int]

    def copy_in(self, table: str, data: bytes) -> None:
        self.written[self.driver.pid] += 1
        super().copy_in(table, data)

    def run(
        self, template: str, parameters: Mapping[str, Any] | None = None, /, **names: Fragment
    ) -> CursorResult[Any]:
        self.written[self.driver.pid] += template.lstrip().startswith(FILLS)
        return super().run(template, parameters, **names)


def counting() -> type[Counting]:
    return type("Counted", (Counting,), {"written": Counter()})


def convert(database: Database, engine: str, runs: int = 1, workers: int = 1) -> list[Counter[int]]:
    """Run the package's own backfill, several at once if wanted; returns the batches of each."""
    makes = [counting() for _ in range(runs)]
    settings = Settings.load({"backfill_engine": engine, "backfill_batch": BATCH, "backfill_workers": workers}, {})

    def run(make: type[Counting]) -> None:
        with package(database, make) as db:
            with db.transaction():
                table, extension = catalog.table(db, "public", TABLE), catalog.extension(db)
            assert table
            assert extension
            backfill.run(Context(db, TARGET, settings).with_table(table).with_extension(extension))

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
    units = math.ceil(tree.value(pages) / reader.UNIT) + len(LEAVES)

    written = convert(tree, engine, runs, workers)

    assert all(written), "one run has done it all"
    assert len(sum(written, Counter())) > 1, "one worker has done it all"
    if engine == "client":  # the pages of the other end where another worker's begin, so there may be more of them
        assert len(ROWS) // BATCH <= sum(written, Counter()).total() <= len(ROWS) // BATCH + units
    assert tree.rows("SELECT count(*), count(DISTINCT (id, sector)) FROM converted") == [(len(ROWS), len(ROWS))]
    assert mismatches(tree) == []
    assert checksum(tree) == v
    assert converted(tree) == len(ROWS)
