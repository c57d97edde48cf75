"""What the index build gains from the memory that the package chooses, over the server's default."""

from __future__ import annotations

import io
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from demo.openmemory import Database, create_database
from openmemory_migrations import embedded
from openmemory_migrations.db.catalog import Extension
from openmemory_migrations.index import choice
from openmemory_migrations.settings import Settings
from openmemory_migrations.target import Target

from .machine import OPTIONS

EMBEDDINGS = Path("../shared/data/minilm_10k_384.npy")
COPIES = 4  # of the embeddings, each with noise of its own: a graph of this size doesn't fit in the default memory
SETTINGS = (
    "server's defaults (64 MB, 2 workers)",
    "64 MB, no workers",
    "chosen memory, 2 workers",
    "chosen memory, no workers",
)
DEFAULT_KB = 64 * 1024
DIMENSIONS = 384


def measure() -> list[dict[str, Any]]:
    if not EMBEDDINGS.exists():
        print(f"no index builds: {EMBEDDINGS} is not here", file=sys.stderr)
        return []
    real = np.load(EMBEDDINGS)
    noise = np.random.default_rng(0)
    found = []
    with embedded.temporary(options=OPTIONS) as server:
        for copies in (1, COPIES):
            database = create_database(server, f"indexes_{copies}")
            database.run(f"CREATE EXTENSION vector; CREATE TABLE t (v_vector vector({DIMENSIONS}))")
            for number in range(copies):
                _load(database, real + number * noise.normal(0, 0.02, real.shape).astype("<f4"))
            for method in ("hnsw", "ivfflat"):
                found += _compare(database, method, len(real) * copies)
    return found


def _compare(database: Database, method: str, rows: int) -> list[dict[str, Any]]:
    settings = Settings.load({"index": method}, {})
    plan = choice.plan(Target.of(settings), settings, Extension("public", (0, 8, 5)), DIMENSIONS, rows)
    assert isinstance(plan, choice.Plan)
    chosen = max(DEFAULT_KB, plan.memory_kb)
    taken = {
        name: _build(database, plan, DEFAULT_KB if "64 MB" in name else chosen, 0 if "no workers" in name else 2)
        for name in SETTINGS
    }
    default = taken[SETTINGS[0]]
    return [
        {
            "index": method,
            "rows": rows,
            "settings": name.replace("chosen memory", f"chosen memory ({chosen // 1024} MB)"),
            "seconds": seconds,
            "default_seconds": default,
        }
        for name, seconds in taken.items()
    ]


def _load(database: Database, values: np.ndarray[Any, Any]) -> None:
    with closing(database.connect()) as connection, connection.cursor() as cursor:
        for start in range(0, len(values), 1000):
            lines = "".join(f"{row.tolist()}\n" for row in values[start : start + 1000])
            cursor.copy_expert("COPY t FROM STDIN", io.StringIO(lines))


def _build(database: Database, plan: choice.Plan, memory_kb: int, workers: int) -> float:
    with closing(database.connect()) as connection, connection.cursor() as cursor:
        cursor.execute("DROP INDEX IF EXISTS built; CHECKPOINT")
        cursor.execute(f"SET maintenance_work_mem = '{memory_kb}kB'; SET max_parallel_maintenance_workers = {workers}")
        started = time.perf_counter()
        cursor.execute(f"CREATE INDEX built ON t USING {plan.method} ({plan.expression}) WITH ({plan.options})")
        return time.perf_counter() - started
