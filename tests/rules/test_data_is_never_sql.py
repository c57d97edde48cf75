"""R5: what is in a row, or in a name, is never taken for SQL, whatever the settings of the database are."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from psycopg2.sql import SQL, Identifier

import openmemory_migrations
from openmemory_migrations import sql
from openmemory_migrations.embedded import Server
from tests.support.cases import exhaustive
from tests.support.commands import alembic, om
from tests.support.databases import Databases
from tests.support.openmemory import Database, create_table, load, mismatches, pack, random_rows
from tests.support.scripts import SINGLE, offline, script
from tests.support.states import HEAD, column_type, stamp

DIM = 8
PACKAGE = Path(openmemory_migrations.__file__).parent
# what changes how the server reads a constant or a name, or how it writes a value
SETTINGS = {
    "standard_conforming_strings": "off",
    "escape_string_warning": "off",
    "backslash_quote": "off",
    "quote_all_identifiers": "on",
    "bytea_output": "escape",
    "extra_float_digits": "-15",
    "DateStyle": "SQL, DMY",
    "IntervalStyle": "sql_standard",
    "array_nulls": "off",
    "transform_null_equals": "on",
    "xmloption": "document",
}
NAMES = {
    "schema": """qu"o'te\\ $script$""",
    "table": """"@extension@"'\\{table} %1$s :v $function$ {>begin}""",
}
SHORT = {"schema": "back\\slash", "table": "\\' {x}"}  # which leaves room for what names of ours add
# each ends a constant, and a statement, that was quoted for another setting
EVIL = [
    'x*/--\\\', pwn()] AS text[]), CAST("sector" AS text)), 0)]) SELECT t."v", 0, 0 /*',
    "\\'); SELECT pwn(); --",
    "'); SELECT pwn(); --",
    "\\",
    "{source} :v %s %(v)s $1 @value@",
    "NULL",
    "ünï\\\n\t\"'",
]
PWN = """
CREATE TABLE public.pwned (by text);
CREATE FUNCTION public.pwn() RETURNS text LANGUAGE plpgsql AS
  $$ BEGIN INSERT INTO public.pwned VALUES (current_user); RETURN 1; END $$;
"""


def prepare(database: Database, schema: str, table: str) -> None:
    create_table(database, table, schema)
    rows = random_rows(280, DIM)
    rows = [row._replace(sector=EVIL[i % len(EVIL)], user_id=EVIL[-(i % 6)]) for i, row in enumerate(rows)]
    bad = [row._replace(v=v) for row, v in zip(rows[:3], (b"abc", pack([float("nan")] * DIM), b""), strict=False)]
    load(database, bad + rows[3:], table, schema)
    name = Identifier(schema, table)
    database.run(SQL("COMMENT ON COLUMN {}.v IS {}").format(name, SQL("E'a \"mark\" \\\\ {\\'a\\': 1}'")))
    database.run(PWN)
    for setting, value in SETTINGS.items():
        alter = SQL("ALTER DATABASE {} SET {} = %s").format(Identifier(database.name), SQL(setting))
        database.run(alter, value)


@pytest.fixture(params=[NAMES, pytest.param(SHORT, marks=pytest.mark.slow)], ids=["long names", "short names"])
def names(request: pytest.FixtureRequest) -> dict[str, str]:
    found: dict[str, str] = request.param
    return found


@pytest.fixture
def table(databases: Databases, names: dict[str, str]) -> Iterator[Database]:
    with databases.empty() as database:
        prepare(database, **names)
        yield database


def bytes_of(database: Database, schema: str, table: str, column: str = "v") -> list[tuple[str, str, bytes]]:
    read = SQL("SELECT id::text, sector, {} FROM {} ORDER BY 1, 2").format(
        Identifier(column), Identifier(schema, table)
    )
    return [(key, sector, value and bytes(value)) for key, sector, value in database.rows(read)]


def untouched(database: Database) -> bool:
    return not database.rows("SELECT FROM public.pwned")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "engine"),
    [
        pytest.param(NAMES, "client", id="long names-client"),
        pytest.param(SHORT, "native", id="short names-native"),
        exhaustive(SHORT, "client", id="short names-client"),
        exhaustive(NAMES, "native", id="long names-native"),
        exhaustive(NAMES, "server", id="long names-server"),
    ],
    indirect=["names"],
)
def test_a_life_under_these_settings(table: Database, names: dict[str, str], engine: str) -> None:
    env = {"OM_PG_SCHEMA": names["schema"], "OM_VECTOR_TABLE": names["table"], "OM_BACKFILL_ENGINE": engine}
    env["OM_VEC_DIM"] = str(DIM)
    where = (names["table"], names["schema"])
    before = bytes_of(table, **names)

    assert om(table, "check", env=env).returncode == 0
    log = alembic(table, "upgrade", "head", env=env).log
    assert "length not a multiple of 4: 1" in log
    assert mismatches(table, *where, DIM) == []
    for command in (["status"], ["verify", "--queries", "20"], ["report", "--queries", "20"], ["index", "--rebuild"]):
        assert om(table, *command, env=env).returncode == 0, command
    om(table, "tune", env=env)

    for mode in ("swap", "drop"):
        cutover = env | {"OM_CUTOVER": mode, "OM_ACCEPT_LOSS": "3"}
        alembic(table, "-n", "cutover", "upgrade", "head", env=cutover)
        assert om(table, "status", env=cutover).returncode == 0
        alembic(table, "-n", "cutover", "downgrade", "base", env=cutover)
        assert bytes_of(table, **names) == before

    alembic(table, "downgrade", "base", env=env)
    assert bytes_of(table, **names) == before
    assert column_type(table, table=names["table"], schema=names["schema"]) is None
    assert untouched(table)


