"""OpenMemory's table: rows for it, and checks of it, most of which the demo has."""

from __future__ import annotations

import uuid
from collections.abc import Iterable

import numpy as np

from demo.openmemory import (
    Database,
    Row,
    checksum,
    create_database,
    create_table,
    drop_database,
    expected,
    load,
    mismatches,
    real_rows,
)

__all__ = [
    "Database",
    "Row",
    "checksum",
    "create_database",
    "create_table",
    "drop_database",
    "expected",
    "load",
    "mismatches",
    "pack",
    "random_rows",
    "real_rows",
]

SECTORS = ["episodic", "semantic", "procedural", "emotional", "reflective"]


def pack(values: Iterable[float]) -> bytes:
    """Return `v` as OpenMemory writes it: float32, little-endian, no header."""
    return np.fromiter(values, "<f4").tobytes()


def random_rows(n: int, dim: int, seed: int = 0) -> list[Row]:
    """Return rows with keys and values of their own for each seed; ±0 and denormals are among the values."""
    random = np.random.default_rng([seed, dim])
    values = random.standard_normal((n, dim), dtype="<f4")
    odd = np.array([0.0, -0.0, 1e-45, -1e-45, 1.1e-38], "<f4")
    where = random.random((n, dim)) < 0.05
    values[where] = random.choice(odd, where.sum())
    keys = [uuid.UUID(bytes=random.bytes(16), version=4) for _ in range(n)]
    return [Row(str(key), SECTORS[i % 5], f"user{i % 20}", values[i].tobytes(), dim) for i, key in enumerate(keys)]
