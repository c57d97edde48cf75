"""A real PgBouncer in transaction mode, where there is one."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg2

from openmemory_migrations import embedded
from tests.support.openmemory import Database, checksum, mismatches
from tests.support.running import transaction
from tests.support.sessions import eventually
from tests.support.states import HEAD, INDEX, IVFFLAT, indexes, stamp

PROGRAM = shutil.which("pgbouncer", path=os.environ.get("PATH", "") + ":/usr/sbin")


POOL = 5


# all that a session can set, but for what PgBouncer itself keeps in step with each client
CHANGED = """
    SELECT name, setting FROM pg_settings
    WHERE setting IS DISTINCT FROM reset_val AND source = 'session'
      AND name NOT IN ('application_name', 'client_encoding', 'DateStyle', 'TimeZone', 'IntervalStyle',
                       'standard_conforming_strings')
    """


@contextmanager
def bouncer(server: embedded.Server, database: Database, pool: int = POOL) -> Iterator[Database]:
    """Run a PgBouncer before the server and give the database as it is reached through it."""
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="om-bouncer-") as name:
        folder = Path(name)
        (folder / "users.txt").write_text('"postgres" ""\n')
        settings = {
            "pool_mode": "transaction",
            "listen_addr": "127.0.0.1",
            "listen_port": port,
            "unix_socket_dir": "",
            "auth_type": "any",
            "auth_file": folder / "users.txt",
            "default_pool_size": pool,
            "server_round_robin": 1,
            "logfile": folder / "log",
        }
        if os.geteuid() == 0:
            # as root it refuses to work
            folder.chmod(0o777)
            settings["user"] = "nobody"
        lines = "".join(f"{key} = {value}\n" for key, value in settings.items())
        (folder / "ini").write_text(f"[databases]\n* = user=postgres host={server.socket_dir}\n[pgbouncer]\n{lines}")
        assert PROGRAM
        with subprocess.Popen([PROGRAM, "-q", folder / "ini"], stderr=subprocess.DEVNULL) as process:
            through = Database(database.name, f"postgresql://postgres@127.0.0.1:{port}/{database.name}")
            try:
                eventually(lambda: process.poll() is not None or answers(through))
                assert process.poll() is None, (folder / "log").read_text()
                yield through
            finally:
                process.terminate()


def answers(database: Database) -> bool:
    with suppress(psycopg2.OperationalError):
        return bool(database.value("SELECT true"))
    return False


def sessions(through: Database, number: int = POOL) -> dict[int, dict[str, Any]]:
    """Use as many server connections at once as the pool has; return what each has set, by its process."""
    found: dict[int, dict[str, Any]] = {}
    with ExitStack() as stack:
        clients = [stack.enter_context(transaction(through)) for _ in range(number)]
        for client in clients:
            with client.cursor() as cursor:
                cursor.execute("SELECT pg_backend_pid()")
                ((pid,),) = cursor.fetchall()
                cursor.execute(CHANGED)
                found[pid] = dict(cursor.fetchall())
        for client in clients:
            # PgBouncer closes a server connection whose client leaves in the middle of a transaction
            client.rollback()
    return found


def advisory_locks(database: Database) -> list[tuple[Any, ...]]:
    return database.rows(
        "SELECT pid FROM pg_locks l JOIN pg_database d ON d.oid = l.database"
        " WHERE locktype = 'advisory' AND datname = current_database()"
    )


def assert_nothing_stays(database: Database, through: Database, pool: int = POOL) -> set[int]:
    """See that the pool's sessions are as new; return their processes."""
    assert advisory_locks(database) == []
    assert database.rows("SELECT relname FROM pg_class WHERE relpersistence = 't'") == []
    found = sessions(through, pool)
    assert len(found) == pool
    assert list(found.values()) == [{}] * pool
    return set(found)


def assert_migrated(database: Database, v: str) -> None:
    assert stamp(database) == [HEAD]
    assert mismatches(database) == []
    assert checksum(database) == v
    assert indexes(database) == {INDEX: (IVFFLAT, True)}
