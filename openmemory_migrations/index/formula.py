"""Whole numbers that Python computes, or, where one of them is known to the server only, the server: by one formula."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar


@dataclass(frozen=True)
class Formula:
    """SQL of a whole number of type bigint, not negative; what is computed with it is one, too."""

    text: str

    def __str__(self) -> str:
        return self.text

    def __add__(self, other: Number) -> Formula:
        return Formula(f"({self} + {other})")

    def __radd__(self, other: int) -> Formula:
        return Formula(f"({other} + {self})")

    def __mul__(self, other: Number) -> Formula:
        return Formula(f"{self} * {other}")

    def __rmul__(self, other: int) -> Formula:
        return Formula(f"{other} * {self}")

    def __floordiv__(self, other: int) -> Formula:
        return Formula(f"({self} / {other})")


Number = int | Formula
N = TypeVar("N", int, Formula)


def least(one: N, other: N) -> N:
    return min(one, other) if isinstance(one, int) and isinstance(other, int) else Formula(f"least({one}, {other})")


def greatest(one: N, other: int) -> N:
    return max(one, other) if isinstance(one, int) else Formula(f"greatest({one}, {other})")


def up_to(number: N, limit: int, then: N, above: N) -> N:
    """`then` where the number is no larger than the limit."""
    if isinstance(number, int):
        return then if number <= limit else above
    return Formula(f"CASE WHEN {number} <= {limit} THEN {then} ELSE {above} END")


def root(number: N) -> N:
    """The square root, without its fraction."""
    return math.isqrt(number) if isinstance(number, int) else Formula(f"floor(sqrt({number}))::bigint")
