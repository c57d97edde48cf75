"""One real server for each process of the tests, one fresh database for each test.

OM_TEST_SERVER chooses it: 18 or 16, both with pgvector 0.8, or 16-0.6.2, which has pgvector 0.6.2.
"""

from __future__ import annotations

import itertools
import re
import subprocess
from collections.abc import Iterator

import hypothesis
import pytest

from openmemory_migrations import embedded
from tests.support.openmemory import Database, create_database, drop_database
from tests.support.servers import OPTIONS, programs

# a shared machine pauses a process now and then
hypothesis.settings.register_profile("shared", deadline=None)
hypothesis.settings.load_profile("shared")


def pytest_report_header() -> str:
    postgres = subprocess.run([programs() / "postgres", "--version"], capture_output=True, text=True, check=True)
    control = (programs().parent / "share/postgresql/extension/vector.control").read_text()
    (pgvector,) = re.findall("default_version = '(.*)'", control)
    return f"server: {postgres.stdout.strip()}, pgvector {pgvector}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "server" in getattr(item, "fixturenames", ()):
            item.add_marker("server")


@pytest.fixture(scope="session")
def server() -> Iterator[embedded.Server]:
    with embedded.temporary(bin=programs(), options=OPTIONS) as server:
        yield server


@pytest.fixture(scope="session")
def names() -> Iterator[int]:
    return itertools.count()


@pytest.fixture
def database(server: embedded.Server, names: Iterator[int]) -> Iterator[Database]:
    """An empty database: not even the extension is in it."""
    database = create_database(server, f"test_{next(names)}")
    yield database
    drop_database(server, database.name)
