"""Exact nearest neighbours of a few queries among rows that pass by in batches, as a search in memory finds them. Pure.

It is the measure for what an index finds: every distance in float64, so that its own error is far below a server's,
which computes in float32. Memory: queries x most and one batch's distances, whatever the number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

METRICS = ("l2", "cosine", "ip")
Array = npt.NDArray[np.float64]
Values = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]

# a server's distance may be this much larger than ours, as a share of what the query is long: float32 has 24 bits, of
# which sums over some thousand elements lose a few
TOLERANCE = 1e-5
AT_ONCE = 256  # queries: their distances to a batch of 4,000 rows are 8 MiB, of which a few are at work


@dataclass(frozen=True)
class Query:
    """A vector, (dimensions,) float32, and the rows that it is searched among: 0 stands for no condition."""

    vector: Values
    sector: int = 0
    user: int = 0


class Exact:
    """The `most` smallest distances of each query, by every metric; `available` rows were there to be found."""

    def __init__(self, queries: Sequence[Query], most: int) -> None:
        self.most = most
        self.available = np.zeros(len(queries), np.int64)
        self._best = {metric: np.full((len(queries), most), np.inf) for metric in METRICS}
        self._groups: dict[tuple[int, int], list[int]] = {}
        for number, query in enumerate(queries):
            self._groups.setdefault((query.sector, query.user), []).append(number)
        self._vectors = [np.asarray(query.vector, np.float64) for query in queries]

    def add(
        self, values: npt.NDArray[np.float32], sectors: npt.NDArray[np.int64], users: npt.NDArray[np.int64]
    ) -> None:
        """Rows of a table: `values` (rows, dimensions) float32, and the number of each row's sector and user."""
        for (sector, user), numbers in self._groups.items():
            wanted = ((sectors == sector) | (sector == 0)) & ((users == user) | (user == 0))
            if not wanted.any():
                continue
            rows = (values if wanted.all() else values[wanted]).astype(np.float64)
            self.available[numbers] += len(rows)
            for first in range(0, len(numbers), AT_ONCE):
                self._nearer(numbers[first : first + AT_ONCE], rows)

    def _nearer(self, numbers: list[int], rows: Array) -> None:
        queries = np.stack([self._vectors[number] for number in numbers])
        for metric, found in distances(queries, rows).items():
            best = np.concatenate([self._best[metric][numbers], found], axis=1)
            self._best[metric][numbers] = np.partition(best, self.most - 1, axis=1)[:, : self.most]

    def smallest(self, metric: str) -> Array:
        """(queries, most) distances, ascending; inf where there were fewer rows."""
        return np.sort(self._best[metric], axis=1)


def distances(queries: Array, rows: Array) -> dict[str, Array]:
    """(queries, rows) distances by each metric, as pgvector's <->, <=> and <#> give them.

    A vector of zeros has no cosine; it comes last, as no index of that metric finds it.
    """
    dot = queries @ rows.T
    of_queries, of_rows = (np.einsum("ij,ij->i", array, array) for array in (queries, rows))
    squares = of_queries[:, None] + of_rows[None, :] - 2 * dot
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = 1 - dot / np.sqrt(of_queries[:, None] * of_rows[None, :])
    return {"l2": np.sqrt(np.maximum(squares, 0)), "cosine": np.nan_to_num(cosine, nan=np.inf), "ip": -dot}


def recall(metric: str, query: Values, exact: Array, found: Sequence[float], k: int) -> float | None:
    """Which share of the `k` true neighbours a search has found; None where there is none to be found.

    `exact` are the k + 1 smallest distances, `found` those of the rows that the search gave. The row that the query was
    taken from doesn't count on either side: every search finds that. Rows are told by their distances, so that of two
    at the same distance either will do.
    """
    length = float(np.linalg.norm(query.astype(np.float64)))
    scale = TOLERANCE * {"l2": length, "cosine": 1.0, "ip": length**2}[metric]
    itself = -(length**2) if metric == "ip" else 0.0
    true = _without(exact[np.isfinite(exact)], itself, scale)[:k]
    if not len(true):
        return None
    got = _without(np.sort(np.asarray(found, np.float64)), itself, scale)[: len(true)]
    return float(np.count_nonzero(got <= true[-1] + scale)) / len(true)


def _without(ascending: Array, itself: float, scale: float) -> Array:
    """The distances without one that is the query's own row, if there is such a one."""
    if not len(ascending):
        return ascending
    nearest = int(np.argmin(np.abs(ascending - itself)))
    return np.delete(ascending, nearest) if abs(ascending[nearest] - itself) <= scale else ascending
