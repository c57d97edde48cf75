"""Candidate indexes on a sampled copy of the table: how long they take to build, how large they are, what they find.

The copy is a temporary table, which goes with the session, however that ends. Nobody else sees it, and nobody waits for
it; but PostgreSQL doesn't build an index on one with parallel workers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from sqlalchemy.exc import DBAPIError

from .. import console, log
from ..backfill.reader import windows
from ..db.catalog import Extension
from ..db.context import VectorContext
from ..db.database import Database
from ..db.partitions import Part
from ..db.sqlerrors import as_migration_error
from ..errors import MigrationError
from ..index import build, choice
from ..index.choice import HALFVEC_DIMENSIONS, INDEX_DIMENSIONS, ROWS_A_LIST, Plan
from ..settings import Settings
from ..sql import SQL, Fragment, blocks, joined, quote
from ..target import Target
from .queries import ALL, Choice
from .recall import EXACT_QUERIES, Measurement, Tried, fastest
from .search import EVERY_ROW, Searched, Searcher, ways
from .stream import with_values
from .verification import Asking, gather, require_places

BLOCKS = blocks("verify")

COPY = "openmemory_migrations_tune"
INDEX = f"{COPY}_idx"
HNSW = ((8, 64), (16, 64), (16, 128), (32, 128))  # m, ef_construction
AS_FAST = 1.2  # times as long is as fast, for what a measurement can tell: then what is built sooner is better


@dataclass(frozen=True)
class Candidate:
    """An index that was tried: `settings` build it, `seconds` is what that took, `tried` how it did."""

    settings: Settings
    plan: Plan
    half: bool
    seconds: float
    bytes: int
    tried: list[Tried]

    def reaching(self, wanted: float) -> Tried | None:
        return fastest(self.tried, wanted)


@dataclass(frozen=True)
class Tuning:
    """`rows` of the table's `of` were copied; `every_row` is the search without an index in the copy."""

    rows: int
    of: int
    k: int
    wanted: float
    candidates: list[Candidate]
    every_row: Tried

    def frontier(self) -> set[int]:
        """The candidates than which no other finds as much as fast, by the best that each reaches."""
        points = [self.at_best(one).all for one in self.candidates]
        return {
            number
            for number, point in enumerate(points)
            if not any(
                (other.recall or 0) >= (point.recall or 0)
                and other.p50_ms <= point.p50_ms
                and (other.recall, other.p50_ms) != (point.recall, point.p50_ms)
                for other in points
            )
        }

    def at_best(self, candidate: Candidate) -> Tried:
        """The way that reaches the wanted recall, or else the one that comes nearest."""
        return candidate.reaching(self.wanted) or max(candidate.tried, key=lambda way: way.all.recall or 0)

    @property
    def best(self) -> Candidate | None:
        """The one to build: among those that reach the wanted recall about as fast as the fastest, built soonest.

        One on a cast only where there can't be another: OpenMemory's query doesn't cast.
        """
        enough = [(one, found) for one in self.candidates if (found := one.reaching(self.wanted))]
        enough = [pair for pair in enough if not pair[0].half] or enough
        if not enough:
            return None
        limit = AS_FAST * min(found.all.p50_ms for _, found in enough)
        return min((one for one, found in enough if found.all.p50_ms <= limit), key=lambda one: one.seconds)

    def lists(self, candidate: Candidate) -> int:
        """As many rows a list in the whole table as in the copy."""
        return max(1, min(32_768, round((candidate.settings.index_lists or 1) * self.of / self.rows)))


