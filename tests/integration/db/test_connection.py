"""Connections as operators configure them: any password, sockets and TCP, and names that need quoting."""

from __future__ import annotations

import socket
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import sqlalchemy as sa
from psycopg2.sql import SQL, Identifier, Literal
from sqlalchemy.exc import DBAPIError, OperationalError

from openmemory_migrations import embedded
from openmemory_migrations.db.connections import engine_for, url_of
from openmemory_migrations.db.database import Database as PackageDatabase
from openmemory_migrations.db.drivers.driver import LIBPQ
from openmemory_migrations.db.sqlerrors import as_migration_error
from openmemory_migrations.errors import ConnectionLost
from openmemory_migrations.settings import Settings
from tests.support.commands import alembic
from tests.support.databases import Databases
from tests.support.openmemory import Database, Row, checksum, create_table, load, mismatches, pack, random_rows
from tests.support.package import package
from tests.support.servers import OPTIONS, programs

HBA = """
local all postgres trust
local all all scram-sha-256
host all all 127.0.0.1/32 scram-sha-256
"""
PASSWORDS = [
    "100%",
    "%41%40%%s",
    "a@b@",
    ":a:b:",
    "/a/b",
    "#a#b",
    "?a=b&c;d",
    " a b ",
    "'",
    '"',
    "''\"\"",
    "\\",
    "a\\'b",
    "{x}[y]$z!*+,",
    "pässwörd",
    "密码🐘",
]
SECRET = "all-of:them@% /#?&'\"\\{é密}=+"


@pytest.fixture(scope="module")
def server() -> Iterator[embedded.Server]:
    """Asks everybody but postgres on the socket for a password."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with tempfile.TemporaryDirectory(prefix="om-hba-") as folder:
        hba = Path(folder) / "pg_hba.conf"
        hba.write_text(HBA)
        Path(folder).chmod(0o755)
        options = OPTIONS | {"listen_addresses": "127.0.0.1", "port": port, "hba_file": str(hba)}
        with embedded.temporary(bin=programs(), options=options) as server:
            Database("postgres", server.url()).run("CREATE ROLE om LOGIN SUPERUSER")
            yield server


@pytest.fixture(scope="module")
def databases(server: embedded.Server) -> Databases:
    return Databases(server)


def set_password(database: Database, password: str) -> None:
    database.run(SQL("ALTER ROLE om PASSWORD {}").format(Literal(password)))


def pg(server: embedded.Server, database: str, password: str, *, tcp: bool = True) -> dict[str, str]:
    """The settings as OpenMemory has them."""
    return {
        "OM_PG_HOST": "127.0.0.1" if tcp else str(server.socket_dir),
        "OM_PG_PORT": server.options["port"],
        "OM_PG_DB": database,
        "OM_PG_USER": "om",
        "OM_PG_PASSWORD": password,
    }


def url(server: embedded.Server, database: str, password: str, scheme: str = "postgresql") -> dict[str, str]:
    port = server.options["port"]
    return {"OM_DATABASE_URL": f"{scheme}://om:{quote(password, safe='')}@127.0.0.1:{port}/{database}"}


def connected_as(env: dict[str, str]) -> str:
    """The role that the server knows a connection with these settings by."""
    found = url_of(Settings.load({}, env))
    assert found is not None
    engine = engine_for(found)
    with engine.connect() as connection:
        assert engine.dialect.driver == "psycopg2"
        return str(connection.execute(sa.text("SELECT session_user")).scalar())


def refused(env: dict[str, str], *args: str) -> str:
    """The first line of Alembic's FAILED message, and the whole output without a secret in it."""
    result = alembic(None, *(args or ("upgrade", "head")), env=env, check=False)
    assert result.returncode != 0
    assert "Traceback" not in result.log
    for secret in (SECRET, quote(SECRET, safe=""), SECRET.replace("'", "\\'"), "all-of"):
        assert secret not in result.log
    return result.log.partition("FAILED: ")[2].splitlines()[0]


