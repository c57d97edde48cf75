"""The embedded server: it starts, crashes, starts again, and leaves nothing behind."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest

from openmemory_migrations import embedded
from tests.support.openmemory import Database

OPTIONS = {"fsync": "off"}


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every account may enter; pytest's own are for the caller alone."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def test_data_outlive_a_crash_and_the_address_stays() -> None:
    with embedded.temporary(options=OPTIONS) as server:
        database = Database("postgres", server.url())
        database.run("CREATE EXTENSION vector; CREATE TABLE kept AS SELECT '[1,2]'::vector AS v")

        server.stop("immediate")
        with pytest.raises(psycopg2.OperationalError):
            database.connect()
        server.start()

        assert database.value("SELECT v::text FROM kept") == "[1,2]"
        assert "was interrupted" in server.log.read_text()


@pytest.mark.parametrize("version", [16, 18])
def test_the_version_is_the_one_asked_for(version: int) -> None:
    with embedded.temporary(version, options=OPTIONS) as server:
        assert Database("postgres", server.url()).value("SHOW server_version").startswith(f"{version}.")


def test_options_reach_the_server_and_tcp_is_off_without_them() -> None:
    with embedded.temporary(options=OPTIONS | {"application_name": "it's me", "port": "5544"}) as server:
        database = Database("postgres", server.url(user="postgres"))

        assert database.value("SHOW listen_addresses") == ""
        assert database.value("SHOW application_name") == "it's me"
        assert database.value("SHOW port") == "5544"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_behind_whatever_happens(error: type[BaseException]) -> None:
    servers: list[tuple[embedded.Server, str]] = []

    def fail() -> None:
        with embedded.temporary(options=OPTIONS) as server:
            servers.append((server, (server.data / "postmaster.pid").read_text().split()[0]))
            raise error

    with pytest.raises(error):
        fail()

    ((server, pid),) = servers
    assert not server.data.parent.exists()
    assert not server.socket_dir.exists()
    # empty for a dead process that nobody has waited for yet
    cmdline = Path(f"/proc/{pid}/cmdline")
    assert not cmdline.exists() or not cmdline.read_bytes()


def test_a_server_that_cannot_start_says_why() -> None:
    with (
        pytest.raises(RuntimeError, match='parameter "shared_buffers"'),
        embedded.temporary(options={"shared_buffers": "much"}),
    ):
        pytest.fail("it started")


def test_programs_that_the_account_cannot_reach_are_copied_not_opened(folder: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root's servers run as another account")
    bin = embedded.binaries()
    package = bin.parents[1]
    hidden = folder / "hidden"
    for part in (package, package.with_name(f"{package.name}.libs")):
        shutil.copytree(part, hidden / part.name)
    hidden.chmod(0o700)

    with embedded.temporary(bin=hidden / bin.relative_to(package.parent), options=OPTIONS) as server:
        Database("postgres", server.url()).run("CREATE EXTENSION vector")

    assert hidden.stat().st_mode & 0o777 == 0o700
    assert not server.socket_dir.exists()


def test_without_the_extra_the_error_tells_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(ModuleNotFoundError, match=r'pip install "openmemory-migrations\[embedded\]"'):
        embedded.binaries()
