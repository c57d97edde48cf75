"""Which engine converts in the tests of a module, unless a test says it itself.

Where nothing is said it is the one that a superuser gets: native. Import a fixture, and a module's tests are for that
engine, or for both that look at rows one by one.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

FILLS = ("UPDATE ONLY", "WITH done AS (UPDATE ONLY")  # what a batch inside the server begins with
CHOSEN: dict[str, str] = {}  # for every command and backfill of a test


def _by(name: str) -> Iterator[str]:
    CHOSEN["OM_BACKFILL_ENGINE"] = name
    yield name
    CHOSEN.clear()


@pytest.fixture(autouse=True)
def by_client() -> Iterator[str]:
    yield from _by("client")


# for what only the client does, in a module that is for both
only_client = pytest.mark.parametrize("by_each", ["client"], indirect=True)


@pytest.fixture(autouse=True, params=["client", pytest.param("native", marks=pytest.mark.slow)])
def by_each(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from _by(request.param)