# -- passwords


@pytest.mark.parametrize("password", PASSWORDS)
def test_any_password_reaches_the_server_whole(server: embedded.Server, database: Database, password: str) -> None:
    set_password(database, password)

    assert connected_as(pg(server, database.name, password)) == "om"
    assert connected_as(pg(server, database.name, password, tcp=False)) == "om"
    assert connected_as(url(server, database.name, password)) == "om"
    for wrong in (password + "x", ""):
        with pytest.raises(OperationalError):
            connected_as(pg(server, database.name, wrong))


@pytest.mark.parametrize("way", ["pg_*", "socket", "postgres", "postgresql", "-x"])
def test_a_whole_run_says_nothing_of_the_password(server: embedded.Server, database: Database, way: str) -> None:
    set_password(database, SECRET)
    create_table(database)
    load(database, random_rows(60, 3))
    arguments: list[str] = []
    if way in ("postgres", "postgresql"):
        env = url(server, database.name, SECRET, way)
    else:
        env = pg(server, database.name, SECRET, tcp=way != "socket")
    if way == "-x":
        arguments = ["-x", f"pg_password={env.pop('OM_PG_PASSWORD')}"]

    result = alembic(None, *arguments, "upgrade", "head", env=env)

    assert database.value("SELECT count(v_vector) FROM openmemory_vectors") == 60
    assert "all-of" not in result.log
    assert "all-of" not in server.log.read_text()


def test_a_wrong_password_is_told_and_not_shown(server: embedded.Server, database: Database) -> None:
    set_password(database, "another")

    for env in (pg(server, database.name, SECRET), url(server, database.name, SECRET)):
        assert 'password authentication failed for user "om"' in refused(env)
    assert "no password supplied" in refused(pg(server, database.name, ""))


@pytest.mark.parametrize("way", ["pg_*", "url"])
def test_an_unreachable_server_is_told_without_the_password(server: embedded.Server, way: str) -> None:
    env = (pg if way == "pg_*" else url)(server, "om", SECRET)
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused at once
        port = str(taken.getsockname()[1])
        env = {name: value.replace(server.options["port"], port) for name, value in env.items()}

        assert "Connection refused" in refused(env)


def test_a_missing_database_or_table_is_told_without_the_password(server: embedded.Server, database: Database) -> None:
    set_password(database, SECRET)

    assert 'database "nowhere" does not exist' in refused(url(server, "nowhere", SECRET))
    assert 'table "public.openmemory_vectors" does not exist' in refused(pg(server, database.name, SECRET))


@pytest.mark.parametrize("more", ["sslmode=sometimes", "no_such_option=1", "connect_timeout=x"])
def test_a_connection_option_that_cannot_be_is_told_without_the_password(
    server: embedded.Server, database: Database, more: str
) -> None:
    env = url(server, database.name, SECRET)

    assert more.partition("=")[0] in refused({"OM_DATABASE_URL": env["OM_DATABASE_URL"] + f"?{more}"})


def test_half_of_a_password_that_is_not_percent_encoded_is_not_shown_as_the_host(server: embedded.Server) -> None:
    port = server.options["port"]

    refused({"OM_DATABASE_URL": f"postgresql://om:first@all-of-the-rest@127.0.0.1:{port}/om"})


def test_a_password_of_another_encoding_is_told_as_an_error(server: embedded.Server, database: Database) -> None:
    refused(pg(server, database.name, "caf\udce9"))


# -- where the server is


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg2"])
def test_postgres_urls_connect_with_psycopg2(server: embedded.Server, database: Database, scheme: str) -> None:
    set_password(database, "p")

    assert connected_as(url(server, database.name, "p", scheme)) == "om"


