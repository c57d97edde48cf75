"""Is a table that is larger than memory read over and over? Blocks read past small shared_buffers, and WAL."""

from __future__ import annotations

from typing import Any

from demo.openmemory import Database
from openmemory_migrations import embedded

from .machine import OPTIONS
from .rows import copied, make
from .ways import run

DIMENSIONS, ROWS, BUFFERS = 256, 60_000, "16MB"
WAYS = ("floor", "ours, client engine", "execute_values")  # the last one goes by key, in random order
COUNTED = """
SELECT heap_blks_read + coalesce(toast_blks_read, 0), idx_blks_read + coalesce(tidx_blks_read, 0),
       pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint
FROM pg_statio_user_tables WHERE relname = 'openmemory_vectors'
"""


def measure() -> list[dict[str, Any]]:
    found = []
    with embedded.temporary(options={**OPTIONS, "shared_buffers": BUFFERS}) as server:
        template = make(server, "blocks", DIMENSIONS, ROWS)
        for way in WAYS:
            with copied(server, template) as database:
                before = _counted(database)
                run(database, way, DIMENSIONS, ROWS, {"BENCH_NO_COUNT": "1"})
                table, index, wal = (after - b for after, b in zip(_counted(database), before, strict=True))
                pages: int = database.value("SELECT pg_table_size('openmemory_vectors') / 8192")
            found.append({"way": way, "rows": ROWS, "table": table, "index": index, "wal": wal, "pages": pages})
    return found


def _counted(database: Database) -> list[int]:
    return [int(value) for value in database.rows(COUNTED)[0]]
