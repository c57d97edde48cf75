"""What a backfill adds to disk and WAL for each row, and one run on a table as large as one cares to wait for."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

from demo.openmemory import Database, drop_database, environment
from openmemory_migrations import embedded

from .machine import OPTIONS
from .rows import copied, make

SIZES = ((256, 20_000), (384, 20_000), (1536, 5_000), (3072, 3_000))
# as a server has them by default, with room for WAL: over gigabytes checkpoints belong to it
LARGE = {"shared_buffers": "4GB", "max_wal_size": "8GB", "autovacuum": "off"}
SIZE = "SELECT pg_total_relation_size('openmemory_vectors')"
WAL = "SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint"


def measure(share: float, large_dimensions: int, large_rows: int) -> dict[str, Any]:
    found: dict[str, Any] = {"rows": []}
    with embedded.temporary(options=OPTIONS) as server:
        for dimensions, whole in SIZES:
            rows = int(whole * share)
            template = make(server, f"growth_{dimensions}", dimensions, rows)
            for engine in ("client", "native", "server"):
                with copied(server, template) as database:
                    measured = _measured(database, dimensions, rows, {"OM_BACKFILL_ENGINE": engine})
                found["rows"].append({"engine": engine, **measured})
            drop_database(server, template.name)
    if large_rows:
        with embedded.temporary(options=LARGE) as server:
            database = make(server, "large", large_dimensions, large_rows)
            found["large"] = _measured(database, large_dimensions, large_rows, {"OM_BACKFILL_WORKERS": "2"})
    return found


def _measured(database: Database, dimensions: int, rows: int, settings: dict[str, str]) -> dict[str, Any]:
    """Bytes a row: the table before, what it has grown by, what it is once rewritten, and WAL."""
    _alembic(database, "om_20240107_pgvector", {"OM_VEC_DIM": str(dimensions)})
    before, wal = database.value(SIZE), database.value(WAL)
    started = time.perf_counter()
    _alembic(database, "om_20240107_backfill", settings)
    seconds = time.perf_counter() - started
    grown, written = database.value(SIZE) - before, database.value(WAL) - wal
    done: int = database.value("SELECT count(v_vector) FROM openmemory_vectors")
    assert done == rows
    if rows <= 100_000:
        database.run("VACUUM FULL openmemory_vectors")
    print(f"{rows:,} rows of {dimensions}: {grown / rows:,.0f} bytes a row", file=sys.stderr)
    return {
        "dimensions": dimensions,
        "rows": rows,
        "seconds": seconds,
        "rows_per_second": rows / seconds,
        "before": before / rows,
        "grown": grown / rows,
        "needed": database.value(SIZE) / rows if rows <= 100_000 else None,
        "wal": written / rows,
    }


def _alembic(database: Database, revision: str, settings: dict[str, str]) -> None:
    env = environment(database, settings)
    subprocess.run([sys.executable, "-m", "alembic", "upgrade", revision], env=env, check=True, capture_output=True)
