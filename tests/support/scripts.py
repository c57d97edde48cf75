"""Scripts of `alembic --sql`, run by psql, compared with the online run."""

from __future__ import annotations

import functools
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from demo.openmemory import TABLE, environment
from openmemory_migrations.embedded import Server
from tests.support.commands import Result, alembic
from tests.support.databases import Databases
from tests.support.openmemory import (
    Database,
    create_table,
    load,
    pack,
    random_rows,
    real_rows,
)
from tests.support.sessions import eventually
from tests.support.states import snapshot, stamp

DIM8 = {"OM_VEC_DIM": "8"}


SINGLE = {"OM_SINGLE_TRANSACTION": "on"}


NAN = float("nan")


def script(*command: str, env: Mapping[str, str]) -> str:
    """The script that alembic prints, which needs no database."""
    return _script(command, tuple(sorted(env.items())))


@functools.cache
def _script(command: tuple[str, ...], env: tuple[tuple[str, str], ...]) -> str:
    return alembic(None, *command, "--sql", env=dict(env)).stdout


def start_psql(server: Server, database: Database, sql: str, *options: str) -> subprocess.Popen[str]:
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        file.write(sql)
        file.seek(0)
        return subprocess.Popen(
            [server.psql, "-X", "-v", "ON_ERROR_STOP=1", *options, "-f", "-", database.url],
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(None, {}),
        )


def psql_that_waits(
    server: Server, database: Database, sql: str, waits: Callable[[], object], then: Callable[[], object]
) -> Result:
    """Run it, and do `then` as soon as it waits."""
    process = start_psql(server, database, sql)
    try:
        eventually(waits)
        then()
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    return Result(process.returncode, stdout, stderr)


def psql(server: Server, database: Database, sql: str, *options: str, check: bool = True) -> Result:
    process = start_psql(server, database, sql, *options)
    try:
        stdout, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert not check or process.returncode == 0, stderr
    return Result(process.returncode, stdout, stderr)


def offline(
    server: Server, database: Database, *command: str, env: Mapping[str, str] = DIM8, check: bool = True
) -> Result:
    """What `alembic *command` does online, by script."""
    options = ["-1"] if env.get("OM_SINGLE_TRANSACTION") == "on" else []
    return psql(server, database, script(*command, env=env), *options, check=check)


@contextmanager
def twins(databases: Databases, prepare: Callable[[Database], object]) -> Iterator[tuple[Database, Database]]:
    """Two databases prepared alike, one for the online run and one for the script."""
    with databases.empty() as one:
        prepare(one)
        with databases.copy_of(one) as other:
            yield one, other


def everything(database: Database, schema: str = "public") -> dict[str, Any]:
    """The state of the database with our version table: its columns, its key, its row."""
    version = database.rows(
        """
        SELECT relacl::text, attname, format_type(atttypid, atttypmod), attnotnull,
               (SELECT string_agg(conname || ': ' || pg_get_constraintdef(oid), ',') FROM pg_constraint
                WHERE conrelid = c.oid AND contype = 'p')
        FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace JOIN pg_attribute ON attrelid = c.oid
        WHERE nspname = %s AND relname = 'openmemory_alembic_version' AND attnum > 0
        """,
        schema,
    )
    return {**snapshot(database), "version table": version, "stamp": stamp(database, schema)}


def assert_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    assert {what: (one[what], other[what]) for what in one if one[what] != other[what]} == {}


def stopped(
    server: Server,
    database: Database,
    env: Mapping[str, str],
    *said: str,
    command: tuple[str, ...] = ("upgrade", "head"),
) -> None:
    """See the script stop with all that is `said`, and change nothing."""
    before = everything(database)
    result = offline(server, database, *command, env={**DIM8, **env}, check=False)
    assert result.returncode == 3, result.stderr  # psql's code for a script that stops at an error
    for text in said:
        assert text in result.stderr
    assert_same(before, everything(database))


def bad_values(dim: int) -> list[bytes | None]:
    """Every kind of `v` that is no vector of `dim` dimensions, and no `v` at all."""
    rest = pack([0.5] * (dim - 1))
    return [
        b"",
        b"abc",
        rest + b"abc",
        rest,
        rest + pack([1, 2]),
        pack([NAN]) + rest,
        rest + pack([-NAN]),
        rest + b"\x01\x00\x80\x7f",  # a signalling NaN
        pack([float("inf")]) + rest,
        rest + pack([-float("inf")]),
        pack([0.0] * 16_001),
        None,
    ]


@dataclass(frozen=True)
class Case:
    """A table and the settings of its migration; `before` is run in the empty database."""

    dim: int = 8
    rows: int = 120
    bad: bool = True
    schema: str = "public"
    table: str = TABLE
    before: str = "SELECT 1"
    settings: Mapping[str, str] = field(default_factory=dict)
    single: bool = False  # CI has its script in one transaction too
    exhaustive: bool = False  # CI has neither

    @property
    def env(self) -> dict[str, str]:
        names = {"OM_PG_SCHEMA": self.schema, "OM_VECTOR_TABLE": self.table}
        return {"OM_VEC_DIM": str(self.dim), **names, **self.settings}

    def prepare(self, database: Database) -> None:
        database.run(self.before)
        create_table(database, self.table, self.schema)
        rows = real_rows(256) if self.settings.get("OM_TIER") else random_rows(self.rows, self.dim)
        values = bad_values(self.dim) if self.bad else []
        bad = [row._replace(v=v) for row, v in zip(random_rows(len(values), self.dim, 1), values, strict=True)]
        load(database, rows[:30] + bad + rows[30:], self.table, self.schema)


# of 400 rows, in one batch: twice as long as the role's timeout lets a statement run
SLOWLY = f"""
CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.005); RETURN NEW; END';
CREATE TRIGGER slow BEFORE UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION slow();
DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET statement_timeout = %L', current_database(), '1s'); END $$
"""
