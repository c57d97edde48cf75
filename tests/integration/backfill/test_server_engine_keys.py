"""The server engine's pages: by primary keys of any kind, and at one price from the first page to the last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
from psycopg2.sql import SQL, Identifier
from sqlalchemy.engine import CursorResult

from demo.openmemory import TABLE
from openmemory_migrations.database import Database as PackageDatabase
from tests.support.commands import Result, alembic, result, start_alembic
from tests.support.openmemory import Database, create_table, expected, load, mismatches, random_rows
from tests.support.package import run_backfill
from tests.support.server_engine import OFF, SERVER
from tests.support.states import BACKFILL, EXPAND

pytestmark = pytest.mark.slow  # many processes: .ci/run has the time

DIM, ROWS = 3, 40
LARGE, BATCH = 6_000, 200
EXPLAIN = "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) "
ODD_TEXTS = [
    "",
    " ",
    "a",
    "A",
    "ä",
    "Z",
    "a b",
    "it's",
    '"',
    "\\",
    "\\x41",
    "%s",
    ":v",
    "{}",
    "\x01",
    "\t",
    "\n",
    "\x7f",
]
ODD_TEXTS += ["ß", "ss", "é", "e\u0301", "😀", "\u200b", "漢字", "NULL", "null", "0", "-1", "1e3", "a" * 900]
# columns and primary key, then an expression for the key's values of row i
KEYS = {
    "bigint": ("id bigint PRIMARY KEY", "(i - 20) * 461168601842738790"),
    "integer, descending in places": ("id integer PRIMARY KEY", "(i * 7919) % 1009 - 500"),
    "numeric": ("id numeric PRIMARY KEY", "(i - 20)::numeric / 7"),
    "uuid": ("id uuid PRIMARY KEY", "md5(i::text)::uuid"),
    "bytea": ("id bytea PRIMARY KEY", "decode(md5(i::text), 'hex')"),
    "date": ("id date PRIMARY KEY", "'2000-02-28'::date + i * 37"),
    "varchar(8)": ("id varchar(8) PRIMARY KEY", "md5(i::text)::varchar(8)"),
    "char(8)": ("id char(8) PRIMARY KEY", "left(md5(i::text), 3 + i % 6)"),
    "bit(8)": ("id bit(8) PRIMARY KEY", "i::bit(8)"),
    "float8": ("id float8 PRIMARY KEY", "i / 7.0"),
    '"char"': ('id "char" PRIMARY KEY', "chr(40 + i)"),
    "names": (
        'sector text, "a ""b"" :c %s {d}" uuid, ":e" integer, PRIMARY KEY ("a ""b"" :c %s {d}", ":e")',
        "'s', md5((i / 4)::text)::uuid, i",
    ),
    "composite": (
        "sector text, made timestamptz, id integer, PRIMARY KEY (sector, made, id)",
        "(ARRAY['', 'a', 'A', 'ä'])[1 + i % 4], '1883-11-18 12:00:00.1Z'::timestamptz + '1s'::interval * (i % 3), -i",
    ),
    "infinities": (
        "id timestamptz, sector integer, PRIMARY KEY (id, sector)",
        "(ARRAY['-infinity', 'infinity', '0044-03-15 12:00 BC', '2026-10-25 00:30Z'])[1 + i % 4]::timestamptz, i",
    ),
}

# the others are marked slow: many processes
QUICK = ("bigint", "char(8)", "names", "composite")


def with_key(database: Database, columns: str, values: str, rows: int = ROWS) -> None:
    """The table with that key, and rows whose v are their numbers; expanded, without the trigger."""
    database.run(f"CREATE TABLE {TABLE} ({columns}, v bytea)")
    database.run(
        f"INSERT INTO {TABLE} SELECT {values}, decode(repeat(lpad(to_hex(i), 6, '0') || '3f', {DIM}), 'hex')"
        f" FROM generate_series(1, {rows}) AS i"
    )
    alembic(database, "upgrade", EXPAND, env=OFF)


def wrong(database: Database) -> int:
    rows = database.rows(f"SELECT v, vector_send(v_vector) FROM {TABLE}")
    assert len(rows) >= len(ODD_TEXTS) or len(rows) == ROWS
    return sum((sent and bytes(sent)) != expected(v) for v, sent in rows)


def ends(database: Database, **env: str) -> Result:
    """The backfill by pages of three rows; it must come to an end."""
    process = start_alembic(database, "upgrade", BACKFILL, env=SERVER | OFF | {"BACKFILL_BATCH": "3"} | env)
    try:
        process.wait(60)
    finally:
        process.kill()
    return result(process)


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KEYS]
)
def test_pages_by_a_key_of_any_kind(database: Database, kind: str) -> None:
    with_key(database, *KEYS[kind])

    ended = ends(database)

    assert ended.returncode == 0, ended.log
    assert f"backfill {TABLE}: {ROWS} of {ROWS} rows (100 %)" in ended.log
    assert wrong(database) == 0
    assert database.value(f"SELECT max(n) FROM (SELECT count(*) AS n FROM {TABLE} GROUP BY xmin) AS pages") <= 3


@pytest.mark.parametrize(
    "collation",
    ["C", *(pytest.param(name, marks=pytest.mark.slow) for name in ("default", "en-x-icu", "nondeterministic"))],
)
def test_pages_by_odd_texts_in_any_collation(database: Database, collation: str) -> None:
    if collation in ("en-x-icu", "nondeterministic"):
        if not database.value("SELECT count(*) FROM pg_collation WHERE collname = 'en-x-icu'"):
            pytest.skip("a server without ICU")
        # one that knows no difference between é and its two halves
        database.run("CREATE COLLATION nondeterministic (provider = icu, locale = 'und', deterministic = false)")
    create = SQL("CREATE TABLE {} (id text COLLATE {} PRIMARY KEY, v bytea)")
    database.run(create.format(Identifier(TABLE), Identifier(collation)))
    for number, text in enumerate(ODD_TEXTS):
        v = random_rows(1, DIM, seed=number)[0].v
        database.run(f"INSERT INTO {TABLE} VALUES (%s, %s) ON CONFLICT DO NOTHING", text, v)
    alembic(database, "upgrade", EXPAND, env=OFF)

    ended = ends(database)

    assert ended.returncode == 0, ended.log
    assert wrong(database) == 0


def test_pages_by_an_enum_of_another_schema(database: Database) -> None:
    labels = [f"l{i}" for i in range(ROWS, 0, -1)]
    kind = Identifier('o:d"%d', "k {i}nd")
    with_schema = SQL("CREATE SCHEMA {}; CREATE TYPE {} AS ENUM ({})").format(
        Identifier('o:d"%d'), kind, SQL(", ").join(SQL(f"'{label}'") for label in labels)
    )
    database.run(with_schema)
    with_key(database, 'id "o:d""%d"."k {i}nd" PRIMARY KEY', """('l' || i)::"o:d""%d"."k {i}nd\"""")

    ended = ends(database)

    assert ended.returncode == 0, ended.log
    assert wrong(database) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "key"),
    [
        # a time zone's abbreviation is another zone's too
        pytest.param({"DateStyle": "SQL, DMY", "TimeZone": "Asia/Kolkata"}, KEYS["infinities"], id="dates"),
        pytest.param({"extra_float_digits": "-10"}, ("id float8 PRIMARY KEY", "1 + i / 1e12"), id="floats"),
        pytest.param(
            {"IntervalStyle": "sql_standard"},
            ("id interval PRIMARY KEY", "i * '1 day -1 hour'::interval"),
            id="intervals",
        ),
    ],
)
def test_what_the_database_says_of_text_does_not_change_the_pages(
    database: Database, settings: Mapping[str, str], key: tuple[str, str]
) -> None:
    with_key(database, *key)
    for name, value in settings.items():
        database.run(f"ALTER DATABASE {database.name} SET {name} = '{value}'")
    # psycopg2 sets a DateStyle of its own
    by_psycopg = Database(database.name, database.url.replace("postgresql:", "postgresql+psycopg:"))

    ended = ends(by_psycopg)

    assert ended.returncode == 0, ended.log
    assert wrong(database) == 0


