"""Releases of PostgreSQL and pgvector with a fault that a migration can meet, and what each fault is. Pure.

From https://www.postgresql.org/docs/release/14.4/ and pgvector's CHANGELOG.md, with its issues 41, 959 and 1036 for who
can do what. Where that doesn't say since when, it is since the release that brought the kind of index.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ..finding import Finding
from ..settings import Settings

UPDATE = "Install a newer pgvector, then: ALTER EXTENSION vector UPDATE;"


@dataclass(frozen=True)
class Fault:
    """Of pgvector from `since` to before `fixed`; of one kind of index, whose users it is a warning for."""

    code: str
    since: tuple[int, ...]
    fixed: tuple[int, ...]
    index: Literal["ivfflat", "hnsw"]
    message: str
    detail: str
    hint: str = UPDATE


FAULTS = (
    Fault(
        "pgvector-ivfflat-inserts",
        (0, 2, 7),
        (0, 3, 1),
        "ivfflat",
        "inserts silently corrupt ivfflat indexes",
        "Fixed in 0.3.1; an index from before has to be built anew.",
    ),
    Fault(
        "pgvector-no-iterative-scan",
        (0,),
        (0, 8, 0),
        "hnsw",
        "a search through hnsw with a filter may return fewer rows than its LIMIT",
        "OpenMemory filters by sector; hnsw.iterative_scan, which goes on until there are enough, came with 0.8.0.",
    ),
    Fault(
        "pgvector-cve-2026-3172",
        (0, 6, 0),
        (0, 8, 2),
        "hnsw",
        "the parallel build of an hnsw index can overflow a buffer (CVE-2026-3172)",
        "It can show data of other tables or crash the server. Fixed in 0.8.2.",
        "ALTER ROLE CURRENT_USER SET max_parallel_maintenance_workers = 0; avoids it. " + UPDATE,
    ),
    Fault(
        "pgvector-hnsw-vacuum-corruption",
        (0, 5, 0),
        (0, 8, 3),
        "hnsw",
        "VACUUM may corrupt an hnsw index",
        "Fixed in 0.8.3; REINDEX INDEX CONCURRENTLY mends an index.",
    ),
    Fault(
        "pgvector-hnsw-not-repaired",
        (0, 5, 0),
        (0, 8, 4),
        "hnsw",
        'VACUUM of an hnsw index may fail with "hnsw graph not repaired"',
        "Fixed in 0.8.4, as are errors of inserts meanwhile.",
    ),
    Fault(
        "pgvector-cve-2026-103484",
        (0,),
        (0, 8, 7),
        "ivfflat",
        "who may build an ivfflat index can write beyond a buffer (CVE-2026-103484)",
        "It takes a role that may create such an index, and means harm. Fixed in 0.8.7.",
    ),
)


def faults(server: int, pgvector: tuple[int, ...] | None, settings: Settings) -> Iterator[Finding]:
    """`server` as server_version_num, `pgvector` None where it isn't known."""
    if 140_000 <= server < 140_004 and settings.index != "none":
        yield Finding(
            "warning",
            "postgresql-14-concurrently",
            f"PostgreSQL 14.{server % 100}: CREATE INDEX CONCURRENTLY can leave an index that misses rows",
            "Silently, where rows are updated meanwhile. Fixed in 14.4.",
            "Update the server to 14.4 or newer first, or set OM_INDEX=none.",
        )
    for fault in FAULTS if pgvector else ():
        if pgvector and fault.since <= pgvector < fault.fixed:
            yield Finding(
                "warning" if settings.index == fault.index else "notice",
                fault.code,
                f"pgvector {'.'.join(map(str, pgvector))}: {fault.message}",
                fault.detail,
                fault.hint,
            )
