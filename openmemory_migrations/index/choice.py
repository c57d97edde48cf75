"""What the vector index should be: kind, operator class, options and memory, from settings and rows. Pure."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

from ..db.catalog import Extension, Index
from ..errors import ANEW, INDEX_ANEW
from ..settings import Settings
from ..sql import SQL, fill, joined, quote
from ..target import Target
from .formula import N, greatest, least, root, up_to

ROWS_A_LIST = 50  # with fewer ivfflat finds too little: recall@10 0.18 was reported for 200 rows in 100 lists
LEAST_SAMPLES = 10_000  # rows that ivfflat samples at least, src/ivfbuild.c
HALF_MOST = 65_504  # in size; 65,520 and more are infinite as a half
INDEX_DIMENSIONS, HALFVEC_DIMENSIONS = 2000, 4000  # pgvector's limits for an index on vector and on halfvec
PAGE, PAGE_HEAD = 8192, 24 + 8  # bytes of an index's page, of its two headers
# bytes that an item has beside its vector: in ivfflat's lists (src/ivfflat.h), in hnsw's graph, whose 2 * m neighbours
# on the lowest layer have 6 each (src/hnsw.h)
IVFFLAT_ITEM, HNSW_ITEM = 12, 84
OPERATORS = {"l2": "<->", "cosine": "<=>", "ip": "<#>"}
# for % and the server's format(): lists, those wanted, the memory that there is, and what they need; of a graph what it
# needs, and what there is. What doesn't fit is read back from the index for each row: 10,000 rows of 384 take 3.0 s,
# and 8.3 or 9.5 s with memory for 37 or 19 % of them (measured)
FEWER_LISTS = "the index has %s lists and not %s: its build gets %s MB of memory, and those need %s MB"
SLOWER = (
    "the graph of the index needs about %s MB, and its build gets %s MB of memory:"
    " what doesn't fit is built several times as slowly"
)
NOT_ONE_LIST = "ivfflat needs %s MB of memory even for one list"
HNSW, HALFVEC = (0, 5), (0, 7)  # the versions of pgvector that they came with
METHODS = ("ivfflat", "hnsw")


@dataclass(frozen=True)
class Short:
    """The lists that an index would have with more memory to build it, and how much that is."""

    lists: int
    memory_kb: int


@dataclass(frozen=True)
class Plan:
    """An index that can be built. `expression` and `options` are SQL, `query` is the ORDER BY that uses it."""

    method: str
    opclass: str
    key: str
    required: frozenset[str]  # options that an index found in place must have
    expression: SQL
    options: SQL
    memory_kb: int
    size: int  # bytes, estimated
    query: str
    lists: int  # of ivfflat, else 0
    short: Short | None = None  # where memory isn't enough for all lists
    half: bool = False  # on the cast to halfvec

    @property
    def probes(self) -> int:
        """For ivfflat, √lists as pgvector's README advises."""
        return math.isqrt(self.lists)

    def matches(self, index: Index) -> bool:
        found = (index.method, index.opclass, index.key, index.partial)
        return found == (self.method, self.opclass, self.key, False) and self.required <= index.options

    def suits(self, index: Index) -> bool:
        return self.matches(index) and self.outgrown(index) is None

    def outgrown(self, index: Index) -> int | None:
        """The lists of an index that matches, where its rows ask for more than twice as many now, or less than half.

        None where it's as it should be, or is as configured; more lists than there is memory for now are no fault.
        """
        if self.method != "ivfflat" or self.required:
            return None
        lists = index.option("lists")
        most = self.short.lists if self.short else self.lists
        return lists if lists > 2 * most or 2 * lists < self.lists else None

    def difference(self, index: Index) -> str:
        """What the index is and what is wanted, as one clause."""
        return (
            f"it is {index.method} with {index.opclass} on {index.key}"
            f" ({', '.join(sorted(index.options)) or 'no options'}{', partial' if index.partial else ''}),"
            f" wanted is {self.method} with {self.opclass} on {self.key} ({self.options})"
        )


@dataclass(frozen=True)
class NoIndex:
    """Why there is to be no index, and the next step if there is one; `wanted` where the settings ask for it, and it
    can't be had."""

    reason: str
    hint: str | None = None
    wanted: bool = True