def test_a_socket_directory_with_odd_characters_is_a_host(server: embedded.Server, database: Database) -> None:
    set_password(database, "p")
    with tempfile.TemporaryDirectory(prefix="om %@:#?é") as folder:
        name = f".s.PGSQL.{server.options['port']}"
        (Path(folder) / name).symlink_to(server.socket_dir / name)

        assert connected_as(pg(server, database.name, "p") | {"OM_PG_HOST": folder}) == "om"


def test_an_odd_database_and_role_are_names_like_any_other(server: embedded.Server) -> None:
    name = "Ödd %s/{x}:\"'\\?#@"
    admin = Database("postgres", server.url())
    admin.run(SQL("CREATE ROLE {} LOGIN PASSWORD 'p'").format(Identifier(name)))
    admin.run(SQL("CREATE DATABASE {} TEMPLATE template0").format(Identifier(name)))
    try:
        env = pg(server, name, "p") | {"OM_PG_USER": name}
        assert connected_as(env) == name
        quoted = quote(name, safe="")
        url = f"postgres://{quoted}:p@127.0.0.1:{server.options['port']}/"
        # older SQLAlchemy takes the database's name in a URL as it is written
        url += quoted if sa.make_url("postgresql:///%20").database == " " else "postgres"
        assert connected_as({"OM_DATABASE_URL": url}) == name
    finally:
        admin.run(SQL("DROP DATABASE {}").format(Identifier(name)))
        admin.run(SQL("DROP ROLE {}").format(Identifier(name)))


@pytest.mark.parametrize(("more", "expected"), [("", "openmemory-migrations"), ("?application_name=mine", "mine")])
def test_the_connection_says_who_it_is_unless_the_url_does(
    server: embedded.Server, database: Database, more: str, expected: str
) -> None:
    set_password(database, "p")
    env = {name: value + more for name, value in url(server, database.name, "p").items()}
    found = url_of(Settings.load({}, env))
    assert found is not None

    with engine_for(found).connect() as connection:
        assert connection.execute(sa.text("SHOW application_name")).scalar() == expected
        # what ends it where the network swallows everything; over a unix socket there is nothing more to see
        driver: Any = connection.connection.dbapi_connection
        given = driver.info.dsn_parameters
        wanted = {**LIBPQ, "application_name": expected}
        assert {name: given.get(name) for name in wanted} == wanted


# -- names that need quoting

NAMES = [
    pytest.param("Om-Test", "select", id="capitals and keywords"),
    pytest.param("q\"u'o", "\"quoted\"''", id="quotes"),
    pytest.param("50%", "%s %(x)s %%", id="percent signs"),
    pytest.param("a:b", " :x ::y", id="colons and spaces"),
    pytest.param("{x}", "{table} {0} {{}}", id="braces"),
    pytest.param("back\\slash", "\\:x\\", id="backslashes"),
    pytest.param("schéma", "таблица🐘", id="not ASCII"),
    pytest.param("s" * 63, "t" * 63, id="63 bytes"),
    pytest.param("é" * 31 + "s", "漢" * 21, id="63 bytes, fewer letters"),
    pytest.param("a$function$b", "$1 $function$ $$", id="dollars"),
    pytest.param("a.b", "--c;/*\n\td", id="dots, comments and white space"),
]
TRACES = """
SELECT 'relation', n.nspname, c.relname, c.relkind::text FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
WHERE nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast') AND relname NOT LIKE 'openmemory_alembic_version%'
UNION ALL
SELECT 'column', attrelid::regclass::text, attname, format_type(atttypid, atttypmod) FROM pg_attribute
WHERE attrelid >= 16384 AND attnum > 0 AND NOT attisdropped
  AND attrelid::regclass::text NOT LIKE '%openmemory_alembic_version%'
UNION ALL
SELECT 'function', pronamespace::regnamespace::text, proname, prosrc FROM pg_proc p
WHERE oid >= 16384 AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = p.oid AND deptype = 'e')
UNION ALL
SELECT 'trigger', tgrelid::regclass::text, tgname, '' FROM pg_trigger
UNION ALL
SELECT 'comment', objoid::regclass::text, objsubid::text, description FROM pg_description
WHERE classoid = 'pg_class'::regclass AND objoid >= 16384
"""


