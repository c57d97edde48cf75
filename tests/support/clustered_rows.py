"""Vectors with neighbours to be found: random ones have none that are much nearer than the others."""

from __future__ import annotations

import uuid

import numpy as np

from tests.support.openmemory import SECTORS, Row


def clustered_rows(n: int, dim: int, clusters: int = 50, seed: int = 0) -> list[Row]:
    """Return rows of unit length around so many centres, in five sectors and of 20 users, the first with the most."""
    random = np.random.default_rng([seed, n, dim])
    centres = random.standard_normal((clusters, dim))
    values = centres[random.integers(0, clusters, n)] + 0.6 * random.standard_normal((n, dim))
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    users = (20 * random.random(n) ** 2).astype(int)
    return [
        Row(str(uuid.UUID(int=i + 1)), SECTORS[i % 5], f"user{users[i]:02}", values[i].astype("<f4").tobytes(), dim)
        for i in range(n)
    ]
