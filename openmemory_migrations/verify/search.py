"""OpenMemory's own query on the server, in the ways in which a session may run it: what it finds, and how fast.

Inside the caller's transaction; the settings of one way are put back before the next.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ..db.catalog import Extension, Index
from ..db.database import Database
from ..index.choice import METHODS, OPERATORS
from ..sql import SQL, Fragment, fill, joined, quote
from .neighbours import METRICS, Query
from .stream import Groups

# what OpenMemory sends, but for the operator of another metric and the cast of a halfvec index
OWN = "SELECT {key}, {distance} AS distance FROM {table}{where} ORDER BY {distance} LIMIT {most}"
# the same rows with their distances by every metric, of the vectors themselves and not of what a cast has left of them
DISTANCES = (
    "SELECT {distances} FROM (SELECT {vector} AS found FROM {table}{where} ORDER BY {distance} LIMIT {most}) AS nearest"
)
# a plan that sorts, or reads all rows, is passed over for any that takes the index
FORCED = {"enable_seqscan": "off", "enable_bitmapscan": "off", "enable_sort": "off"}
EXACT = {"enable_indexscan": "off"}
MOST_EF, MOST_PROBES = 1000, 32_768  # pgvector's limits
ITERATIVE = (0, 8)  # iterative scans came with pgvector 0.8.0


@dataclass(frozen=True)
class Searched:
    """What is searched by: the metric, and the kind of index with its options; `method` None is every row."""

    metric: str = "l2"
    method: str | None = None
    half: bool = False
    options: Mapping[str, int] = field(default_factory=dict)

    @staticmethod
    def fits(index: Index) -> bool:
        """Whether it is one of all rows, by a metric that is known here."""
        kind, _, metric = index.opclass.removesuffix("_ops").partition("_")
        return kind in ("vector", "halfvec") and metric in OPERATORS and index.method in METHODS and not index.partial

    @classmethod
    def by(cls, index: Index | None, lists: int | None = None) -> Searched:
        """`lists` where the index has others than its options say."""
        if index is None:
            return cls()
        kind, metric, _ = index.opclass.split("_")
        options = {name: int(value) for name, _, value in (option.partition("=") for option in index.options)}
        return cls(metric, index.method, kind == "halfvec", options | ({"lists": lists} if lists else {}))


def listed(settings: Mapping[str, str]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in settings.items())


@dataclass(frozen=True)
class Way:
    """Settings of a session; `by` is what finds the rows: whatever the planner takes, or what we make it take."""

    by: Literal["planner", "index", "every row"]
    settings: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return listed(self.settings) or f"by {self.by}"

    @property
    def sql(self) -> str:
        return " ".join(f"SET {name} = {value};" for name, value in self.settings.items())


PLANNED, SESSION, EVERY_ROW = Way("planner"), Way("index"), Way("every row")


def ways(searched: Searched, extension: Extension) -> list[list[Way]]:
    """The settings worth trying for an index, in series of ever more that is looked at. Pure."""
    if searched.method == "ivfflat":
        lists = searched.options["lists"]
        doubled = [2**power for power in range(math.ceil(math.log2(lists + 1)) + 1)]
        probes = sorted({min(number, lists) for number in doubled})
        return [[Way("index", {"ivfflat.probes": str(number)}) for number in probes]]
    if searched.method == "hnsw":
        efs = [40, 80, 160, 320, 640, MOST_EF]
        plain = [Way("index", {"hnsw.ef_search": str(ef)}) for ef in efs]
        if extension.version < ITERATIVE:
            return [plain]
        return [
            plain,
            [Way("index", {**way.settings, "hnsw.iterative_scan": "strict_order"}) for way in plain],
        ]
    return []


@dataclass(frozen=True)
class Answer:
    """One query's: distances of the rows that came, by metric, and the seconds that the application's query took."""

    distances: Mapping[str, list[float]]
    seconds: float


class Searcher:
    """Asks for the `most` nearest rows of a query, among those of its sector and user."""

    def __init__(
        self,
        db: Database,
        extension: Extension,
        groups: Groups,
        key: Sequence[str],
        dimensions: int,
        searched: Searched,
        most: int,
    ) -> None:
        self.db, self.groups = db, groups
        query = "CAST(CAST(:query AS text) AS {ext}.vector)"  # asyncpg knows text, and not vector
        left, right = (
            ("CAST({vector} AS {half})", f"CAST({query} AS {{half}})") if searched.half else ("{vector}", query)
        )
        distance = f"{left} OPERATOR({{ext}}.{OPERATORS[searched.metric]}) {right}"
        distances = ", ".join(f"found OPERATOR({{ext}}.{OPERATORS[metric]}) {query}" for metric in METRICS)
        self.own = OWN.replace("{distance}", distance)
        self.distances = DISTANCES.replace("{distances}", distances).replace("{distance}", distance)
        ext = quote(extension.schema)
        self.names: dict[str, Fragment] = {
            "ext": ext,
            "half": fill("{ext}.halfvec({size})", {"ext": ext, "size": dimensions}),
            "key": joined(", ", map(quote, key)) or SQL("ctid"),
            "most": most,
        }

    def ask(self, query: Query, text: str) -> Answer:
        """`text` is the vector as pgvector reads it. The first of two statements warms the caches for the second."""
        self.db.stop.check()  # statements as short as these are over before a cancel comes
        template, parameters = self._where(self.distances, query, text)
        rows = self.db.rows(template, parameters, **self.names)
        found = {metric: [_number(row[place]) for row in rows] for place, metric in enumerate(METRICS)}
        template, parameters = self._where(self.own, query, text)
        began = time.perf_counter()
        self.db.rows(template, parameters, **self.names)
        return Answer(found, time.perf_counter() - began)

    def takes_index(self, query: Query, text: str) -> bool:
        """Whether the plan is the index's order, and not a sort."""
        template, parameters = self._where("EXPLAIN (COSTS OFF) " + self.own, query, text)
        return any("Order By:" in line for (line,) in self.db.rows(template, parameters, **self.names))

    def pages(self, query: Query, text: str) -> int:
        """How many pages a search reads of the index and of the rows that it finds."""
        template, parameters = self._where(
            "EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) " + self.own, query, text
        )
        plan = self.db.value(template, parameters, **self.names)
        whole = (plan if isinstance(plan, list) else json.loads(plan))[0]["Plan"]
        return int(whole["Shared Hit Blocks"] + whole["Shared Read Blocks"])

    def defaults(self, names: Sequence[str]) -> dict[str, str]:
        """What the session has these settings at: by pgvector, the server, the database or the role."""
        values = {name: self.db.value("SELECT current_setting(:name, true)", {"name": name}) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    @contextmanager
    def way(self, way: Way) -> Iterator[None]:
        more = {"index": FORCED, "every row": EXACT, "planner": {}}[way.by]
        with self.db.attempt(keep=False):
            if settings := {**more, **way.settings}:
                self.db.set_local(settings)
            yield

    def _where(self, template: str, query: Query, text: str) -> tuple[str, dict[str, str]]:
        conditions, parameters = [], {"query": text}
        for name, column, number, names in (
            ("sector", self.groups.sector_column, query.sector, self.groups.sectors),
            ("user", self.groups.user_column, query.user, self.groups.users),
        ):
            if column is not None and number:
                self.names[name] = quote(column)
                conditions.append(f"{{{name}}} = :{name}")
                parameters[name] = names[number - 1]
        where = " WHERE " + " AND ".join(conditions) if conditions else ""
        return template.replace("{where}", where), parameters


def text_of(query: Query) -> str:
    """The vector as pgvector's input takes it, every float32 exactly."""
    return "[" + ",".join(np.format_float_scientific(value, unique=True) for value in query.vector) + "]"


def _number(distance: float | None) -> float:
    return math.inf if distance is None or math.isnan(distance) else distance
