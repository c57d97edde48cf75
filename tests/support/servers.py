"""Which PostgreSQL the tests run on."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from openmemory_migrations import embedded
from tests.support.commands import ROOT
from tests.support.openmemory import Database, create_database, random_rows
from tests.support.running import expanded
from tests.support.sessions import eventually


@dataclass(frozen=True)
class Pair:
    primary: embedded.Server
    replica: embedded.Server
    database: Database  # on the primary

    def on_replica(self, sql: str) -> object:
        return Database(self.database.name, self.replica.url(self.database.name)).value(sql)


@contextmanager
def replicated(rows: int) -> Iterator[Pair]:
    """Run a server with so many rows to convert, and a streaming replica of it."""
    with embedded.temporary(bin=programs(), options=OPTIONS) as primary:
        database = create_database(primary, "replicated")
        expanded(database, random_rows(rows, 8))
        with tempfile.TemporaryDirectory(prefix="om-replica-", ignore_cleanup_errors=True) as name:
            embedded._give(Path(name))
            replica = embedded.Server(Path(name) / "data", programs(), OPTIONS)
            replica._programs = primary._programs
            source = [f"--host={primary.socket_dir}", "--username=postgres"]
            replica._run("pg_basebackup", "--write-recovery-conf", "--checkpoint=fast", *source)
            replica.start()
            try:
                eventually(lambda: database.rows("SELECT FROM pg_stat_replication WHERE state = 'streaming'"))
                yield Pair(primary, replica, database)
            finally:
                # a test may have stopped it already
                with suppress(RuntimeError):
                    replica.stop("immediate")


CHOICE = os.environ.get("OM_TEST_SERVER") or "18"


OPTIONS = {"fsync": "off", "max_connections": "100"}


def programs() -> Path:
    if CHOICE in ("16", "18"):
        return embedded.binaries(int(CHOICE))
    folder = ROOT / f".cache/pgserver-{CHOICE.removeprefix('16-')}/pgserver/pginstall/bin"
    if not folder.exists():
        raise pytest.UsageError(f"OM_TEST_SERVER={CHOICE}: no {folder}; 18 and 16 need none, .ci/run gets 16-0.6.2")
    return folder