@pytest.mark.parametrize("single", [{}, pytest.param(SINGLE, marks=pytest.mark.slow)], ids=["", "one transaction"])
def test_a_script_under_these_settings(
    server: Server, table: Database, names: dict[str, str], single: dict[str, str]
) -> None:
    env = {"OM_PG_SCHEMA": names["schema"], "OM_VECTOR_TABLE": names["table"], "OM_VEC_DIM": str(DIM), **single}
    before = bytes_of(table, **names)

    offline(server, table, "upgrade", "head", env=env)
    assert mismatches(table, names["table"], names["schema"], DIM) == []
    assert stamp(table, names["schema"]) == [HEAD]

    offline(server, table, "downgrade", "head:base", env=env)
    assert bytes_of(table, **names) == before
    assert column_type(table, table=names["table"], schema=names["schema"]) is None
    assert untouched(table)


NEARER = [
    "format(text, text)",
    "format(text, text, text)",
    "replace(name, text, text)",
    "quote_ident(name)",
    "col_description(oid, smallint)",
    "joined(text, name)",
]
BODY = "RETURNS text LANGUAGE plpgsql AS $$ BEGIN PERFORM public.pwn(); RETURN 'x'; END $$"
OPERATOR = "CREATE OPERATOR public.|| (LEFTARG = text, RIGHTARG = name, FUNCTION = public.joined)"


def test_what_is_asked_alike_calls_nobody_elses_function(server: Server, database: Database) -> None:
    """One whose arguments are nearer to ours would be taken, and be run by the role that migrates."""
    create_table(database)
    load(database, random_rows(60, DIM))
    database.run(
        "; ".join([PWN.rstrip().rstrip(";"), *(f"CREATE FUNCTION public.{one} {BODY}" for one in NEARER), OPERATOR])
    )
    env = {"OM_VEC_DIM": str(DIM)}

    assert om(database, "check", env=env).returncode == 0
    for command in (("upgrade", "head"), ("downgrade", "base")):
        alembic(database, *command, env=env)
    database.run("DROP TABLE openmemory_alembic_version")
    for command in (("upgrade", "head"), ("downgrade", "head:base")):
        offline(server, database, *command, env=env)
    assert untouched(database)


@pytest.mark.slow
def test_an_extension_whose_schema_is_called_as_a_quote_of_ours(server: Server, database: Database) -> None:
    schema = Identifier("x$function$; SELECT public.pwn(); SELECT $function$")
    create_table(database)
    load(database, random_rows(60, DIM))
    database.run(PWN)
    database.run(SQL("CREATE SCHEMA {0}; CREATE EXTENSION vector SCHEMA {0}").format(schema))
    setting = SQL("ALTER DATABASE {} SET check_function_bodies = off").format(Identifier(database.name))
    database.run(setting)
    env = {"OM_VEC_DIM": str(DIM)}

    offline(server, database, "upgrade", "head", env=env)
    assert mismatches(database) == []
    offline(server, database, "downgrade", "head:base", env=env)
    database.run("DROP TABLE openmemory_alembic_version")
    alembic(database, "upgrade", "head", env=env)
    assert mismatches(database) == []
    assert untouched(database)


@pytest.mark.slow
@pytest.mark.parametrize("single", [{}, SINGLE], ids=["", "one transaction"])
def test_a_script_says_that_it_is_utf_8(server: Server, database: Database, single: dict[str, str]) -> None:
    database.run("CREATE SCHEMA münze")
    create_table(database, "münze", "münze")
    load(database, random_rows(60, DIM), "münze", "münze")
    names = {"OM_PG_SCHEMA": "münze", "OM_VECTOR_TABLE": "münze"}
    name, env = Identifier(database.name), {"OM_VEC_DIM": str(DIM), **names, **single}

    for command, there in (("upgrade", "head"), f"vector({DIM})"), (("downgrade", "head:base"), None):
        database.run(SQL("ALTER DATABASE {} SET client_encoding = 'LATIN1'").format(name))
        offline(server, database, *command, env=env)
        database.run(SQL("ALTER DATABASE {} RESET client_encoding").format(name))
        assert column_type(database, table="münze", schema="münze") == there


@pytest.mark.parametrize("single", [{}, SINGLE], ids=["", "one transaction"])
def test_a_script_has_no_letters_but_those_of_names(single: dict[str, str]) -> None:
    """Or a database of LATIN1, or of others, would refuse it."""
    for command in (("upgrade", "head"), ("downgrade", "head:base")):
        assert script(*command, env={"OM_VEC_DIM": str(DIM), **single}).isascii()


