"""Migrate real rows on a throw-away PostgreSQL, check every bit, and take it all back: `make demo`."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import closing

from openmemory_migrations import embedded

from .openmemory import (
    TABLE,
    Database,
    checksum,
    create_database,
    create_table,
    environment,
    load,
    mismatches,
    real_rows,
)

RUNS: list[tuple[int, dict[str, str], str]] = [
    (256, {}, "no dimension configured: the rows tell it"),
    (1536, {"OM_TIER": "deep"}, "dimension configured by OM_TIER=deep"),
]
SEARCH = f"SELECT id, sector, v_vector <-> %s::vector FROM {TABLE} ORDER BY v_vector <-> %s::vector LIMIT 5"


def main() -> None:
    started = time.monotonic()
    with embedded.temporary() as server:
        admin = Database("postgres", server.url())
        say(f"PostgreSQL {admin.value('SHOW server_version')} in {server.data}, for this demo only")
        for dim, settings, remark in RUNS:
            run(create_database(server, f"openmemory_{dim}"), dim, settings, remark)
    say(f"\nEverything is as it should be, after {time.monotonic() - started:.0f} s.")


def run(database: Database, dim: int, settings: Mapping[str, str], remark: str) -> None:
    rows = real_rows(dim)
    create_table(database)
    load(database, rows)

    heading(f"{len(rows)} rows of {dim} dimensions, written by OpenMemory; {remark}")
    before = state(database)
    show(before)

    alembic(database, "upgrade", "head", settings=settings)
    show(state(database))
    wrong = mismatches(database, dim=dim)
    expect(not wrong, f"{len(rows) - len(wrong)} of {len(rows)} rows: v_vector is v to the bit")

    heading("the application's search")
    search(database)

    alembic(database, "downgrade", "base", settings=settings)
    after = state(database)
    show(after)
    expect(after == before, "the table is as before, v the same to the byte")


def state(database: Database) -> dict[str, str]:
    """Return what a migration could change of the table, ready to print and to compare."""
    questions = {
        "columns": """
            SELECT string_agg(attname || ' ' || format_type(atttypid, atttypmod), ', ' ORDER BY attnum)
            FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped
            """,
        "indexes": """
            SELECT string_agg(relname, ', ' ORDER BY relname)
            FROM pg_index JOIN pg_class c ON c.oid = indexrelid WHERE indrelid = %s::regclass
            """,
        "triggers": """
            SELECT coalesce(string_agg(tgname, ', ' ORDER BY tgname), 'none')
            FROM pg_trigger WHERE tgrelid = %s::regclass AND NOT tgisinternal
            """,
    }
    answers = {what: str(database.value(sql, TABLE)) for what, sql in questions.items()}
    return answers | {"v": f"checksum {checksum(database)}"}


def search(database: Database) -> None:
    """Search for a stored vector as the application does, and see that the index finds it."""
    with closing(database.connect()) as connection, connection.cursor() as cursor:
        cursor.execute(f"SELECT v_vector::text FROM {TABLE} ORDER BY id, sector LIMIT 1")
        ((vector,),) = cursor.fetchall()
        say("SET enable_seqscan = off;  -- the planner would rather read a table as small as this one whole")
        cursor.execute("SET enable_seqscan = off")
        say(SEARCH.replace("%s", "$1") + ";")
        cursor.execute(f"EXPLAIN (COSTS OFF) {SEARCH}", (vector, vector))
        plan = [line for (line,) in cursor]
        cursor.execute(SEARCH, (vector, vector))
        found = cursor.fetchall()
    for line in plan:
        say("  " + (line if len(line) < 100 else line[:80] + " ..."))
    for key, sector, distance in found:
        say(f"  {key}  {sector:<10}  {distance:.4f}")
    expect(
        any(f"Index Scan using {TABLE}_vvector_idx" in line for line in plan),
        "the search goes through the index",
    )
    expect(bool(found) and found[0][2] == 0, "the vector that was asked for comes first")


def alembic(database: Database, *arguments: str, settings: Mapping[str, str]) -> None:
    shown = [f"OM_DATABASE_URL='{database.url}'", *(f"{name}={value}" for name, value in settings.items())]
    heading(f"$ {' '.join([*shown, 'alembic', *arguments])}")
    done = subprocess.run(
        [sys.executable, "-m", "alembic", *arguments],
        env=environment(database, settings),
        stderr=subprocess.STDOUT,
    )
    expect(done.returncode == 0, f"alembic {' '.join(arguments)} ended with exit code {done.returncode}")


def show(state: Mapping[str, str]) -> None:
    for what, text in state.items():
        say(f"  {what:<9} {text}")


def expect(holds: bool, what: str) -> None:
    say(f"{'ok' if holds else 'NOT TRUE':<9} {what}")
    if not holds:
        raise SystemExit(1)


def heading(text: str) -> None:
    say(f"\n{text}")


def say(text: str) -> None:
    # at once, as alembic writes to the same place
    print(text, flush=True)


if __name__ == "__main__":
    main()
