"""Up, down and up again while the application writes at full speed: nothing lost, nothing stale, nobody refused."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping

import pytest

from tests.support.cases import exhaustive
from tests.support.commands import alembic, start_alembic
from tests.support.engines import by_each
from tests.support.openmemory import Database, create_table, load, mismatches, random_rows
from tests.support.sessions import converted, eventually
from tests.support.states import HEAD, follows, indexes, stamp
from tests.support.writers import remembered, v_of, writing, written

__all__ = ["by_each"]

DIM = 64


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "env"),
    [
        (10_000, {"BACKFILL_BATCH": "200"}),
        exhaustive(2_000, {"BACKFILL_BATCH": "1", "OM_INDEX": "none"}),
        exhaustive(2_000, {"OM_INDEX": "hnsw"}),
        exhaustive(10_000, {"OM_INDEX": "hnsw"}),
        exhaustive(100_000, {}),
    ],
    ids=["small batches", "single rows", "hnsw", "hnsw, more rows", "many rows"],
)
def test_up_down_and_up_again_while_the_application_writes(
    database: Database, rows: int, env: Mapping[str, str], record_property: Callable[[str, object], None]
) -> None:
    create_table(database)
    data = random_rows(rows, DIM)
    load(database, data)
    env = {"OM_VEC_DIM": str(DIM)} | dict(env)
    meanwhile = []

    with writing(database, data) as writers:
        for command in [("upgrade", "head"), ("downgrade", "base"), ("upgrade", "head")]:
            before = written(writers)
            alembic(database, *command, env=env, timeout=280)
            meanwhile.append(written(writers) - before)

    longest = max(writer.longest_wait for writer in writers)
    record_property("longest_wait_ms", round(longest * 1000))
    print(f"longest wait of {written(writers):,} writes ({meanwhile} during the runs): {longest * 1000:,.0f} ms")
    assert min(meanwhile) > 100
    assert stamp(database) == [HEAD]
    assert mismatches(database, dim=DIM) == []
    assert v_of(database) == remembered(writers)
    assert all(valid for _, valid in indexes(database).values())
    assert len(indexes(database)) == (env.get("OM_INDEX") != "none")
    assert follows(database, DIM)


def killed_at(database: Database, rows: float) -> bool:
    """Run the upgrade until so many rows have their vector, and kill it; False if it had ended before."""
    process = start_alembic(database, "upgrade", "head", env={"BACKFILL_BATCH": "20", "OM_VEC_DIM": str(DIM)})
    eventually(lambda: process.poll() is not None or converted(database) > rows)
    process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_killed_again_and_again_while_the_application_writes(database: Database) -> None:
    create_table(database)
    data = random_rows(10_000, DIM)
    load(database, data)

    with writing(database, data) as writers:
        kills = [killed_at(database, share * len(data)) for share in (0.2, 0.4, 0.6)]
        alembic(database, "upgrade", "head", env={"OM_VEC_DIM": str(DIM)})

    assert all(kills)
    assert mismatches(database, dim=DIM) == []
    assert v_of(database) == remembered(writers)
