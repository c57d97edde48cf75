"""A server that asks for passwords: a wrong one is a clear error and exit code 2, whatever the command."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from openmemory_migrations import embedded
from openmemory_migrations.cli import COMMANDS
from tests.support.commands import om
from tests.support.openmemory import Database, create_table, load, random_rows
from tests.support.servers import OPTIONS, programs

ON_A_DATABASE = sorted(set(COMMANDS) - {"stubs", "doctor", "sql"})


@pytest.fixture(scope="module")
def guarded() -> Iterator[Database]:
    """A role with the password `right`, on a server that lets nobody else in."""
    with embedded.temporary(bin=programs(), options=OPTIONS) as server:
        database = Database("postgres", server.url())
        create_table(database)
        load(database, random_rows(60, 8))
        database.run("CREATE ROLE app LOGIN SUPERUSER PASSWORD 'right'")
        (server.data / "pg_hba.conf").write_text("local all all scram-sha-256\n")
        database.run("SELECT pg_reload_conf()")
        yield Database("postgres", server.url(user="app"))


@pytest.mark.slow
@pytest.mark.parametrize("command", ON_A_DATABASE)
def test_a_wrong_password(guarded: Database, command: str) -> None:
    wrong = Database("postgres", guarded.url.replace("app@", "app:SeCrEt@"))
    arguments = {"downgrade": ["base"], "cutover": ["current"]}.get(command, [])

    done = om(wrong, command, *arguments)

    assert (done.returncode, done.stdout) == (2, ""), done.log
    assert 'password authentication failed for user "app"' in done.stderr
    assert "SeCrEt" not in done.log
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_right_one(guarded: Database) -> None:
    right = Database("postgres", guarded.url.replace("app@", "app:right@"))

    assert om(right, "check").returncode == 0
    assert om(right, "upgrade").returncode == 0
    assert om(right, "verify").returncode == 0