def plan(
    target: Target,
    settings: Settings,
    extension: Extension,
    dimensions: int | None,
    rows: int,
    memory_kb: int | None = None,
) -> Plan | NoIndex:
    """What to build for so many rows, with so much memory at the most, or why nothing can be built. Pure.

    Unless configured, ivfflat gets rows / 1000 lists up to a million rows, √rows above (pgvector's README), and at
    least 50 rows a list. It is never built with less memory than it asks for, so fewer lists have to do where there is
    less.
    """
    if settings.index == "none":
        return NoIndex("OM_INDEX is none", wanted=False)
    if dimensions is None:
        return NoIndex(
            f"{quote(target.vector)} has no dimensions",
            f"Set OM_VEC_DIM or OM_TIER, then: {ANEW}.",
        )
    if settings.index == "hnsw" and extension.version < HNSW:
        return NoIndex("hnsw came with pgvector 0.5.0", "ALTER EXTENSION vector UPDATE;")
    half = on_halfvec(settings, dimensions)
    if dimensions > HALFVEC_DIMENSIONS:
        reason = f"no index of pgvector takes more than {HALFVEC_DIMENSIONS:,} dimensions"
        return NoIndex(reason, "Set OM_INDEX=none.")
    if dimensions == 1 and settings.index == "ivfflat" and settings.index_metric != "l2":
        return NoIndex(
            f"ivfflat by {settings.index_metric} needs two dimensions or more",
            f"Set OM_INDEX=hnsw, then: {INDEX_ANEW}.",
        )
    if half and extension.version < HALFVEC:
        return NoIndex(
            ("OM_INDEX_HALFVEC needs" if settings.index_halfvec else f"more than {INDEX_DIMENSIONS:,} dimensions need")
            + " halfvec, which came with pgvector 0.7.0",
            "ALTER EXTENSION vector UPDATE;",
        )
    item = item_size(dimensions, half)
    if settings.index == "ivfflat":
        lists = settings.index_lists or lists_for(rows)
        if not lists:
            return NoIndex(
                f"ivfflat needs {ROWS_A_LIST} rows to learn from, there are {rows:,}",
                f"When there are more rows: {INDEX_ANEW}. Or set OM_INDEX=hnsw, which needs none.",
                wanted=False,
            )
        short = None
        memory = ivfflat_memory(lists, dimensions, item, rows)
        if memory_kb is not None and memory > 1024 * memory_kb:
            short = Short(lists, kilobytes(memory))
            # bisect finds the first that needs more
            lists = bisect_right(
                range(lists), 1024 * memory_kb, key=lambda n: ivfflat_memory(n + 1, dimensions, item, rows)
            )
            memory = ivfflat_memory(lists, dimensions, item, rows)
            if not lists:
                for_one = ivfflat_memory(1, dimensions, item, rows)
                return NoIndex(
                    f"{NOT_ONE_LIST % _size(kilobytes(for_one))}, and gets {_size(memory_kb)} MB",
                    f"{more_memory(short.memory_kb)} {INDEX_ANEW}.",
                )
        options = {"lists": lists}
        required = set(options) if settings.index_lists and not short else set()
        size = PAGE * (_pages(item + IVFFLAT_ITEM, rows) + lists)
    else:
        options = {"m": settings.index_m, "ef_construction": settings.index_ef_construction}
        required = set(options)
        short, memory = None, hnsw_memory(rows, settings.index_m, item)
        size = PAGE * _pages(item + HNSW_ITEM + 12 * settings.index_m, rows)
    ext, vector = quote(extension.schema), quote(target.vector)
    opclass = f"{'halfvec' if half else 'vector'}_{settings.index_metric}_ops"
    cast = f"::{ext}.halfvec({dimensions})" if half else ""
    return Plan(
        method=settings.index,
        opclass=opclass,
        key=f"{target.vector}::halfvec({dimensions})" if half else target.vector,
        required=frozenset(f"{name}={options[name]}" for name in required),
        expression=fill(expression(opclass, half, dimensions), {"ext": ext, "vector": vector}),
        options=joined(", ", (SQL(f"{name} = {value}") for name, value in options.items())),
        memory_kb=kilobytes(memory),
        size=size,
        query=f"ORDER BY {vector}{cast} OPERATOR({ext}.{OPERATORS[settings.index_metric]}) $1{cast}",
        lists=options.get("lists", 0),
        short=short,
        half=half,
    )


