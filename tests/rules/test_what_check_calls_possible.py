"""R11: what `check` calls possible, `upgrade` does; what it refuses, `upgrade` refuses in the same words.

Of tables in randomly made states: what such a state may consist of is listed once, each with how to make it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from psycopg2.sql import SQL, Identifier

from demo.openmemory import TABLE
from openmemory_migrations.embedded import Server
from tests.support.cases import exhaustive
from tests.support.commands import alembic, om
from tests.support.databases import Databases
from tests.support.openmemory import Database, Row, load, mismatches, pack, random_rows

DIM = 4
IN_CI, ALL = 30, 300

COLUMNS = "id uuid, sector text, user_id text, v bytea, dim integer NOT NULL"
# how the table is made
FORMS = {
    "as OpenMemory makes it": f"CREATE TABLE {TABLE} ({COLUMNS}, PRIMARY KEY (id, sector))",
    "without a key": f"CREATE TABLE {TABLE} ({COLUMNS})",
    "v is NOT NULL": f"CREATE TABLE {TABLE}"
    f" ({COLUMNS.replace('v bytea', 'v bytea NOT NULL')}, PRIMARY KEY (id, sector))",
    "partitioned": f"CREATE TABLE {TABLE} ({COLUMNS}, PRIMARY KEY (id, sector)) PARTITION BY HASH (id);"
    f" CREATE TABLE one PARTITION OF {TABLE} FOR VALUES WITH (MODULUS 2, REMAINDER 0);"
    f" CREATE TABLE two PARTITION OF {TABLE} FOR VALUES WITH (MODULUS 2, REMAINDER 1)",
    "partitioned, without partitions": f"CREATE TABLE {TABLE} ({COLUMNS}) PARTITION BY HASH (id)",
    "of a type": f"CREATE TYPE kind AS ({COLUMNS.removesuffix(' NOT NULL')}); CREATE TABLE {TABLE} OF kind",
    "inherited from": f"CREATE TABLE {TABLE} ({COLUMNS}); CREATE TABLE child () INHERITS ({TABLE})",
    "that inherits": f"CREATE TABLE parent (id uuid, v bytea); CREATE TABLE {TABLE} ({COLUMNS}) INHERITS (parent)",
    "with a generated column": f"CREATE TABLE {TABLE}"
    f" ({COLUMNS}, octets integer GENERATED ALWAYS AS (length(v)) STORED, PRIMARY KEY (id, sector))",
    "v is generated": f"CREATE TABLE {TABLE}"
    f" ({COLUMNS.replace('v bytea', 'v bytea GENERATED ALWAYS AS (decode(sector, $$escape$$)) STORED')})",
    "v is of a domain": f"CREATE DOMAIN raw AS bytea; CREATE TABLE {TABLE} ({COLUMNS.replace('bytea', 'raw')})",
    "unlogged": f"CREATE UNLOGGED TABLE {TABLE} ({COLUMNS}, PRIMARY KEY (id, sector))",
    "a vector already": f"CREATE EXTENSION vector; CREATE TABLE {TABLE} ({COLUMNS.replace('bytea', 'vector')})",
    "a view": f"CREATE TABLE other ({COLUMNS}); CREATE VIEW {TABLE} AS SELECT * FROM other",
    "missing": "CREATE SCHEMA nothing",
}
TRIGGER = (
    "CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} END $$;"
    f" CREATE TRIGGER {{name}} {{when}} ON {TABLE} FOR EACH {{each}} EXECUTE FUNCTION {{name}}()"
)


def trigger(name: str, when: str, body: str, each: str = "ROW") -> str:
    return TRIGGER.format(name=name, when=when, body=body, each=each)


# what a table may have; each statement fails on some forms, and is left out there
THINGS = {
    "an old column": f"ALTER TABLE {TABLE} ADD old text; ALTER TABLE {TABLE} DROP old",
    "v_vector of another type": f"ALTER TABLE {TABLE} ADD v_vector text",
    "v_vector of theirs": f"CREATE EXTENSION IF NOT EXISTS vector; ALTER TABLE {TABLE} ADD v_vector vector({DIM})",
    "v_vector of theirs, with values": "CREATE EXTENSION IF NOT EXISTS vector;"
    f" ALTER TABLE {TABLE} ADD v_vector vector; UPDATE {TABLE} SET v_vector = '[1,2,3,4]'",
    "v_vector of theirs, of other dimensions": "CREATE EXTENSION IF NOT EXISTS vector;"
    f" ALTER TABLE {TABLE} ADD v_vector vector; UPDATE {TABLE} SET v_vector = '[1,2]', v = NULL",
    "v_vector of theirs, shown by a view": "CREATE EXTENSION IF NOT EXISTS vector;"
    f" ALTER TABLE {TABLE} ADD v_vector vector({DIM}); CREATE VIEW shown AS SELECT v_vector FROM {TABLE}",
    "v_vector of theirs, NOT NULL": "CREATE EXTENSION IF NOT EXISTS vector;"
    f" ALTER TABLE {TABLE} ADD v_vector vector({DIM}) NOT NULL DEFAULT '[0,0,0,0]'",
    "v_vector of theirs, indexed": "CREATE EXTENSION IF NOT EXISTS vector;"
    f" ALTER TABLE {TABLE} ADD v_vector vector({DIM});"
    f" CREATE INDEX theirs ON {TABLE} USING hnsw (v_vector vector_l2_ops)",
    "a view": f"CREATE VIEW everything AS SELECT * FROM {TABLE}",
    "a rule": f"CREATE RULE held AS ON UPDATE TO {TABLE} WHERE OLD.user_id = 'x' DO INSTEAD NOTHING",
    "a rule for inserts": f"CREATE RULE noted AS ON INSERT TO {TABLE} DO ALSO NOTIFY noted",
    "a constraint that holds": f"ALTER TABLE {TABLE} ADD CONSTRAINT holds CHECK (dim > 0)",
    "a constraint that doesn't": f"ALTER TABLE {TABLE} ADD CONSTRAINT doesnt CHECK (sector <> 'semantic') NOT VALID",
    "a NOT NULL that doesn't": f"UPDATE {TABLE} SET user_id = NULL WHERE sector = 'semantic';"
    f" ALTER TABLE {TABLE} ADD CONSTRAINT never NOT NULL user_id NOT VALID",
    "a constraint on v": f"ALTER TABLE {TABLE} ADD CHECK (length(v) < 100000)",
    "a foreign key": "CREATE TABLE kinds (sector text PRIMARY KEY);"
    f" INSERT INTO kinds SELECT DISTINCT sector FROM {TABLE};"
    f" ALTER TABLE {TABLE} ADD FOREIGN KEY (sector) REFERENCES kinds",
    "an index of expressions": f"CREATE INDEX lengths ON {TABLE} (length(v)); CREATE INDEX ON {TABLE} (user_id)",
    "the index's name": f"CREATE INDEX {TABLE}_vvector_idx ON {TABLE} (user_id)",
    "the index's name, of a table": f"CREATE TABLE {TABLE}_vvector_idx ()",
    "the function's name": f"CREATE FUNCTION {TABLE}_vvector_sync() RETURNS integer LANGUAGE sql AS 'SELECT 1'",
    "the adopted column's name": f"ALTER TABLE {TABLE} ADD v_vector_adopted text",
    "all row-level security": f"ALTER TABLE {TABLE} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY",
    "a publication": f"CREATE PUBLICATION changes FOR TABLE {TABLE}",
    "a row filter": f"CREATE PUBLICATION part FOR TABLE {TABLE} WHERE (user_id <> 'x')",
    "a column list": f"CREATE PUBLICATION columns FOR TABLE {TABLE} (id, sector)",
    "a trigger of our name": "CREATE FUNCTION mine() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';"
    f" CREATE TRIGGER {TABLE}_vvector_sync BEFORE INSERT ON {TABLE} FOR EACH ROW EXECUTE FUNCTION mine()",
    "audits statements": f"CREATE TABLE log (LIKE {TABLE}); CREATE FUNCTION logged() RETURNS trigger LANGUAGE plpgsql"
    " AS 'BEGIN INSERT INTO public.log SELECT * FROM added; RETURN NULL; END';"
    f" CREATE TRIGGER logged AFTER INSERT ON {TABLE} REFERENCING NEW TABLE AS added"
    " FOR EACH STATEMENT EXECUTE FUNCTION logged()",
    "no identity": f"ALTER TABLE {TABLE} REPLICA IDENTITY NOTHING",
    "a full identity": f"ALTER TABLE {TABLE} REPLICA IDENTITY FULL",
    "statistics": f"ALTER TABLE {TABLE} ALTER v SET STATISTICS 7, ALTER v SET (n_distinct = -1)",
    "storage": f"ALTER TABLE {TABLE} ALTER v SET STORAGE EXTERNAL; COMMENT ON COLUMN {TABLE}.v IS 'it''s %s {{x}}'",
    "a default": f"ALTER TABLE {TABLE} ALTER v SET DEFAULT '\\x0000803f0000803f0000803f0000803f'",
    "few in a page": f"ALTER TABLE {TABLE} SET (fillfactor = 10)",
    "stamps": trigger("stamps", "BEFORE INSERT OR UPDATE", "NEW.user_id := coalesce(NEW.user_id, 'x'); RETURN NEW;"),
    "spoils": trigger("zz_spoils", "BEFORE UPDATE", "NEW.v := set_byte(NEW.v, 0, 7); RETURN NEW;"),
    "spoils after us": trigger("zz_vector", "BEFORE INSERT OR UPDATE", "NEW.v_vector := NULL; RETURN NEW;"),
    "swallows": trigger(
        "swallows", "BEFORE UPDATE", "IF NEW.sector = 'semantic' THEN RETURN NULL; END IF; RETURN NEW;"
    ),
    "raises": trigger("raises", "BEFORE UPDATE", "IF NEW.sector = 'semantic' THEN RAISE 'no'; END IF; RETURN NEW;"),
    "raises for statements": trigger("never", "BEFORE UPDATE", "RAISE 'never';", each="STATEMENT"),
    "audits": f"CREATE TABLE audit (LIKE {TABLE});"
    + trigger("audits", "AFTER INSERT OR UPDATE", "INSERT INTO audit SELECT NEW.*; RETURN NULL;"),
    "audits by name": "CREATE TABLE notes (id uuid);"
    + trigger("notes", "AFTER UPDATE", "INSERT INTO public.notes VALUES (NEW.id); RETURN NULL;"),
    "audits without a schema": "CREATE TABLE diary (id uuid);"
    + trigger("diary", "AFTER UPDATE", "INSERT INTO diary VALUES (NEW.id); RETURN NULL;"),
    "a disabled trigger": trigger("sleeps", "BEFORE UPDATE", "RAISE 'no';")
    + f"; ALTER TABLE {TABLE} DISABLE TRIGGER sleeps",
}
READ_ONLY = "default_transaction_read_only"
SETTINGS = {
    "default_transaction_isolation": "serializable",
    READ_ONLY: "on",
    "session_replication_role": "replica",
    "search_path": "nowhere",
    "quote_all_identifiers": "on",
    "standard_conforming_strings": "off",
    "bytea_output": "escape",
    "extra_float_digits": "-15",
    "DateStyle": "German",
    "statement_timeout": "2s",
    "lock_timeout": "1ms",
    "idle_in_transaction_session_timeout": "1s",
    "row_security": "off",
    "check_function_bodies": "off",
    "enable_seqscan": "off",
    "max_parallel_workers_per_gather": "0",
    "client_min_messages": "error",
    "default_toast_compression": "pglz",
    "synchronous_commit": "off",
    "plpgsql.variable_conflict": "use_variable",
}
# of a plain role that owns the table, and what it is taken away
RIGHTS = {
    "all": "SELECT 1",
    "the extension there": "CREATE EXTENSION IF NOT EXISTS vector",
    "not to create": "CREATE EXTENSION IF NOT EXISTS vector; REVOKE CREATE ON SCHEMA public FROM {role}, PUBLIC",
    "no temporary tables": "CREATE EXTENSION IF NOT EXISTS vector; REVOKE TEMPORARY ON DATABASE {database} FROM PUBLIC",
    "not the extension's schema": "CREATE SCHEMA ext; CREATE EXTENSION vector SCHEMA ext",
    "the extension elsewhere": "CREATE SCHEMA ext; CREATE EXTENSION vector SCHEMA ext;"
    " GRANT USAGE ON SCHEMA ext TO {role}",
    "not the table": "CREATE EXTENSION IF NOT EXISTS vector;"
    " ALTER TABLE {table} OWNER TO postgres; GRANT ALL ON {table} TO {role}",
}
OPTIONS = {
    "OM_BACKFILL_ENGINE": ("client", "server", "native"),
    "OM_INDEX": ("ivfflat", "hnsw", "none"),
    "OM_SYNC_TRIGGER": ("off",),
    "OM_BACKFILL_WORKERS": ("2",),
    "OM_ON_BAD_ROWS": ("skip", "fail"),
    "OM_VEC_DIM": ("4", "8"),
    "BACKFILL_BATCH": ("1", "7"),
}


@dataclass
class State:
    """What a database was made of, as a failing test shows it."""

    form: str
    rows: int
    things: list[str] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)
    rights: str = "of a superuser"
    env: dict[str, str] = field(default_factory=dict)


def rows_of(chosen: random.Random) -> list[Row]:
    rows = random_rows(chosen.choice((0, 1, 40, 200)), DIM, seed=chosen.randrange(100))
    odd: dict[str, list[bytes | None]] = {
        "bad": [b"", b"abc", pack([float("nan")] * DIM)],
        "none": [None],
        "longer": [pack([1.0] * 8)],
    }
    for kind in chosen.sample(sorted(odd), chosen.choice((0, 0, 1, 2))):
        rows[: len(odd[kind])] = [row._replace(v=v) for row, v in zip(rows, odd[kind], strict=False)]
    return rows


@contextmanager
def made(seed: int, server: Server, databases: Databases) -> Iterator[tuple[State, Database, Database]]:
    """The database as a superuser sees it, and as who migrates it does."""
    chosen = random.Random(seed)
    form = chosen.choice([*FORMS, *4 * ["as OpenMemory makes it"], "partitioned"])
    rows = rows_of(chosen)
    with databases.empty() as database:
        state = State(form, len(rows))
        database.run(FORMS[form])
        if form not in ("missing", "a view", "v is generated", "partitioned, without partitions", "a vector already"):
            load(database, [row for row in rows if row.v is not None or form != "v is NOT NULL"])
        for thing in chosen.sample(sorted(THINGS), chosen.choice((0, 1, 1, 2, 3))):
            try:
                database.run(THINGS[thing])
            except Exception:  # not on a table of this form
                continue
            state.things.append(thing)
        who, role = database, f"migrates {database.name}"
        if chosen.random() < 0.3 and form != "missing":
            names = {"role": Identifier(role), "database": Identifier(database.name), "table": Identifier(TABLE)}
            state.rights = chosen.choice(sorted(RIGHTS))
            for sql in ("CREATE ROLE {role} LOGIN", "GRANT CREATE ON SCHEMA public TO {role}", RIGHTS[state.rights]):
                if sql == RIGHTS[state.rights]:
                    database.run(SQL("ALTER TABLE {table} OWNER TO {role}").format(**names))
                try:
                    database.run(SQL(sql).format(**names))
                except Exception:
                    assert "ext" in sql  # it is there already
            who = Database(database.name, server.url(database.name, user=role))
        # the last one is that no other can be set after
        for name in sorted(chosen.sample(sorted(SETTINGS), chosen.choice((0, 0, 1, 2))), key=READ_ONLY.__eq__):
            if name == "session_replication_role" and who is not database:
                continue
            database.run(
                SQL("ALTER DATABASE {} SET {} = %s").format(Identifier(database.name), SQL(name)), SETTINGS[name]
            )
            state.settings.append(name)
        for name in chosen.sample(sorted(OPTIONS), chosen.choice((0, 1, 2))):
            state.env[name] = chosen.choice(OPTIONS[name])
        try:
            yield state, database, who
        finally:
            if who is not database:
                with closing(database.connect()) as connection, connection.cursor() as cursor:
                    cursor.execute("SET default_transaction_read_only = off")
                    cursor.execute(SQL("DROP OWNED BY {0} CASCADE; DROP ROLE {0}").format(Identifier(role)))


def bytes_of(database: Database, state: State) -> str | None:
    if state.form in ("missing", "a view", "a vector already"):
        return None
    return str(
        database.value(
            "SELECT md5(string_agg(concat(id, sector, dim, encode(v, 'hex')), ',' ORDER BY id, sector, v))"
            f" FROM public.{TABLE}"
        )
    )


def _errors(found: dict[str, Any]) -> list[str]:
    return [one["message"] for one in found["findings"] if one["severity"] == "error"]


# of a step that has come upon the rows, and has kept or passed by what it says beforehand
LATER = {
    "bad-rows": "can't be converted",
    "not-valid": "could not be converted, though their bytes are vectors",
    "extension-rights": "can't be created",
}
NAMED = ("trigger", "interference")  # a row that a trigger refuses is none that can be seen before: it is named


def _in_the_same_words(found: dict[str, Any], log: str) -> bool:
    errors = [one for one in found["findings"] if one["severity"] == "error"]
    return any(one["message"] in log or LATER.get(one["code"], one["message"]) in log for one in errors)


def _refused_by_what_was_named(found: dict[str, Any], log: str) -> bool:
    warned = any(one["code"] in NAMED and one["severity"] == "warning" for one in found["findings"])
    return warned and "could not be converted, though their bytes are vectors" in log


def _wrong(database: Database) -> list[tuple[Any, ...]]:
    """Rows with bytes, whose vector isn't what they are."""
    without = {(id, sector) for id, sector in database.rows(f"SELECT id, sector FROM public.{TABLE} WHERE v IS NULL")}
    return [key for key in mismatches(database) if key not in without]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [*range(IN_CI), *(exhaustive(seed, id=str(seed)) for seed in range(IN_CI, ALL))])
