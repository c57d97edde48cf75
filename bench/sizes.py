"""Does the size of a table matter? Rate, first against last tenth, memory, and continuing a run that is nearly done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from typing import Any

from demo.openmemory import Database, drop_database, environment
from openmemory_migrations.embedded import Server

from .rows import copied, make
from .ways import FLOOR_COLUMN

STOP_AT = 95  # percent


def measure(server: Server, most_rows: int) -> dict[str, Any]:
    sizes = [(64, rows) for rows in (10_000, 100_000, 300_000, 1_000_000, 3_000_000) if rows <= most_rows]
    result: dict[str, Any] = {"tables": []}
    for dimensions, rows in [*sizes, (1536, 10_000), (16_000, 1000)]:
        template = make(server, f"size_{rows}", dimensions, rows)
        with copied(server, template) as database:
            done = _run(database, dimensions)
        result["tables"].append({"dimensions": dimensions, **done})
        if (dimensions, rows) == sizes[-1]:
            with copied(server, template) as database:
                result["floor"] = {"dimensions": dimensions, "rows": rows, **_floor_by_tenths(database, rows)}
            with copied(server, template) as database:
                result["resumed"] = _resumed(database, dimensions) | {"whole_seconds": done["seconds"]}
        drop_database(server, template.name)
        print(f"{rows:,} rows of {dimensions}: {done['rows_per_second']:,.0f} rows/s", file=sys.stderr)
    return result


def _run(database: Database, dimensions: int, stop_at: int | None = None) -> dict[str, Any]:
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.ways", "ours, client engine", database.url, str(dimensions), "0"],
        env=environment(None, {}),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    seen: dict[int, float] = {}
    watching = threading.Thread(target=_watch, args=(database, process, seen, stop_at))
    watching.start()
    output, _ = process.communicate()
    watching.join()
    if stop_at:
        return {}
    found = json.loads(output)
    rate = found["rows"] / found["seconds"]
    result = {
        "rows": found["rows"],
        "seconds": found["seconds"],
        "rows_per_second": rate,
        "peak_mib": found["peak_kib"] / 1024,
    }
    # on a small table a tenth is over before it is seen
    if found["seconds"] > 5 and {5, 15, 85, 95} <= seen.keys():
        result["first_tenth"] = found["rows"] / 10 / (seen[15] - seen[5])
        result["last_tenth"] = found["rows"] / 10 / (seen[95] - seen[85])
    return result


def _watch(database: Database, process: subprocess.Popen[str], seen: dict[int, float], stop_at: int | None) -> None:
    """Notes when each percentage is first seen in pg_stat_activity, where everybody can read it."""
    with closing(database.connect()) as connection, connection.cursor() as cursor:
        while process.poll() is None:
            cursor.execute(
                "SELECT max(substring(application_name FROM '([0-9]+) %$')::integer) FROM pg_stat_activity"
                " WHERE application_name LIKE 'openmemory-migrations backfill%' AND datname = current_database()"
            )
            (percent,) = cursor.fetchone() or (None,)
            for passed in range(max(seen, default=-1) + 1, (percent or 0) + 1):
                seen[passed] = time.monotonic()
            if stop_at and (percent or 0) >= stop_at:
                os.kill(process.pid, signal.SIGKILL)
                return
            time.sleep(0.005)


def _floor_by_tenths(database: Database, rows: int) -> dict[str, float]:
    """The server's own pace slows down as well, as its caches fill with what is to be written."""
    database.run(FLOOR_COLUMN)
    pages: int = database.value("SELECT pg_relation_size('openmemory_vectors') / 8192")
    database.run("CHECKPOINT")
    taken = []
    for tenth in range(10):
        first, end = (f"({pages * number // 10},0)" for number in (tenth, tenth + 1))
        started = time.perf_counter()
        database.run("UPDATE openmemory_vectors SET copy = v || '' WHERE ctid >= %s AND ctid < %s", first, end)
        taken.append(time.perf_counter() - started)
    return {
        "rows_per_second": rows / sum(taken),
        "first_tenth": rows / 10 / taken[0],
        "last_tenth": rows / 10 / taken[-1],
    }


def _resumed(database: Database, dimensions: int) -> dict[str, Any]:
    _run(database, dimensions, stop_at=STOP_AT)
    done, rows = database.rows("SELECT count(v_vector), count(*) FROM openmemory_vectors")[0]
    return {"done_percent": 100 * done / rows, "seconds": _run(database, dimensions)["seconds"]}
