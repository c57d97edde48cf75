"""What the tests share: rows, and the real alembic command. The table and its checks come from the demo."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from demo.openmemory import (
    Database,
    Row,
    checksum,
    create_database,
    create_table,
    drop_database,
    environment,
    expected,
    load,
    mismatches,
    real_rows,
)

__all__ = [
    "Database",
    "Row",
    "alembic",
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
    "start_alembic",
]

ROOT = Path(__file__).parent.parent
SECTORS = ["episodic", "semantic", "procedural", "emotional", "reflective"]
NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Result:
    returncode: int
    stdout: str
    stderr: str

    @property
    def log(self) -> str:
        return self.stdout + self.stderr


def alembic(
    database: Database | None,
    *args: str,
    env: Mapping[str, str] = NOTHING,
    check: bool = True,
    timeout: float = 120,
) -> Result:
    """Run the real alembic command in the repo's root; its settings are OM_DATABASE_URL and `env`."""
    process = start_alembic(database, *args, env=env)
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    finally:
        process.kill()
    result = Result(process.returncode, stdout, stderr)
    assert not check or result.returncode == 0, f"alembic {' '.join(args)}: {result.returncode}\n{result.log}"
    return result


def start_alembic(database: Database | None, *args: str, env: Mapping[str, str] = NOTHING) -> subprocess.Popen[str]:
    """Start the same without waiting, for a test that does something meanwhile, or kills it."""
    return subprocess.Popen(
        [sys.executable, "-m", "alembic", *args],
        cwd=ROOT,
        env=environment(database, env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


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
