"""Which cases of a test CI runs; the others are for `make test-all`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest


def exhaustive(*values: Any, id: str | None = None) -> Any:
    """A case that CI leaves out."""
    return pytest.param(*values, marks=pytest.mark.exhaustive, id=id)


def quickly(first: Any, *others: Any) -> list[Any]:
    """One case in the quick tests, the others in CI."""
    return [first, *(pytest.param(other, marks=pytest.mark.slow) for other in others)]


def pairwise(*axes: Sequence[Any]) -> Iterator[Any]:
    """All combinations; CI has those with a pair of values that none before has."""
    seen: set[tuple[tuple[int, int], ...]] = set()
    for places in itertools.product(*(range(len(axis)) for axis in axes)):
        pairs = set(itertools.combinations(enumerate(places), 2))
        values = [axis[place] for axis, place in zip(axes, places, strict=True)]
        yield exhaustive(*values) if pairs <= seen else tuple(values)
        seen |= pairs


def by_turns(each: Sequence[Any], among: Sequence[Any], ids: Sequence[str] | None = None) -> list[Any]:
    """All pairs; the quick tests have every one of `each` with the next of the others in turn, the slow ones of CI with
    one more."""
    turns = [[], [pytest.mark.slow], *([pytest.mark.exhaustive] for _ in among[2:])]
    return [
        pytest.param(value, other, marks=turns[(j - i) % len(among)], id=f"{ids[i] if ids else value}-{other}")
        for i, value in enumerate(each)
        for j, other in enumerate(among)
    ]
