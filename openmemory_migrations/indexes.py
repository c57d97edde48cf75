"""What the vector index should be: kind, operator class, options and memory, from settings and rows. Pure."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from .catalog import Extension, Index
from .errors import ANEW, INDEX_ANEW
from .settings import Settings
from .target import Target, quote

ROWS_A_LIST = 50  # with fewer ivfflat finds too little: recall@10 0.18 was reported for 200 rows in 100 lists
LEAST_SAMPLES = 10_000  # rows that ivfflat samples at least, src/ivfbuild.c
INDEX_DIMENSIONS, HALFVEC_DIMENSIONS = 2000, 4000  # pgvector's limits for an index on vector and on halfvec
PAGE, PAGE_HEAD = 8192, 24 + 8  # bytes of an index's page, of its two headers
# bytes that an item has beside its vector: in ivfflat's lists (src/ivfflat.h), in hnsw's graph, whose 2 * m neighbours
# on the lowest layer have 6 each (src/hnsw.h)
IVFFLAT_ITEM, HNSW_ITEM = 12, 84
OPERATORS = {"l2": "<->", "cosine": "<=>", "ip": "<#>"}
DEFAULTS = {"ivfflat": {"lists=100"}, "hnsw": {"m=16", "ef_construction=64"}}  # what reloptions leaves out


@dataclass(frozen=True)
class Plan:
    """An index that can be built. `expression` and `options` are SQL, `query` is the ORDER BY that uses it."""

    method: str
    opclass: str
    key: str
    required: frozenset[str]  # options that an index found in place must have
    expression: str
    options: str
    memory_kb: int
    size: int  # bytes, estimated
    query: str
    lists: int  # of ivfflat, else 0

    @property
    def probes(self) -> int:
        """For ivfflat, √lists as pgvector's README advises."""
        return math.isqrt(self.lists)

    def matches(self, index: Index) -> bool:
        names = {option.partition("=")[0] for option in index.options}
        defaults = {option for option in DEFAULTS[self.method] if option.partition("=")[0] not in names}
        return (
            (index.method, index.opclass, index.partial) == (self.method, self.opclass, False)
            and _key(index.key) == self.key
            and self.required <= index.options | defaults
        )

    def suits(self, index: Index) -> bool:
        return self.matches(index) and self.outgrown(index) is None

    def outgrown(self, index: Index) -> int | None:
        """The lists of an index that matches, where its rows ask for more than twice as many now, or less than half.

        None where it's as it should be, or is as configured.
        """
        if self.method != "ivfflat" or self.required:
            return None
        (option,) = [text for text in index.options if text.startswith("lists=")] or DEFAULTS["ivfflat"]
        lists = int(option.partition("=")[2])
        return lists if max(lists, self.lists) > 2 * min(lists, self.lists) else None

    def difference(self, index: Index) -> str:
        """What the index is and what is wanted, as one clause."""
        return (
            f"it is {index.method} with {index.opclass} on {index.key}"
            f" ({', '.join(sorted(index.options)) or 'no options'}{', partial' if index.partial else ''}),"
            f" wanted is {self.method} with {self.opclass} on {self.key} ({self.options})"
        )


@dataclass(frozen=True)
class NoIndex:
    """Why there is to be no index, and the next step if there is one."""

    reason: str
    hint: str | None = None