def test_what_nobody_has_quoted_is_in_no_text() -> None:
    for value in ("x", "'x'", '"x"', None, 1.5, b"x"):
        with pytest.raises(TypeError, match="neither SQL nor a number"):
            sql.fill("SELECT {it}", {"it": value})
    assert sql.fill("SELECT {it|literal}, {it|ident}", {"it": "\\'{it}"}) == "SELECT E'\\\\''{it}', \"\\'{it}\""


def test_a_field_in_a_name_is_none_and_a_colon_no_parameter() -> None:
    names = {"a": sql.quote("{b} :c %1$s"), "b": sql.quote("x")}
    assert sql.fill("{a} {b}", names) == '"{b} :c %1$s" "x"'
    assert sql.fill("{a}", names, sql.bound) == '"{b} \\:c %1$s"'
    assert sql.fill("{a} {e}", {**names, "e": sql.Argument("%1$s")}, sql.formatted) == '"{b} :c %%1$s" %1$s'


def calls(*of: str) -> Iterator[tuple[str, ast.expr]]:
    """The first argument of each call of these, with the file and function that it is in."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and node.args and ast.unparse(node.func).split(".")[-1] in of:
                    yield f"{path.relative_to(PACKAGE)}:{function.name}", node.args[0]


def constant(node: ast.AST) -> bool:
    """Whether it is made of constants of the package, whatever chooses among them, and of nothing else."""
    if isinstance(node, ast.IfExp):
        return constant(node.body) and constant(node.orelse)
    if isinstance(node, ast.Attribute) and node.attr.isupper():
        return True
    return (not isinstance(node, ast.Name) or node.id.isupper()) and all(map(constant, ast.iter_child_nodes(node)))


# functions in which other text is called SQL, and what it is
VOUCHED = {
    "backfill/stage.py:__init__": "the sum of a column that is named by a field",
    "backfill/walk.py:_inside": "numbers",
    "columns/guard.py:drop": "a function, as regprocedure quotes it",
    "columns/guard.py:_create": "numbers",
    "columns/properties.py:set_default": "an expression, as pg_get_expr prints it",
    "columns/properties.py:_grant": "privileges, as aclexplode names them",
    "columns/properties.py:store": "one of the server's words",
    "cutover/kept.py:_whole": "a table, as regclass quotes it",
    "db/database.py:outlive_timeouts": "names of settings",
    "encoding/native.py:of": "a column of ours",
    "encoding/native.py:trial": "a column of ours",
    "index/build.py:create": "CONCURRENTLY, ONLY, and one of the two methods that a setting may have",
    "index/choice.py:plan": "options of ours with numbers",
    "preflight/rows.py:held": "an expression, as pg_get_expr prints it",
    "preflight/trial.py:_copy": "columns, as pg_get_indexdef prints them",
    "script/script.py:_tid": "a variable of a block's",
    "script/script.py:build_index": "one of the two methods that a setting may have",
    "script/script.py:index_formulas": "numbers, and a formula of ours",
    "sql/__init__.py:quote": "here it is quoted",
    "sql/__init__.py:literal": "here it is quoted",
    "sql/__init__.py:dollar_quote": "a tag that is in no text",
    "sql/__init__.py:fill": "nothing but SQL and numbers was put in",
    "sql/__init__.py:joined": "SQL, joined by constants",
    "steps/interference.py:of_whole_rows": "definitions of triggers, as pg_get_triggerdef prints them",
    "steps/statements.py:names": "a number in parentheses",
    "steps/statements.py:asked": "statements that a block of ours has put together",
    "verify/equality.py:_inside": "numbers",
    "verify/queries.py:_bound": "a number",
    "verify/queries.py:_sizes": "one of two constants",
    "verify/tuning.py:_copied": "a number",
}


def test_no_statement_is_put_together_from_what_is_read() -> None:
    """Parameters of functions hand on whole ones."""
    found = list(calls("run", "rows", "value", "quietly", "copy_out", "sql", "formatted"))
    assert len(found) > 300
    put = [
        (where, ast.unparse(node)) for where, node in found if isinstance(node, ast.JoinedStr) and not constant(node)
    ]
    assert put == []


def test_few_functions_call_something_sql_that_is_no_constant() -> None:
    assert {where for where, node in calls("SQL", "Argument") if not constant(node)} == set(VOUCHED)


def test_every_block_is_asked_for_by_its_name() -> None:
    """A name that is in no file fails when it is asked for; a block that nobody asks for would stay for ever."""
    code = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    texts = {path.stem: path.read_text() for path in (PACKAGE / "sql").glob("*.sql")}
    elsewhere = "\n".join(texts.values())
    for file, text in texts.items():
        for name in sql.BLOCK.findall(text):
            asked = f"BLOCKS.{name}" in code or f'"{name}"' in code
            assert asked or f"{{>{name}}}" in text or f"{{>{file}.{name}}}" in elsewhere, (file, name)