class Explained(PackageDatabase):
    """The package's connections, which keep the plan of each page's two statements as they are really run."""

    pages: list[dict[str, Any]]
    updates: list[dict[str, Any]]

    def run(self, template: str, parameters: Mapping[str, Any] | None = None, /, **names: str) -> CursorResult[Any]:
        for kept, begin in ((self.pages, "SELECT {key_text}"), (self.updates, "UPDATE {table}")):
            if template.startswith(begin):
                super().run("SAVEPOINT explained")
                (answer,) = super().run(EXPLAIN + template, parameters, **names).scalar_one()
                super().run("ROLLBACK TO SAVEPOINT explained")
                kept.append(answer["Plan"])
        return super().run(template, parameters, **names)


def nodes(plan: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [plan, *(node for child in plan.get("Plans", ()) for node in nodes(child))]


def touched(plan: Mapping[str, Any]) -> int:
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


def large(database: Database, statistics: str) -> None:
    create_table(database)
    database.run(f"ALTER TABLE {TABLE} SET (autovacuum_enabled = off)")
    load(database, random_rows(10, DIM, seed=1))
    alembic(database, "upgrade", EXPAND, env=OFF | {"OM_VEC_DIM": str(DIM)})
    if statistics == "of the small table":
        database.run(f"VACUUM ANALYZE {TABLE}")
    load(database, random_rows(LARGE, DIM, seed=2))
    if statistics == "of the large table":
        database.run(f"ANALYZE {TABLE}")


@pytest.mark.parametrize(
    ("statistics", "index"),
    [
        ("none", None),
        pytest.param("of the small table", None, marks=pytest.mark.slow),
        pytest.param("of the large table", None, marks=pytest.mark.slow),
        pytest.param("none", "(id) WHERE v_vector IS NULL", marks=pytest.mark.slow),
        pytest.param("of the large table", "(dim, sector)", marks=pytest.mark.slow),
    ],
)
def test_every_page_costs_the_same_and_reads_the_table_by_its_key(
    database: Database, statistics: str, index: str | None
) -> None:
    large(database, statistics)
    if index:
        database.run(f"CREATE INDEX watched ON {TABLE} {index}")
    make = type("Kept", (Explained,), {"pages": [], "updates": []})

    db = run_backfill(database, make, backfill_engine="server", backfill_batch=BATCH)

    assert mismatches(database) == []
    # the last page is the rest; then nothing more, or another pass
    assert (LARGE + 10) // BATCH <= len(db.updates) <= (LARGE + 10) // BATCH + 2
    kinds = Counter(node["Node Type"] for plan in db.pages + db.updates for node in nodes(plan))
    assert set(kinds) <= {"Limit", "Index Scan", "ModifyTable"}, kinds
    for plans in (db.pages[:-1], db.updates[:-1]):
        early, late = (max(map(touched, part)) for part in (plans[1:6], plans[-6:]))
        assert late <= 1.3 * early + 50, (early, late)
        # so many rows and hardly more, not all that are pending
        assert max(node.get("Rows Removed by Filter", 0) for plan in plans for node in nodes(plan)) <= 2 * BATCH