def expression(opclass: str, half: bool, dimensions: int) -> str:
    """What the index is on, as SQL of {vector} and {ext}, the extension's schema."""
    return (f"({{vector}}::{{ext}}.halfvec({dimensions}))" if half else "{vector}") + f" {{ext}}.{opclass}"


def scarce(plan: Plan, memory_kb: int) -> tuple[str, str] | None:
    """What to say, and the hint, where a build gets less memory than the index asks for."""
    if plan.short:
        lists, needed = plan.short.lists, plan.short.memory_kb
        message = FEWER_LISTS % (f"{plan.lists:,}", f"{lists:,}", _size(memory_kb), _size(needed))
        return message, f"{more_memory(needed)} {INDEX_ANEW} --rebuild."
    if plan.memory_kb > memory_kb:
        return SLOWER % (_size(plan.memory_kb), _size(memory_kb)), f"{_spared(plan.memory_kb)}."
    return None


def more_memory(kilobytes: int) -> str:
    return f"{_spared(kilobytes)}, then:"


def _spared(kilobytes: int) -> str:
    size = _megabytes(kilobytes)
    return (
        f"If the server can spare it: OM_INDEX_MEMORY={size}, or behind a pooler"
        f" ALTER ROLE CURRENT_USER SET maintenance_work_mem = '{size}'"
    )


def _megabytes(kilobytes: int) -> str:
    return f"{math.ceil(kilobytes / 1024)}MB"


def _size(kilobytes: int) -> str:
    return f"{kilobytes / 1024:,.0f}"


def on_halfvec(settings: Settings, dimensions: int) -> bool:
    """Whether the index is on a cast to halfvec: wanted, or the only one there can be."""
    return settings.index_halfvec or dimensions > INDEX_DIMENSIONS


def item_size(dimensions: int, half: bool) -> int:
    """Bytes of a vector in memory, or of its cast to halfvec."""
    return 8 + (2 if half else 4) * dimensions


def lists_for(rows: N) -> N:
    """pgvector's rule, and no more than there are rows to learn them from."""
    return least(up_to(rows, 1_000_000, lists_by_share(rows), root(rows)), rows // ROWS_A_LIST)


def lists_by_share(rows: N) -> N:
    return greatest(rows // 1000, 1)


def lists_to_try(rows: int) -> list[int]:
    """By either rule for so many rows (at least ROWS_A_LIST), and as many as there can be."""
    most = rows // ROWS_A_LIST
    return sorted({min(number, most) for number in (lists_by_share(rows), root(rows), most)})


def ivfflat_memory(lists: N, dimensions: int, item: int, rows: N) -> N:
    """Bytes that pgvector checks against maintenance_work_mem before it begins (src/ivfkmeans.c): room for all samples
    that it wants, and what it keeps of those that it finds, where more rows may have come until then."""
    samples = greatest(ROWS_A_LIST * lists, LEAST_SAMPLES)
    vectors = (samples + 2 * lists) * item + 4 * dimensions * lists
    found = least(samples, rows + rows // 4 + 1000)
    bounds = 4 * found * (lists + 2) + 8 * lists * lists + 8 * lists
    return vectors + bounds + 1024**2


def hnsw_memory(rows: N, m: int, item: int) -> N:
    """Bytes of the graph in memory: vector, 2 * m neighbours on the lowest layer, the element; a third more for what
    the allocator keeps (measured: without it 7 to 39 % too little) and 1 MiB for small tables."""
    return 4 * (item + 2 * m * 26 + 300) * rows // 3 + 1024**2


def kilobytes(memory: N) -> N:
    return (memory + 1023) // 1024


def _pages(item: int, rows: int) -> int:
    """Of an index: an item is never divided between two."""
    return -(-rows // max(1, (PAGE - PAGE_HEAD) // item))
