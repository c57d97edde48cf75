"""Real sentence embeddings in OpenMemory's table, migrated but for the index; sectors and users of unequal sizes."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from demo.openmemory import TABLE
from tests.support.commands import om
from tests.support.databases import Databases
from tests.support.openmemory import SECTORS, Database, Row, create_table, load
from tests.support.states import INDEX

FILE = Path(__file__).parent / "data" / "minilm_4000_384_float16.npy"
DIM = 384
SHARES = [0.5, 0.25, 0.15, 0.08, 0.02]  # of the rows, by sector


def embeddings() -> npt.NDArray[np.float32]:
    """(4000, 384) float32 of unit length, all different."""
    values: npt.NDArray[np.float32] = np.load(FILE).astype("<f4")
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    return values


def rows_of(values: npt.NDArray[np.float32]) -> list[Row]:
    """A row of each; half of them are user0's, a quarter user1's …, user8 has a few."""
    random = np.random.default_rng(1)
    sectors = random.choice(SECTORS, len(values), p=SHARES)
    users = np.minimum(random.geometric(0.5, len(values)) - 1, 8)
    return [
        Row(str(uuid.UUID(int=number, version=4)), str(sector), f"user{user}", value.tobytes(), len(value))
        for number, (sector, user, value) in enumerate(zip(sectors, users, values, strict=True))
    ]


def unindexed(database: Database) -> None:
    create_table(database)
    load(database, rows_of(embeddings()))
    assert om(database, "upgrade", env={"OM_INDEX": "none"}).returncode == 0


@pytest.fixture
def real(databases: Databases) -> Iterator[Database]:
    """All embeddings, converted; without an index."""
    with databases.copy(unindexed) as database:
        yield database


def index(database: Database, using: str) -> None:
    """`using` is what comes after the name of the column, such as `ivfflat (v_vector vector_l2_ops)`."""
    database.run(f"CREATE INDEX {INDEX} ON {TABLE} USING {using}")


def set_for_role(database: Database, name: str, value: str) -> None:
    """What its sessions have by default; gone with the database."""
    database.run(f"ALTER ROLE postgres IN DATABASE {database.name} SET {name} = {value}")