def plan(target: Target, settings: Settings, extension: Extension, dimensions: int | None, rows: int) -> Plan | NoIndex:
    """What to build for so many rows, or why nothing can be built. Pure.

    Unless configured, ivfflat gets rows / 1000 lists up to a million rows, √rows above (pgvector's README), and at
    least 50 rows a list.
    """
    if settings.index == "none":
        return NoIndex("OM_INDEX is none")
    if dimensions is None:
        return NoIndex(
            f"{quote(target.vector)} has no dimensions",
            f"Set OM_VEC_DIM or OM_TIER, then: {ANEW}.",
        )
    if settings.index == "hnsw" and extension.version < (0, 5):
        return NoIndex("hnsw came with pgvector 0.5.0", "ALTER EXTENSION vector UPDATE;")
    half = on_halfvec(settings, dimensions)
    if dimensions > HALFVEC_DIMENSIONS:
        return NoIndex(f"no index of pgvector takes more than {HALFVEC_DIMENSIONS:,} dimensions")
    if half and extension.version < (0, 7):
        return NoIndex(
            ("OM_INDEX_HALFVEC needs" if settings.index_halfvec else f"more than {INDEX_DIMENSIONS:,} dimensions need")
            + " halfvec, which came with pgvector 0.7.0",
            "ALTER EXTENSION vector UPDATE;",
        )
    item = 8 + (2 if half else 4) * dimensions
    if settings.index == "ivfflat":
        lists = settings.index_lists or min(_lists(rows), rows // ROWS_A_LIST)
        if not lists:
            return NoIndex(
                f"ivfflat needs {ROWS_A_LIST} rows to learn from, there are {rows:,}",
                f"When there are more rows: {INDEX_ANEW}. Or set OM_INDEX=hnsw, which needs none.",
            )
        options = {"lists": lists}
        required = set(options) if settings.index_lists else set()
        memory = _ivfflat_memory(lists, dimensions, item)
        size = PAGE * (_pages(item + IVFFLAT_ITEM, rows) + lists)
    else:
        options = {"m": settings.index_m, "ef_construction": settings.index_ef_construction}
        required = set(options)
        memory = _hnsw_memory(rows, settings.index_m, item)
        size = PAGE * _pages(item + HNSW_ITEM + 12 * settings.index_m, rows)
    ext, vector = quote(extension.schema), quote(target.vector)
    opclass = f"{'halfvec' if half else 'vector'}_{settings.index_metric}_ops"
    cast = f"::{ext}.halfvec({dimensions})" if half else ""
    return Plan(
        method=settings.index,
        opclass=opclass,
        key=f"{target.vector}::halfvec({dimensions})" if half else target.vector,
        required=frozenset(f"{name}={options[name]}" for name in required),
        expression=(f"({vector}{cast})" if half else vector) + f" {ext}.{opclass}",
        options=", ".join(f"{name} = {value}" for name, value in options.items()),
        memory_kb=math.ceil(memory / 1024),
        size=size,
        query=f"ORDER BY {vector}{cast} OPERATOR({ext}.{OPERATORS[settings.index_metric]}) $1{cast}",
        lists=options.get("lists", 0),
    )


def on_halfvec(settings: Settings, dimensions: int) -> bool:
    """Whether the index is on a cast to halfvec: wanted, or the only one there can be."""
    return settings.index_halfvec or dimensions > INDEX_DIMENSIONS


def _lists(rows: int) -> int:
    return max(1, rows // 1000) if rows <= 1_000_000 else math.isqrt(rows)


def _ivfflat_memory(lists: int, dimensions: int, item: int) -> int:
    """Bytes that pgvector checks against maintenance_work_mem before it begins (src/ivfkmeans.c)."""
    samples = max(ROWS_A_LIST * lists, LEAST_SAMPLES)
    vectors = (samples + 2 * lists) * item + 4 * lists * dimensions
    bounds = 4 * samples * (lists + 2) + 8 * lists * lists + 8 * lists
    return vectors + bounds + 1024**2


def _hnsw_memory(rows: int, m: int, item: int) -> int:
    """Bytes of the graph in memory: vector, 2 * m neighbours on the lowest layer, the element; a third more for what
    the allocator keeps (measured: without it 7 to 39 % too little) and 1 MiB for small tables."""
    return 4 * rows * (item + 2 * m * 26 + 300) // 3 + 1024**2


def _pages(item: int, rows: int) -> int:
    """Of an index: an item is never divided between two."""
    return -(-rows // max(1, (PAGE - PAGE_HEAD) // item))


def is_on(index: Index, column: str) -> bool:
    """Whether it is on that column, or on its cast to halfvec."""
    return _key(index.key).partition("::halfvec(")[0] == column


def _key(text: str) -> str:
    """An index key with the decoration taken off that pg_get_indexdef gives a cast: `((v)::s.halfvec(3))`."""
    found = re.fullmatch(r'\(*"?(.+?)"?\)*::(?:.+\.)?halfvec\((\d+)\)\)*', text)
    return f"{found[1]}::halfvec({found[2]})" if found else text
