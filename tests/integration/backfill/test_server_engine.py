"""Converted inside the database: the same end as on the client to the bit, whoever shares the work, for any key."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import pytest
from psycopg2.sql import SQL, Identifier

from demo.openmemory import TABLE
from openmemory_migrations import embedded, ops
from openmemory_migrations.backfill import walk
from openmemory_migrations.db.database import Database as PackageDatabase
from openmemory_migrations.errors import MigrationError
from openmemory_migrations.settings import Settings
from openmemory_migrations.sql import Fragment
from tests.support.bad_rows import BAD, BAD_COUNT, CONFIGURED, with_v
from tests.support.commands import alembic
from tests.support.databases import Databases
from tests.support.openmemory import (
    Database,
    checksum,
    create_table,
    load,
    mismatches,
    pack,
    random_rows,
    real_rows,
)
from tests.support.package import run_backfill
from tests.support.proxy import Proxy, proxy
from tests.support.roles import other, owner
from tests.support.server_engine import OFF, SERVER
from tests.support.sessions import all_at_once, converted
from tests.support.states import BACKFILL, EXPAND, refused, snapshot, stamp, without_extension
from tests.support.sync_trigger import ODD

__all__ = ["other", "owner"]  # fixtures

ROWS, DIM, BATCH = 1_500, 16, 50
Both = Callable[..., dict[str, "End"]]


class Counting(PackageDatabase):
    """The package's connections; `written` counts the rows that each server process has updated and kept."""

    written: Counter[int]

    def rows(self, template: str, parameters: Mapping[str, Any] | None = None, /, **names: Fragment) -> Sequence[Any]:
        found = super().rows(template, parameters, **names)
        if template == walk.BLOCKS.fill_all:
            self.written[self.driver.pid] += found[0][0]
        return found


def counting() -> type[Counting]:
    return type("Counted", (Counting,), {"written": Counter()})


class End:
    """What an engine has left in a database."""

    def __init__(self, database: Database, log: str) -> None:
        self.database = database
        self.vectors = database.rows(f"SELECT id, sector, vector_send(v_vector)::text FROM {TABLE} ORDER BY id, sector")
        self.skipped = re.findall(r"^(?:WARNING:|DETAIL:)  (?!Autovacuum).*", log, re.MULTILINE)
        self.v, self.places = checksum(database), places(database)


def places(database: Database) -> set[tuple[Any, ...]]:
    """Where the rows without a vector are, and which transactions have written them."""
    return set(database.rows(f"SELECT id, sector, ctid::text, xmin::text FROM {TABLE} WHERE v_vector IS NULL"))


@pytest.fixture
def both(databases: Databases, database: Database) -> Iterator[Both]:
    """Runs the upgrade with either engine, each on a copy of the database, and gives both ends."""
    with ExitStack() as copies:

        def run(**env: str) -> dict[str, End]:
            ends = {}
            for engine in ("client", "server", "native"):
                there = copies.enter_context(databases.copy_of(database))
                settings = {"OM_BACKFILL_ENGINE": engine, **env}
                ends[engine] = End(there, alembic(there, "upgrade", BACKFILL, env=settings).stderr)
            return ends

        yield run


def assert_same(ends: Mapping[str, End], v: str, before: set[tuple[Any, ...]]) -> End:
    client, server = ends["client"], ends["server"]
    for end in ends.values():
        assert end.vectors == client.vectors
        assert end.skipped == client.skipped
        assert end.v == v
        assert end.places <= before, "a row that can't be converted was touched"
    return server


