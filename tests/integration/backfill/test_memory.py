"""The memory of a run does not grow with the table."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.openmemory import TABLE
from openmemory_migrations import embedded
from tests.support.commands import result, start_alembic
from tests.support.openmemory import Database, create_database, create_table, drop_database
from tests.support.sessions import converted

DIM = 64
ALLOWED = 25  # MiB; the larger table's bytes alone are 49
GOOD, NAN = "3f", "c07f"  # the last bytes of each value


def fill(database: Database, rows: int, ending: str) -> None:
    create_table(database)
    digits = 8 - len(ending)
    database.run(
        f"""
        INSERT INTO {TABLE} SELECT gen_random_uuid(), 'semantic', 'user' || i %% 20,
                                   decode(repeat(lpad(to_hex(i), {digits}, '0') || '{ending}', {DIM}), 'hex'), {DIM}
        FROM generate_series(1, %s) AS i
        """,
        rows,
    )


def peak(database: Database) -> float:
    """The most memory that `alembic upgrade head` has had at a time, in MiB."""
    process = start_alembic(database, "upgrade", "head", env={"OM_INDEX": "none", "OM_VEC_DIM": str(DIM)})
    status = Path(f"/proc/{process.pid}/status")
    most = 0
    while process.poll() is None:
        # not resource.getrusage: a child's ru_maxrss begins with what its parent had at the fork
        if found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text()):
            most = int(found[1])
    ended = result(process)
    assert ended.returncode == 0, ended.log
    return most / 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
@pytest.mark.parametrize("ending", [GOOD, NAN], ids=["good rows", "rows with NaN"])
def test_the_peak_is_that_of_a_table_a_tenth_as_large(
    server: embedded.Server, names: Iterator[int], ending: str
) -> None:
    peaks = []
    for rows in (20_000, 200_000):
        database = create_database(server, f"memory_{next(names)}")
        fill(database, rows, ending)
        peaks.append(peak(database))
        assert converted(database) == (rows if ending == GOOD else 0)
        drop_database(server, database.name)

    print(f"peak of a run: {peaks[0]:.1f} MiB, on ten times the rows {peaks[1]:.1f} MiB")
    assert peaks[1] - peaks[0] < ALLOWED
