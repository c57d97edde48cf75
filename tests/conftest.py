"""One real server for each process of the tests, one fresh database for each test.

OM_TEST_SERVER chooses it: 18 or 16, both with pgvector 0.8, or 16-0.6.2, which has pgvector 0.6.2.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from openmemory_migrations import embedded
from tests.support.databases import Databases
from tests.support.openmemory import Database
from tests.support.servers import OPTIONS, programs

# CREATE DATABASE takes 20 ms there, on a disk 130 to 280, fsync or not
MEMORY = Path("/dev/shm")
if "TMPDIR" not in os.environ and MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 8 << 30:
    os.environ["TMPDIR"] = tempfile.tempdir = str(MEMORY)

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
            assert not item.nodeid.startswith("tests/unit/"), f"{item.nodeid} asks a server"


class Named:
    """Whoever names a file or folder of tests means that something in it runs: nothing selected is a failure."""

    def __init__(self, names: list[str]) -> None:
        self.left = set(names)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.left -= {name for name in self.left if re.match(rf"{re.escape(name)}($|[/:\[])", report.nodeid)}

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.OK and self.left:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for name in sorted(self.left):
            terminalreporter.write_line(f"no test of {name} has passed: -m selects none, or all are skipped", red=True)


def pytest_configure(config: pytest.Config) -> None:
    # xdist's processes see only their share
    if not hasattr(config, "workerinput") and not config.option.collectonly:
        names = [name.partition("[")[0].rstrip("/") for name in config.args]
        config.pluginmanager.register(Named([name for name in names if name.startswith("tests")]))


@pytest.fixture(scope="session")
def server() -> Iterator[embedded.Server]:
    with embedded.temporary(bin=programs(), options=OPTIONS) as server:
        yield server


@pytest.fixture(scope="session")
def databases(server: embedded.Server) -> Databases:
    return Databases(server)


@pytest.fixture
def database(databases: Databases) -> Iterator[Database]:
    """An empty database: not even the extension is in it."""
    with databases.empty() as database:
        yield database
