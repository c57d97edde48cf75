"""The memory of a run does not grow with the table."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from demo.openmemory import TABLE, environment
from tests.support.cases import exhaustive
from tests.support.commands import ROOT
from tests.support.databases import Databases
from tests.support.openmemory import Database, create_table
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
    """The most memory that `alembic upgrade head` has had at a time, in MiB, as a process started from nothing."""
    most = 0
    with subprocess.Popen(
        [sys.executable, "-m", "alembic", "upgrade", "head"],
        cwd=ROOT,
        env=environment(database, {"OM_INDEX": "none", "OM_VEC_DIM": str(DIM)}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            # not resource.getrusage: a child's ru_maxrss begins with what its parent had at the fork
            if found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text()):
                most = int(found[1])
            time.sleep(0.01)
    assert process.returncode == 0
    return most / 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
@pytest.mark.parametrize("ending", [GOOD, exhaustive(NAN)], ids=["good rows", "rows with NaN"])
def test_the_peak_is_that_of_a_table_a_tenth_as_large(databases: Databases, ending: str) -> None:
    peaks = []
    for rows in (20_000, 200_000):
        with databases.empty() as database:
            fill(database, rows, ending)
            peaks.append(peak(database))
            assert converted(database) == (rows if ending == GOOD else 0)

    print(f"peak of a run: {peaks[0]:.1f} MiB, on ten times the rows {peaks[1]:.1f} MiB")
    assert peaks[1] - peaks[0] < ALLOWED
