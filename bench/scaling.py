"""One backfill by several processes: `openmemory-migrations backfill` 1, 2 and 4 times at once, on equal tables.

A pause after each batch stands in for a network: what a process can't use, another can.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import Any

from demo.openmemory import Database, drop_database, environment
from openmemory_migrations.embedded import Server

from .rows import copied, make

DIMENSIONS = 256
PROCESSES = (1, 2, 4)
# engine, rows, settings: batches so small that there are enough of them for four
CASES: tuple[tuple[str, int, dict[str, str]], ...] = (
    ("client", 120_000, {}),
    ("client", 60_000, {"BACKFILL_BATCH": "500", "OM_BACKFILL_PAUSE_MS": "50"}),
    ("server", 60_000, {"BACKFILL_BATCH": "1000"}),
    ("server", 30_000, {"BACKFILL_BATCH": "500", "OM_BACKFILL_PAUSE_MS": "50"}),
)


def measure(server: Server, share: float, rounds: int) -> list[dict[str, Any]]:
    found = []
    for engine, whole, settings in CASES:
        rows = int(whole * share)
        template = make(server, f"scaling_{rows}", DIMENSIONS, rows)
        taken: dict[int, list[float]] = {processes: [] for processes in PROCESSES}
        for _ in range(rounds):
            for processes in PROCESSES:
                with copied(server, template) as database:
                    seconds = _run(database, processes, {**settings, "OM_BACKFILL_ENGINE": engine})
                    done: int = database.value("SELECT count(v_vector) FROM openmemory_vectors")
                assert done == rows
                taken[processes].append(seconds)
        drop_database(server, template.name)
        for processes, runs in taken.items():
            seconds = statistics.median(runs)
            pause = int(settings.get("OM_BACKFILL_PAUSE_MS", 0))
            found.append(
                {
                    "engine": engine,
                    "pause_ms": pause,
                    "processes": processes,
                    "rows": rows,
                    "rows_per_second": rows / seconds,
                    "runs": runs,
                }
            )
            print(f"{engine}, pause {pause} ms, {processes} processes: {rows / seconds:,.0f} rows/s", file=sys.stderr)
    return found


def _run(database: Database, processes: int, settings: dict[str, str]) -> float:
    """Seconds from the moment at which all are loaded until the last has ended."""
    env = environment(database, {**settings, "OM_VEC_DIM": str(DIMENSIONS)})
    subprocess.run(
        [sys.executable, "-m", "alembic", "upgrade", "om_20240107_pgvector"], env=env, check=True, capture_output=True
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "bench.scaling"],
            env=env,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(processes)
    ]
    for process in running:
        assert process.stdout
        assert process.stdout.readline() == "loaded\n"
    started = time.perf_counter()
    for process in running:
        assert process.stdin
        process.stdin.close()
    assert [process.wait() for process in running] == [0] * processes
    return time.perf_counter() - started


def main() -> int:
    from openmemory_migrations import cli

    print("loaded", flush=True)
    sys.stdin.read()
    return cli.main(["backfill"])


if __name__ == "__main__":
    sys.exit(main())