def test_in_any_state(server: Server, databases: Databases, seed: int) -> None:
    with made(seed, server, databases) as (state, database, who):
        before = bytes_of(database, state)
        checked = om(who, "check", "--json", env=state.env)
        assert checked.stdout, f"{state}\n{checked.log}"
        found = json.loads(checked.stdout)
        done = alembic(who, "upgrade", "head", env=state.env, check=False)
        told = f"{state}\n{_errors(found)}\n{done.log}"

        assert (checked.returncode == 0) == found["migratable"] == (not _errors(found)), told
        assert "Traceback" not in checked.log + done.log, told
        assert bytes_of(database, state) == before, told
        refused = _refused_by_what_was_named(found, done.log)
        assert (done.returncode == 0) == found["migratable"] or refused, told
        if not found["migratable"]:
            assert _in_the_same_words(found, done.log), told
        elif done.returncode == 0 and state.form != "a vector already":
            wrong = _wrong(database) if state.env.get("OM_ON_BAD_ROWS") != "skip" else []
            assert not wrong, f"{told}\n{wrong}"
        if state.form in ("missing", "a view"):
            return
        down = alembic(who, "downgrade", "base", env=state.env | {"OM_ACCEPT_LOSS": "1000"}, check=False)
        assert "Traceback" not in down.log, f"{told}\n{down.log}"
        assert bytes_of(database, state) == before, told
        named = 'trigger "zz_vector"' in down.log  # it writes to the column that goes
        assert down.returncode == 0 or not found["migratable"] or named, f"{told}\n{down.log}"