@pytest.mark.parametrize("dim", [256, pytest.param(1536, marks=pytest.mark.slow)])
def test_real_rows_become_the_same_bits_with_either_engine(database: Database, both: Both, dim: int) -> None:
    create_table(database)
    load(database, [*real_rows(dim), *random_rows(40, dim), *with_v(ODD * (dim // 8), 1, 5)])
    alembic(database, "upgrade", EXPAND)

    end = assert_same(both(BACKFILL_BATCH="100"), checksum(database), places(database))

    assert end.skipped == []
    assert end.places == set()
    assert mismatches(end.database) == []


def test_bad_rows_are_skipped_for_the_same_reasons_with_either_engine_and_never_touched(
    database: Database, both: Both
) -> None:
    bad = [with_v(value, 1, 10 * i + j)[0] for i, values in enumerate(BAD.values()) for j, value in enumerate(values)]
    good = random_rows(60, 8)
    create_table(database)
    # so many at once that some batches have nothing else, and the examples are some of many
    more = with_v(pack([float("nan")] * 8), 12, 1000)
    load(database, [*good[:30], *bad, *good[30:], *more, *with_v(None, 2, 99)])
    alembic(database, "upgrade", EXPAND, env=CONFIGURED)
    before = places(database)

    end = assert_same(both(BACKFILL_BATCH="7", **CONFIGURED), checksum(database), before)

    assert len(end.skipped) == 2
    assert end.skipped[0].startswith(f"WARNING:  {BAD_COUNT + 12} rows")
    assert "NaN or infinite values: 19 (such as (id=" in end.skipped[1]
    assert len(end.places) == BAD_COUNT + 12 + 2
    assert mismatches(end.database, dim=8) == []


@pytest.mark.slow
def test_a_column_without_dimensions_takes_rows_of_any(database: Database, both: Both) -> None:
    create_table(database)
    alembic(database, "upgrade", EXPAND, env=OFF)
    nan = pack([1.0, float("nan"), 2.0])
    sizes = [row for dim in (1, 3, 8, 300) for row in random_rows(30, dim)]
    load(database, [*sizes, *random_rows(2, 16_000), *with_v(nan, 3, 1), *with_v(b"abc", 2, 2), *with_v(b"", 1, 3)])

    end = assert_same(both(BACKFILL_BATCH="7", **OFF), checksum(database), places(database))

    assert "NaN or infinite values: 3 (" in end.skipped[-1]
    assert converted(end.database) == 122
    assert mismatches(end.database) == []


@pytest.mark.slow
def test_without_the_trigger_nothing_stays_of_the_function_that_converts(database: Database) -> None:
    create_table(database)
    load(database, random_rows(60, 8))
    before = without_extension(snapshot(database))
    alembic(database, "upgrade", "head", env=OFF | SERVER)

    assert database.rows("SELECT proname FROM pg_proc WHERE proname LIKE 'openmemory%'") == []
    assert mismatches(database) == []
    alembic(database, "downgrade", "base", env=OFF)
    assert without_extension(snapshot(database)) == before


@pytest.fixture
def table(database: Database) -> Database:
    create_table(database)
    database.run(f"ALTER TABLE {TABLE} SET (fillfactor = 10)")  # many pages, which runs share
    load(database, random_rows(ROWS, DIM))
    alembic(database, "upgrade", EXPAND, env=OFF)
    return database


@pytest.mark.parametrize("runs", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_runs_started_together_share_the_table_and_the_function_and_do_nothing_twice(
    table: Database, runs: int
) -> None:
    makes = [counting() for _ in range(runs)]
    start = threading.Barrier(runs)

    def run(make: type[Counting]) -> None:
        start.wait()
        run_backfill(table, make, backfill_engine="server", backfill_batch=BATCH, backfill_pause_ms=20)

    all_at_once([partial(run, make) for make in makes])

    assert all(make.written.total() for make in makes), "one of them has had no part"
    assert sum(make.written.total() for make in makes) == ROWS
    assert mismatches(table) == []


@pytest.mark.parametrize("workers", [3])
def test_workers_of_one_run_share_the_table(table: Database, workers: int) -> None:
    db = run_backfill(
        table,
        counting(),
        backfill_engine="server",
        backfill_batch=BATCH,
        backfill_workers=workers,
        backfill_pause_ms=60,
    )

    assert len(db.written) == workers
    assert db.written.total() == ROWS
    assert mismatches(table) == []


def test_it_needs_no_right_on_the_schema(database: Database, owner: Database) -> None:
    database.run("CREATE EXTENSION vector")
    alembic(owner, "upgrade", EXPAND, env=OFF)
    role = Identifier(owner.value("SELECT current_user"))
    database.run(SQL("REVOKE CREATE ON SCHEMA public FROM PUBLIC, {}").format(role))
    database.run(SQL("REVOKE TEMPORARY ON DATABASE {} FROM PUBLIC").format(Identifier(database.name)))
    refused(database, "may not create temporary tables", "GRANT TEMPORARY ON DATABASE", env=OFF | SERVER, by=owner)

    database.run(SQL("GRANT TEMPORARY ON DATABASE {} TO {}").format(Identifier(database.name), role))
    alembic(owner, "upgrade", BACKFILL, env=OFF | SERVER)
    assert mismatches(database) == []


def test_it_needs_no_primary_key(database: Database) -> None:
    create_table(database)
    load(database, random_rows(60, 8))
    database.run(f"ALTER TABLE {TABLE} DROP CONSTRAINT {TABLE}_pkey")
    alembic(database, "upgrade", "head", env=SERVER)
    assert mismatches(database) == []


@pytest.mark.slow
def test_values_do_not_travel(server: embedded.Server, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place and a flag for each row come, where the client's engine would read all the bytes."""
    received: Counter[str] = Counter()
    forward = Proxy._back

    def back(self: Proxy, client: Any, real: Any) -> None:
        class Counted:
            def __getattr__(self, name: str) -> Any:
                return getattr(real, name)

            def recv(self, size: int) -> bytes:
                data: bytes = real.recv(size)
                received["bytes"] += len(data)
                return data

        forward(self, client, cast(Any, Counted()))  # for a socket, all that is asked of it

    monkeypatch.setattr(Proxy, "_back", back)
    create_table(database)
    load(database, [*random_rows(300, 1536), *with_v(pack([float("nan")] * 1536), 20, 1)])
    alembic(database, "upgrade", EXPAND)
    with proxy(server) as between:
        alembic(between.to(database), "upgrade", BACKFILL, env=SERVER | {"BACKFILL_BATCH": "50"})

    assert not [statement for statement in between.statements if "COPY" in statement]
    assert max(map(len, between.statements)) < 4 * 1536
    assert received["bytes"] < 60_000 < 300 * 1536 * 4 / 10
    assert mismatches(database) == []


def test_the_option_of_ops_and_its_values() -> None:
    assert ops.configured({})[0].backfill_engine is None
    assert ops.configured({"engine": "server"})[0].backfill_engine == "server"
    with pytest.raises(MigrationError) as raised:
        ops.configured({"engine": "python"})
    assert 'invalid value "python" for OM_BACKFILL_ENGINE' in str(raised.value)
    assert Settings.load({}, SERVER).backfill_engine == "server"


def test_an_invalid_value_is_an_error_before_any_change(database: Database) -> None:
    create_table(database)

    refused(
        database,
        'invalid value "gpu" for OM_BACKFILL_ENGINE',
        "client, native or server",
        env={"OM_BACKFILL_ENGINE": "gpu"},
    )

    assert stamp(database) is None