@pytest.mark.parametrize(
    ("schema", "table"),
    [
        pytest.param(*name.values, id=name.id, marks=[] if i % 3 == 0 else pytest.mark.slow)
        for i, name in enumerate(NAMES)
    ],
)
def test_names_of_any_characters_go_up_and_down_and_leave_nothing(database: Database, schema: str, table: str) -> None:
    env = {"OM_PG_SCHEMA": schema, "OM_VECTOR_TABLE": table}
    bad = Row(str(uuid.UUID(int=1)), "se'c%s:t{}", None, pack([1, float("nan"), 3]), 3)
    create_table(database, table, schema)
    load(database, [*random_rows(119, 3), bad], table, schema)
    before, traces = checksum(database, table, schema=schema), sorted(database.rows(TRACES))

    result = alembic(database, "upgrade", "head", env=env)

    assert mismatches(database, table, schema) == []
    assert "building index" in result.log
    valid = "SELECT indisvalid FROM pg_index JOIN pg_class c ON c.oid = indexrelid JOIN pg_am a ON a.oid = relam"
    assert database.rows(valid + " WHERE amname = 'ivfflat'") == [(True,)]
    assert database.value("SELECT count(*) FROM pg_trigger WHERE NOT tgisinternal") == 1
    # the application's writes go through the trigger
    load(database, random_rows(5, 3, seed=1), table, schema)
    name = Identifier(schema, table)
    database.run(SQL("UPDATE {} SET v = {} WHERE sector = 'semantic'").format(name, Literal(pack([1, -0.0, 1e-45]))))
    assert mismatches(database, table, schema) == []
    assert database.value(SQL("SELECT count(*) FROM {} WHERE v_vector IS NULL").format(name)) == 1
    written = checksum(database, table, schema=schema)
    assert written != before

    alembic(database, "downgrade", "base", env=env)

    assert checksum(database, table, schema=schema) == written
    extension = "SELECT 1 FROM pg_extension WHERE extname = 'vector'"
    assert database.rows(extension) == [(1,)]
    assert sorted(database.rows(TRACES)) == traces


@pytest.mark.parametrize("schema", ["nowhere", "no %s {where} :x \"y' \\"])
def test_a_missing_schema_is_named_and_nothing_is_made(database: Database, schema: str) -> None:
    create_table(database)
    everything = (
        "SELECT (SELECT count(*) FROM pg_class), (SELECT count(*) FROM pg_namespace), (SELECT count(*) FROM pg_proc)"
    )
    before = database.rows(everything)

    for command in (["upgrade", "head"], ["downgrade", "base"], ["current"]):
        result = alembic(database, *command, env={"OM_PG_SCHEMA": schema}, check=False)

        assert result.returncode != 0
        assert "Traceback" not in result.log
        assert 'schema "{}" does not exist\nHINT:  '.format(schema.replace('"', '""')) in result.log
        assert database.rows(everything) == before


@pytest.mark.slow
@pytest.mark.parametrize("driver", ["psycopg2", "psycopg"])
@pytest.mark.parametrize("how", ["immediate", "fast"])
def test_a_commit_on_a_connection_that_is_no_more_says_that_it_was_lost(driver: str, how: str) -> None:
    """Whatever the driver says of it: after an immediate shutdown libpq takes it for a good one."""
    with embedded.temporary(bin=programs(), options=OPTIONS) as server:
        there = Database("postgres", server.url().replace("postgresql:", f"postgresql+{driver}:"))
        errors = []
        with suppress(DBAPIError), package(there, PackageDatabase) as db:  # what it does at its end fails too
            db.value("SELECT 1")
            server.stop(how)
            try:
                db.commit()
            except DBAPIError as error:
                errors.append(as_migration_error(error, "committing"))

    assert [type(error) for error in errors] == [ConnectionLost]
