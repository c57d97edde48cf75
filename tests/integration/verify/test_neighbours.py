"""The measure of a search: true neighbours against a search by hand, distances against pgvector's, and recall."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmemory_migrations.verify.neighbours import METRICS, TOLERANCE, Exact, Query, distances, recall
from tests.support.openmemory import Database

Values = npt.NDArray[np.float32]
FUNCTIONS: dict[str, Callable[[npt.NDArray[np.float64], npt.NDArray[np.float64]], float]] = {
    "l2": lambda a, b: float(np.sqrt(((a - b) ** 2).sum())),
    "cosine": lambda a, b: 1 - float(a @ b) / float(np.sqrt((a @ a) * (b @ b))) if a.any() and b.any() else np.inf,
    "ip": lambda a, b: -float(a @ b),
}
OPERATORS = {"l2": "<->", "cosine": "<=>", "ip": "<#>"}
ODD = [0.0, -0.0, 1e-45, -1e-45, 1.1e-38, 1.0, -1.0, 3.0]


def by_hand(query: Query, values: Values, sectors: Sequence[int], users: Sequence[int], metric: str) -> list[float]:
    """All distances of the rows that the query is searched among, ascending: one row after the other."""
    return sorted(
        FUNCTIONS[metric](query.vector.astype(np.float64), value.astype(np.float64))
        for value, sector, user in zip(values, sectors, users, strict=True)
        if query.sector in (0, sector) and query.user in (0, user)
    )


def assert_exact(queries: Sequence[Query], batches: Sequence[tuple[Values, list[int], list[int]]], most: int) -> None:
    exact = Exact(queries, most)
    for values, sectors, users in batches:
        exact.add(values, np.array(sectors, np.int64), np.array(users, np.int64))
    values = np.concatenate([batch[0] for batch in batches])
    sectors, users = ([number for batch in batches for number in batch[place]] for place in (1, 2))
    for metric in METRICS:
        found = exact.smallest(metric)
        for number, query in enumerate(queries):
            expected = by_hand(query, values, sectors, users, metric)
            assert exact.available[number] == len(expected)
            padded = (expected + [np.inf] * most)[:most]
            # the square root makes much of the last bits near zero; vectors are up to ten long
            np.testing.assert_allclose(found[number], padded, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("most", [1, 11, 500])
def test_the_true_neighbours_are_those_of_a_search_by_hand(most: int) -> None:
    random = np.random.default_rng(most)
    batches = [
        (
            random.standard_normal((rows, 24), dtype="<f4"),
            random.integers(0, 4, rows).tolist(),
            random.integers(0, 3, rows).tolist(),
        )
        for rows in (1, 300, 0, 7, 120)
    ]
    of_rows = [Query(value, sector, 0) for value, sector, _ in zip(*batches[1], strict=True)][:8]
    others = [Query(random.standard_normal(24, dtype="<f4"), sector, user) for sector in range(4) for user in range(3)]

    assert_exact([*of_rows, *others, Query(others[0].vector, sector=9)], batches, most)


rows_of = st.lists(
    st.tuples(st.lists(st.sampled_from(ODD), min_size=3, max_size=3), st.integers(0, 2), st.integers(0, 2)), max_size=9
)


@given(st.lists(rows_of, min_size=1, max_size=3), rows_of, st.integers(1, 12))
def test_equal_rows_zeros_and_denormals_are_neighbours_as_any_other(
    batches: list[list[tuple[list[float], int, int]]], queries: list[tuple[list[float], int, int]], most: int
) -> None:
    given = [
        (
            np.array([values for values, _, _ in rows], "<f4").reshape(-1, 3),
            [sector for _, sector, _ in rows],
            [user for _, _, user in rows],
        )
        for rows in batches
    ]
    assert_exact([Query(np.array(values, "<f4"), sector, user) for values, sector, user in queries], given, most)


def test_batches_and_the_order_of_rows_make_no_difference() -> None:
    values = np.random.default_rng(3).standard_normal((400, 8), dtype="<f4")
    nothing = np.zeros(len(values), np.int64)
    whole, parts = (Exact([Query(value) for value in values[:5]], 11) for _ in range(2))
    whole.add(values, nothing, nothing)
    shuffled = np.random.default_rng(4).permutation(values)
    for first in range(0, 400, 7):
        part = shuffled[first : first + 7]
        parts.add(part, nothing[: len(part)], nothing[: len(part)])

    for metric in METRICS:
        np.testing.assert_allclose(whole.smallest(metric), parts.smallest(metric), rtol=1e-9, atol=1e-6)


def test_many_queries_need_no_more_memory_than_their_answers() -> None:
    values = np.random.default_rng(5).standard_normal((4000, 16), dtype="<f4")
    exact = Exact([Query(value) for value in values[:1000]], 11)
    nothing = np.zeros(len(values), np.int64)

    tracemalloc.start()
    exact.add(values, nothing, nothing)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 100 * 1024**2


@pytest.mark.parametrize("size", [pytest.param(size, marks=pytest.mark.slow) for size in (1, 3, 384)] + [1536])
@pytest.mark.parametrize("metric", METRICS)
def test_distances_are_pgvectors(database: Database, metric: str, size: int) -> None:
    random = np.random.default_rng(size)
    values = random.standard_normal((40, size), dtype="<f4") * random.choice([0.01, 1, 30], (40, 1)).astype("<f4")
    values[5], values[6], values[7] = 0, values[4], values[4] * np.float32(1.000001)
    query = values[4]
    database.run("CREATE EXTENSION vector; CREATE TABLE t (n integer, v vector)")
    for number, value in enumerate(values):
        database.run("INSERT INTO t VALUES (%s, %s)", number, str(value.tolist()))
    rows = database.rows(f"SELECT v {OPERATORS[metric]} %s::vector FROM t ORDER BY n", str(query.tolist()))
    theirs = np.array([np.inf if np.isnan(row[0]) else row[0] for row in rows])

    ours = distances(query[None].astype(np.float64), values.astype(np.float64))[metric][0]

    length = float(np.linalg.norm(query))
    # relative to a far vector's own length, where that is the longer one
    lengths = np.maximum(length, np.linalg.norm(values.astype(np.float64), axis=1))
    scale = {"l2": lengths, "cosine": np.ones(40), "ip": length * lengths}[metric]
    finite = np.isfinite(theirs)
    assert (np.isfinite(ours) == finite).all()
    assert (np.abs(ours[finite] - theirs[finite]) <= TOLERANCE * scale[finite]).all()


ONE = np.array([3, 4], "<f4")  # of length 5
OWN = {"l2": 0.0, "cosine": 0.0, "ip": -25.0}
# k + 1 true distances, the distances that were found, and what the recall is, for k = 3
RECALLS: dict[str, tuple[list[float], list[float], float | None]] = {
    "all": ([0, 1, 2, 3], [0, 1, 2, 3], 1),
    "in another order": ([0, 1, 2, 3], [3, 1, 0, 2], 1),
    "nearly equal": ([0, 1, 2, 3], [0, 1, 2, 3 + 4e-6], 1),
    "one missed": ([0, 1, 2, 3], [0, 1, 3, 4], 2 / 3),
    "the nearest missed": ([0, 1, 2, 3], [0, 2, 3, 4], 2 / 3),
    "all missed": ([0, 1, 2, 3], [0, 4, 5, 6], 0),
    "nothing found": ([0, 1, 2, 3], [], 0),
    "only its own row found": ([0, 1, 2, 3], [0], 0),
    "its own row missed": ([0, 1, 2, 3], [1, 2, 3, 4], 1),
    "its own row and another missed": ([0, 1, 2, 3], [1, 3, 4, 5], 2 / 3),
    "no row of its own": ([1, 2, 3, 4], [1, 2, 3, 4], 1),
    "no row of its own, one missed": ([1, 2, 3, 4], [1, 2, 4, 5], 2 / 3),
    "a twin, found": ([0, 0, 1, 2], [0, 0, 1, 2], 1),
    "a twin, missed": ([0, 0, 1, 2], [0, 1, 3, 4], 1 / 3),
    "one of two at the last place": ([0, 1, 2, 2], [0, 1, 2, 2], 1),
    # as benchmarks count: whatever is as near as the last of the true ones
    "ties beyond the last place": ([0, 1, 2, 3], [0, 1, 3, 3], 1),
    "fewer there than wanted": ([0, 1, np.inf, np.inf], [0, 1], 1),
    "fewer there, and one missed": ([0, 1, 2, np.inf], [0, 2], 0.5),
    "more found than wanted": ([0, 1, 2, 3], [0, 1, 2, 3, 3, 3], 1),
    "not to be told": ([0, 1, 2, 3], [0, 1, 2, np.inf], 2 / 3),
    "its own row alone": ([0, np.inf, np.inf, np.inf], [0], None),
    "no row": ([np.inf] * 4, [], None),
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", RECALLS)
def test_recall(case: str, metric: str) -> None:
    exact, found, share = RECALLS[case]
    at = OWN[metric]

    assert recall(metric, ONE, np.array(exact) + at, [distance + at for distance in found], 3) == share


def test_rows_nearer_by_inner_product_than_a_row_is_to_itself() -> None:
    """The own row is then in the middle, or not among the nearest at all."""
    assert recall("ip", ONE, np.array([-40.0, -25, -20, -10]), [-40, -25, -20, -10], 3) == 1
    assert recall("ip", ONE, np.array([-40.0, -25, -20, -10]), [-40, -25, -10, -5], 3) == 2 / 3
    assert recall("ip", ONE, np.array([-60.0, -50, -40, -30]), [-60, -50, -40, -30], 3) == 1
    assert recall("ip", ONE, np.array([-60.0, -50, -40, -30]), [-60, -50, -25, -20], 3) == 2 / 3
