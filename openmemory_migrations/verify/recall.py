"""How well searches do: what an index finds of the true neighbours, and how fast, by sector and user."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .neighbours import recall
from .queries import ALL, Asked
from .search import EVERY_ROW, PLANNED, SESSION, Answer, Searched, Searcher, Way

EXACT_QUERIES = 10  # each reads every row
ENOUGH = 0.995  # nobody has to look at more than that takes


@dataclass(frozen=True)
class Figures:
    """Of some queries: `recall` by the index's metric, `in_memory` by OpenMemory's cosine in memory; both 0 to 1.

    None where there was nothing to be found. `short` are queries that brought fewer rows than were asked for and there.
    """

    queries: int
    recall: float | None
    in_memory: float | None
    short: int
    p50_ms: float
    p95_ms: float


@dataclass(frozen=True)
class Tried:
    """One way to search: what it finds over all sectors, and by group."""

    way: Way
    by_index: int  # of the queries, by the plan
    all: Figures
    groups: Mapping[str, Figures]


@dataclass(frozen=True)
class Quality:
    """`session` is a search by the index with the settings that a session has by default, `every_row` an exact one.

    `planned` is what the planner makes of it now: that may change with the next ANALYZE, and what `session` finds is
    then what there is. `tried` are searches by the index with other settings.
    """

    k: int
    rows: int  # that were searched
    dimensions: int
    wanted: float  # recall
    searched: Searched
    queries: int
    defaults: Mapping[str, str]  # what a session has, of the settings that count for this index
    planned: Tried
    session: Tried
    every_row: Tried
    tried: list[Tried]
    pages: float  # that such a search as `session` reads, in the mean

    @property
    def best(self) -> Tried | None:
        return fastest(self.tried, self.wanted)


def fastest(tried: Sequence[Tried], wanted: float) -> Tried | None:
    """Of those that reach the wanted recall; one that brings as many rows as asked for before one that doesn't."""
    enough = [one for one in tried if (one.all.recall or 0) >= wanted]
    return min(enough, key=lambda one: (one.all.short > 0, one.all.p50_ms), default=None)


@dataclass(frozen=True)
class Measurement:
    """Asks queries in one way after the other. The true neighbours have to be there, and of the same snapshot."""

    searcher: Searcher
    asked: Asked
    searched: Searched
    told: Callable[[Tried], object] = bool

    def all(self, series: Sequence[Sequence[Way]], wanted: float) -> Quality | None:
        """None where there is nothing to ask."""
        if not self.asked.names.get(ALL):
            return None
        every_row = self.one(EVERY_ROW, self.few())
        planned = self.planned() if self.searched.method else every_row
        session = self.one(SESSION) if self.searched.method else every_row
        tried = self.sweep(series)
        return Quality(
            k=self.asked.k,
            rows=self.asked.rows,
            dimensions=len(self.asked.queries[0].vector),
            wanted=wanted,
            searched=self.searched,
            queries=len(self.asked.queries),
            defaults=self.searcher.defaults([name for one in tried for name in one.way.settings]),
            planned=planned,
            session=session,
            every_row=every_row,
            tried=tried,
            pages=self.pages(SESSION) if self.searched.method else 0.0,
        )

    def few(self) -> list[int]:
        """Queries for what reads every row: some over all sectors, and one or two of each kind of user."""
        users = [of[:2] for name, of in self.asked.names.items() if "users" in name]
        return sum(users, self.asked.names[ALL][:EXACT_QUERIES])

    def planned(self) -> Tried:
        """As the planner has it: what it reads row by row is exact, and a few such searches tell how long they take."""
        by_index = self.by_index(PLANNED)
        others = [number for number in range(len(self.asked.queries)) if number not in set(by_index)]
        return self.one(PLANNED, sorted([*by_index, *others[:EXACT_QUERIES]]), len(by_index))

    def by_index(self, way: Way) -> list[int]:
        """The queries that take the index, by their plans."""
        with self.searcher.way(way):
            pairs = enumerate(zip(self.asked.queries, self.asked.texts, strict=True))
            return [number for number, (query, text) in pairs if self.searcher.takes_index(query, text)]

    def pages(self, way: Way) -> float:
        """How many pages a search reads, in the mean over a few."""
        with self.searcher.way(way):
            numbers = self.asked.names[ALL][:EXACT_QUERIES]
            return float(np.mean([self.searcher.pages(self.asked.queries[n], self.asked.texts[n]) for n in numbers]))

    def sweep(self, series: Sequence[Sequence[Way]], enough: float = ENOUGH) -> list[Tried]:
        """Each series as far as the first way that finds enough."""
        tried = []
        for ever_more in series:
            for way in ever_more:
                tried.append(self.one(way, self.asked.names[ALL]))
                found = tried[-1].all
                if found.recall is None or (found.recall >= enough and not found.short):
                    break
        return tried

    def one(self, way: Way, numbers: Sequence[int] = (), by_index: int | None = None) -> Tried:
        """These queries, or all; `by_index` where it is known how many take the index."""
        asked, searcher = self.asked, self.searcher
        numbers = numbers or range(len(asked.queries))
        with searcher.way(way):
            if by_index is None:
                by_index = sum(searcher.takes_index(asked.queries[number], asked.texts[number]) for number in numbers)
            answers = {number: searcher.ask(asked.queries[number], asked.texts[number]) for number in numbers}
        groups = {
            name: _found(asked, self.searched.metric, {number: answers[number] for number in of if number in answers})
            for name, of in asked.names.items()
            if any(number in answers for number in of)
        }
        none = Figures(0, None, None, 0, 0.0, 0.0)
        found = Tried(way, by_index, groups.pop(ALL, none), groups)
        self.told(found)
        return found


def _found(asked: Asked, metric: str, answers: Mapping[int, Answer]) -> Figures:
    milliseconds = [1000 * answer.seconds for answer in answers.values()]

    def mean(by: str) -> float | None:
        exact = asked.exact.smallest(by)
        shares = [
            recall(by, asked.queries[number].vector, exact[number], answer.distances[by], asked.k)
            for number, answer in answers.items()
        ]
        known = [share for share in shares if share is not None]
        return float(np.mean(known)) if known else None

    short = sum(
        len(answer.distances[metric]) < min(asked.k, int(asked.exact.available[number]))
        for number, answer in answers.items()
    )
    p50, p95 = (float(np.percentile(milliseconds, share)) for share in (50, 95))
    return Figures(len(answers), mean(metric), mean("cosine"), short, p50, p95)
