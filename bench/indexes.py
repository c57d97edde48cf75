"""What the index build gains from the memory that the package chooses, over the server's default."""

from __future__ import annotations

import io
import statistics
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from demo.openmemory import Database, create_database
from openmemory_migrations import embedded

EMBEDDINGS = Path("../shared/data/minilm_10k_384.npy")
COPIES = 6  # of the embeddings, each with noise of its own: a graph of this size doesn't fit in the default memory
SETTINGS = {
    "server's defaults (64 MB, 2 workers)": "",
    "64 MB, no workers": "SET max_parallel_maintenance_workers = 0",
    "chosen memory, 2 workers": "SET maintenance_work_mem = '1GB'",
}
INDEXES = {
    "hnsw": "hnsw (v vector_l2_ops) WITH (m = 16, ef_construction = 64)",
    "ivfflat": "ivfflat (v vector_l2_ops) WITH (lists = {lists})",
}
ROUNDS = 2


def measure() -> list[dict[str, Any]]:
    if not EMBEDDINGS.exists():
        print(f"no index builds: {EMBEDDINGS} is not here", file=sys.stderr)
        return []
    real = np.load(EMBEDDINGS)
    noise = np.random.default_rng(0)
    found = []
    with embedded.temporary() as server:
        for copies in (1, COPIES):
            database = create_database(server, f"indexes_{copies}")
            database.run("CREATE EXTENSION vector; CREATE TABLE t (v vector(384))")
            for number in range(copies):
                _load(database, real + number * noise.normal(0, 0.02, real.shape).astype("<f4"))
            for name, definition in INDEXES.items():
                taken: dict[str, list[float]] = {settings: [] for settings in SETTINGS}
                for _ in range(ROUNDS):
                    for settings, sql in SETTINGS.items():
                        lists = max(1, len(real) * copies // 1000)
                        taken[settings].append(_build(database, sql, definition.format(lists=lists)))
                seconds = {settings: statistics.median(each) for settings, each in taken.items()}
                default = seconds[next(iter(SETTINGS))]
                found += [
                    {
                        "index": name,
                        "rows": len(real) * copies,
                        "settings": settings,
                        "seconds": each,
                        "default_seconds": default,
                    }
                    for settings, each in seconds.items()
                ]
    return found


def _load(database: Database, values: np.ndarray[Any, Any]) -> None:
    with closing(database.connect()) as connection, connection.cursor() as cursor:
        for start in range(0, len(values), 1000):
            lines = "".join(f"{row.tolist()}\n" for row in values[start : start + 1000])
            cursor.copy_expert("COPY t FROM STDIN", io.StringIO(lines))


def _build(database: Database, settings: str, definition: str) -> float:
    with closing(database.connect()) as connection, connection.cursor() as cursor:
        cursor.execute("DROP INDEX IF EXISTS built; CHECKPOINT")
        if settings:
            cursor.execute(settings)
        started = time.perf_counter()
        cursor.execute(f"CREATE INDEX built ON t USING {definition}")
        return time.perf_counter() - started
