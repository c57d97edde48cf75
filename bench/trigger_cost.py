"""What the sync trigger adds to OpenMemory's own write: `python -m bench.trigger_cost`.

Each write is a transaction of its own on a throw-away server, synchronous_commit off (the disk of a shared machine
would drown the rest); medians of three rounds, in turn.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from contextlib import closing

import psycopg2

from demo.openmemory import Database, Row, create_database, create_table, drop_database, environment, real_rows
from openmemory_migrations import embedded

WRITE = """
INSERT INTO openmemory_vectors (id, sector, user_id, v, dim) VALUES (%s, %s, %s, %s, %s)
ON CONFLICT (id, sector) DO UPDATE SET user_id = EXCLUDED.user_id, v = EXCLUDED.v, dim = EXCLUDED.dim
"""
ROUNDS = 3


def main() -> None:
    print("| dimensions | write | without | with trigger | ratio |\n|---|---|---|---|---|")
    with embedded.temporary() as server:
        for dim in (256, 1536):
            taken: dict[tuple[str, str], list[float]] = {}
            for _ in range(ROUNDS):
                for trigger in ("off", "on"):
                    database = create_database(server, "trigger_cost")
                    create_table(database)
                    migrate(database, dim, trigger)
                    for write in ("new row", "existing row"):
                        taken.setdefault((write, trigger), []).append(median_ms(database, real_rows(dim)))
                    drop_database(server, database.name)
            for write in ("new row", "existing row"):
                off, on = (statistics.median(taken[write, trigger]) for trigger in ("off", "on"))
                print(f"| {dim:,} | {write} | {off:.2f} ms | {on:.2f} ms | {on / off:.1f} |")


def migrate(database: Database, dim: int, trigger: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "alembic", "upgrade", "head"],
        env=environment(database, {"OM_VEC_DIM": str(dim), "OM_SYNC_TRIGGER": trigger, "OM_INDEX": "none"}),
        check=True,
        capture_output=True,
    )


def median_ms(database: Database, rows: list[Row]) -> float:
    times = []
    with closing(database.connect()) as connection, connection.cursor() as cursor:
        cursor.execute("SET synchronous_commit = off")
        for row in rows:
            assert row.v is not None
            values = (row.id, row.sector, row.user_id, psycopg2.Binary(row.v), row.dim)
            started = time.perf_counter()
            cursor.execute(WRITE, values)
            times.append(time.perf_counter() - started)
    return statistics.median(times) * 1000


if __name__ == "__main__":
    main()