def tune(ctx: VectorContext, asking: Asking) -> Tuning:
    """Raises MigrationError where there is too little to learn from, or no session to keep a temporary table in."""
    target = ctx.target
    require_places(ctx)
    size = ctx.table.columns[target.vector].dimensions
    if size is None:
        raise MigrationError(f"column {quote(target.vector)} of {target} has no dimensions, so it can't be indexed")
    if size > HALFVEC_DIMENSIONS:
        raise MigrationError(f"no index of pgvector takes more than {HALFVEC_DIMENSIONS:,} dimensions")
    with ctx.db.transaction():
        if ctx.db.pooled:
            raise MigrationError(
                "a pooler such as PgBouncer is in between, and a temporary table needs a session of its own",
                hint="Set OM_DATABASE_URL to the server itself.",
            )
    rows, of, copy = _copied(ctx, size, asking.sample or 20_000)
    if rows < ROWS_A_LIST:
        raise MigrationError(f"{target} has {rows:,} vectors to learn from, at least {ROWS_A_LIST} are needed")
    at = copy.at(ctx.db)
    with at.transaction():
        asked = Choice(ctx.by(at), size).ask(asking.queries, asking.k, of_users=False)
        gather(ctx.by(at), windows(at, [copy]), size, asked)

    if not asked.names.get(ALL):
        raise MigrationError(f"no vector of {target} can be asked with: all that were looked at are zeros")

    def measurement(searched: Searched) -> Measurement:
        searcher = Searcher(at, ctx.extension, asked.groups, ctx.table.key, size, searched, asking.k + 1)
        return Measurement(searcher, asked, searched)

    plans = list(candidates(target, ctx.settings, ctx.extension, size, rows))
    found: list[Candidate] = []
    with console.shown(f"tuning {target.table}", len(plans), "indexes") as shown:
        for number, (candidate, plan, half) in enumerate(plans):
            shown.to(number, f"{plan.method}, {plan.options}{', halfvec' if half else ''}")
            if built := _build(at, candidate, plan):
                options = dict(option.split(" = ") for option in plan.options.split(", "))
                numbers = {name: int(value) for name, value in options.items()}
                searched = Searched(candidate.index_metric, plan.method, half, numbers)
                with at.transaction():
                    tried = measurement(searched).sweep(ways(searched, ctx.extension), asking.wanted)
                    at.run("DROP INDEX pg_temp.{index}", index=quote(INDEX))
                found.append(Candidate(candidate, plan, half, *built, tried))
        shown.to(len(plans))
    with at.transaction():
        every_row = measurement(Searched(ctx.settings.index_metric)).one(EVERY_ROW, asked.names[ALL][:EXACT_QUERIES])
        at.run("DROP TABLE {table}")
    return Tuning(rows, of, asking.k, asking.wanted, found, every_row)


def candidates(
    target: Target, settings: Settings, extension: Extension, size: int, rows: int
) -> Iterator[tuple[Settings, Plan, bool]]:
    """What is worth trying for so many rows, on the vectors and on their cast to halfvec. Pure."""
    variants = [replace(settings, index="ivfflat", index_lists=lists) for lists in choice.lists_to_try(rows)]
    variants += [replace(settings, index="hnsw", index_m=m, index_ef_construction=ef) for m, ef in HNSW]
    for half in (False, True):
        if (half and extension.version < choice.HALFVEC) or (not half and size > INDEX_DIMENSIONS):
            continue
        for variant in variants:
            wanted = replace(variant, index_halfvec=half)
            plan = choice.plan(target, wanted, extension, size, rows)
            if isinstance(plan, Plan):
                yield wanted, plan, half


def _copied(ctx: VectorContext, size: int, most: int) -> tuple[int, int, Part]:
    """How many rows have been copied, of how many, and where to."""
    db = ctx.db
    wanted = [*ctx.table.key, "sector", "user_id", ctx.target.source, ctx.target.vector]
    columns = joined(", ", (quote(name) for name in dict.fromkeys(wanted) if name in ctx.table.columns))
    eligible = with_values(ctx, size)
    with db.transaction():
        of = int(db.value("SELECT count(*) FROM {table} WHERE {with_values}", with_values=eligible))
    # a little more than needed: how many come is chance
    percent = min(100.0, 100.0 * (1.05 * most + 100) / max(1, of))
    names: dict[str, Fragment] = {"copy": quote(COPY), "columns": columns, "with_values": eligible, "rows": most}
    try:
        with db.transaction():
            rows = int(db.run(BLOCKS.create, percent=SQL(f"{percent:.6f}"), **names).rowcount)
            db.run("ANALYZE pg_temp.{copy}", copy=quote(COPY))
    except DBAPIError as error:
        raise as_migration_error(error, f"no temporary table for a sample of {ctx.target}") from error
    return rows, of, Part(0, None, "pg_temp", COPY, "r", "", owned=True, rows_hidden=False)


def _build(at: Database, settings: Settings, plan: Plan) -> tuple[float, int] | None:
    """Seconds and bytes; None where it can't be built, which the log says."""
    memory_kb = build.memory_for(at, settings, plan)
    began = time.monotonic()
    try:
        with at.transaction():
            at.set_local({"maintenance_work_mem": f"{memory_kb}kB"})
            build.create(at, plan, INDEX)
            size = int(at.value("SELECT pg_relation_size(CAST(:index AS regclass))", {"index": f"pg_temp.{INDEX}"}))
    except DBAPIError as error:
        if build.of_the_run(error):
            raise
        problem = as_migration_error(error, f"{plan.method} with {plan.options} can't be built")
        log.notice(problem.message, detail=problem.detail, hint=problem.hint)
        return None
    return time.monotonic() - began, size
