"""R4: what others have made in a schema on our path is never called, however near the types of its arguments are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from demo.openmemory import TABLE
from openmemory_migrations.embedded import Server
from tests.support import native, partitions
from tests.support.commands import alembic, om
from tests.support.databases import Databases
from tests.support.openmemory import Database, create_table, load, mismatches, pack, random_rows
from tests.support.scripts import SINGLE, offline
from tests.support.strangers import heard, surround

DIM = 8
# what the functions of triggers, the checks and the defaults of a host may do: name things without their schema
AUDIT = f"""
CREATE SCHEMA app;
CREATE TABLE app.audit (id text);
CREATE FUNCTION app.noted(sector text) RETURNS boolean LANGUAGE plpgsql AS
  $$ BEGIN PERFORM FROM audit LIMIT 1; RETURN true; END $$;
CREATE FUNCTION app.note() RETURNS trigger LANGUAGE plpgsql AS
  $$ BEGIN INSERT INTO audit VALUES (NEW.id); RETURN NEW; END $$;
CREATE FUNCTION app.counted() RETURNS trigger LANGUAGE plpgsql AS
  $$ BEGIN INSERT INTO audit VALUES ('a statement'); RETURN NULL; END $$;
ALTER TABLE {TABLE} ADD CHECK (app.noted(sector));
CREATE TRIGGER noted BEFORE UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION app.note();
CREATE TRIGGER counted AFTER UPDATE ON {TABLE} FOR EACH STATEMENT EXECUTE FUNCTION app.counted();
CREATE CONSTRAINT TRIGGER later AFTER UPDATE ON {TABLE} DEFERRABLE INITIALLY DEFERRED
FOR EACH ROW EXECUTE FUNCTION app.note();
"""


def plain(database: Database) -> None:
    create_table(database)
    rows = random_rows(280, DIM)
    bad = [row._replace(v=v) for row, v in zip(rows[:3], (b"abc", pack([float("nan")] * DIM), b""), strict=False)]
    load(database, bad + rows[3:])


def elsewhere(database: Database) -> None:
    """The extension in a schema that strangers are in, too, and types of the names of its own nearer on the path."""
    database.run("DROP EXTENSION vector; CREATE SCHEMA extensions; CREATE EXTENSION vector SCHEMA extensions")
    database.run("CREATE DOMAIN vector AS text; CREATE DOMAIN halfvec AS text")
    plain(database)
    surround(database, "extensions")


def among_triggers(database: Database) -> None:
    plain(database)
    database.run(f"ALTER DATABASE {database.name} SET search_path = app, public")
    database.run(AUDIT)


def adopted(database: Database) -> None:
    among_triggers(database)
    database.run(
        f"ALTER TABLE {TABLE} ADD v_vector vector({DIM}); INSERT INTO {TABLE} (id, sector, dim, v_vector)"
        f" SELECT gen_random_uuid(), 'x', {DIM}, '[1,2,3,4,5,6,7,8]' FROM generate_series(1, 20)"
    )


def tree(database: Database) -> None:
    partitions.filled(database)


def newer(database: Database) -> None:
    native.create_newer(database, random_rows(60, DIM))


def prepare(database: Database, make: Callable[[Database], None]) -> None:
    database.run("CREATE EXTENSION vector")
    make(database)
    surround(database)


@contextmanager
def among_strangers(databases: Databases, make: Callable[[Database], None]) -> Iterator[Database]:
    with databases.copy(prepare, make) as database:
        # what a database is set to isn't copied
        if make in (among_triggers, adopted):
            database.run(f"ALTER DATABASE {database.name} SET search_path = app, public")
        with heard(database) as called:
            yield database
        assert called == []


def dimensions(make: Callable[[Database], None]) -> dict[str, str]:
    return {"OM_VEC_DIM": str(partitions.DIM if make is tree else DIM)}


slow = pytest.mark.slow
ENGINES = ("native", "client", "server")
# in CI each with one engine; all of a life takes long
LIVES = [
    pytest.param(
        *(make, engine),
        marks=[slow] + [pytest.mark.exhaustive] * (i % 3 != j),
        id=f"{make.__name__}-{engine}",
    )
    for i, make in enumerate((plain, adopted, elsewhere, among_triggers, tree, newer))
    for j, engine in enumerate(ENGINES)
]


@pytest.mark.parametrize(("make", "engine"), LIVES)
def test_a_life(databases: Databases, make: Callable[[Database], None], engine: str) -> None:
    env = {**dimensions(make), "OM_BACKFILL_ENGINE": engine}
    with among_strangers(databases, make) as database:
        assert om(database, "check", env=env).returncode == 0
        alembic(database, "upgrade", "head", env=env)
        alembic(database, "upgrade", "head", env=env)  # where there is nothing left to run
        for command in (["status"], ["verify", "--queries", "20"], ["report", "--queries", "20"]):
            assert om(database, *command, env=env).returncode == 0, command
        for command in (["tune"], ["index", "--rebuild"], ["backfill"], ["repair"], ["repair", "--dry-run"]):
            om(database, *command, env=env)
        for mode in ("swap", "drop") if make is not newer else ():
            cutover = env | {"OM_CUTOVER": mode, "OM_ACCEPT_LOSS": "0" if make is tree else "3"}
            alembic(database, "-n", "cutover", "upgrade", "head", env=cutover)
            assert om(database, "status", env=cutover).returncode == 0
            alembic(database, "-n", "cutover", "downgrade", "base", env=cutover)
            alembic(database, "-n", "cutover", "downgrade", "base", env=cutover)
        alembic(database, "downgrade", "base", env=env | {"OM_ACCEPT_LOSS": "100"})


@slow
@pytest.mark.parametrize("driver", ["psycopg"])
def test_a_driver_that_says_of_what_type_a_value_is(databases: Databases, driver: str) -> None:
    with among_strangers(databases, adopted) as database:
        env = {**dimensions(adopted), "OM_BACKFILL_ENGINE": "client"}
        by_driver = Database(database.name, database.url.replace("postgresql:", f"postgresql+{driver}:"))
        alembic(by_driver, "upgrade", "head", env=env)
        assert om(by_driver, "status", env=env).returncode == 0
        alembic(by_driver, "downgrade", "base", env=env | {"OM_ACCEPT_LOSS": "100"})


# no deferred trigger lets a table be changed in the transaction that it waits in
@pytest.mark.parametrize(
    ("make", "single"),
    [
        pytest.param(adopted, {}),
        pytest.param(plain, SINGLE, marks=slow),
        *(pytest.param(elsewhere, single, marks=slow) for single in ({}, SINGLE)),
    ],
)
def test_a_script(
    server: Server, databases: Databases, make: Callable[[Database], None], single: dict[str, str]
) -> None:
    with among_strangers(databases, make) as database:
        env = {**dimensions(make), **single}
        offline(server, database, "upgrade", "head", env=env)
        assert make is adopted or mismatches(database) == []
        offline(server, database, "downgrade", "head:base", env=env | {"OM_ACCEPT_LOSS": "100"})


@slow
@pytest.mark.parametrize("single", [{}, SINGLE])
def test_a_path_that_names_the_servers_schema_last_lets_nobody_in(
    server: Server, database: Database, single: dict[str, str]
) -> None:
    """An operator of the server's, and one of the same name and types that somebody has made in public."""
    create_table(database)
    load(database, random_rows(60, DIM))
    database.run("CREATE TABLE called (by_whom text)")
    database.run(
        "CREATE FUNCTION equal(text, text) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN"
        " INSERT INTO public.called VALUES (current_query()); RETURN $1 OPERATOR(pg_catalog.=) $2; END $$;"
        " CREATE FUNCTION equal(tid, tid) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN"
        " INSERT INTO public.called VALUES (current_query()); RETURN $1 OPERATOR(pg_catalog.=) $2; END $$;"
        " CREATE FUNCTION equal(bigint, bigint) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN"
        " INSERT INTO public.called VALUES (current_query()); RETURN $1 OPERATOR(pg_catalog.=) $2; END $$;"
        " CREATE OPERATOR public.= (LEFTARG = text, RIGHTARG = text, FUNCTION = equal);"
        " CREATE OPERATOR public.= (LEFTARG = tid, RIGHTARG = tid, FUNCTION = equal);"
        " CREATE OPERATOR public.= (LEFTARG = bigint, RIGHTARG = bigint, FUNCTION = equal);"
        " CREATE FUNCTION touched() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';"
        f" CREATE TRIGGER touched BEFORE UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION touched()"
    )
    database.run(f"ALTER DATABASE {database.name} SET search_path = public, pg_catalog")
    env = {"OM_VEC_DIM": str(DIM)}
    for engine in ("native", "client", "server"):
        alembic(database, "upgrade", "head", env={**env, "OM_BACKFILL_ENGINE": engine})
        alembic(database, "downgrade", "base", env=env)
    alembic(database, "upgrade", "head", env=env)
    for mode in ("swap", "drop"):
        alembic(database, "-n", "cutover", "upgrade", "head", env=env | {"OM_CUTOVER": mode})
        alembic(database, "-n", "cutover", "downgrade", "base", env=env)
    alembic(database, "downgrade", "base", env=env)
    database.run("DROP TABLE openmemory_alembic_version")
    offline(server, database, "upgrade", "head", env=env | single)

    assert database.rows("SELECT DISTINCT by_whom FROM called WHERE by_whom !~ 'alembic_version'") == []
