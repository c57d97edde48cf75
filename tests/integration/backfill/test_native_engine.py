"""OM_BACKFILL_ENGINE=native: the server's own code makes the vector, behind a check of its length; nothing stays."""

from __future__ import annotations

import json
import random
import struct
import uuid
from collections.abc import Callable
from contextlib import closing

import psycopg2
import pytest

from demo.openmemory import TABLE
from openmemory_migrations.backfill import passes
from openmemory_migrations.db.database import Database as PackageDatabase
from tests.support.bad_rows import with_v
from tests.support.commands import alembic, om
from tests.support.openmemory import Database, checksum, create_table, load, mismatches, pack, random_rows
from tests.support.package import run_backfill
from tests.support.roles import other, owner
from tests.support.running import running, slow_rows
from tests.support.sessions import converted, eventually, logged_statements
from tests.support.states import BACKFILL, EXPAND, refused, snapshot

__all__ = ["other", "owner"]  # fixtures

NATIVE = {"OM_BACKFILL_ENGINE": "native"}
DIM = 8
EXPONENTS = (0, 1, 127, 254, 255)


def any_word(numbers: random.Random) -> int:
    """The bits of a float32: any, or one with an odd exponent."""
    if numbers.random() < 0.8:
        return numbers.getrandbits(32)
    return numbers.getrandbits(1) << 31 | numbers.choice(EXPONENTS) << 23 | numbers.choice((0, 1, 0x7FFFFF))


def any_value(numbers: random.Random, dimensions: int) -> bytes:
    """Of any length, most of them right or nearly so; half of those hold no exponent of NaN or infinity."""
    octets = numbers.choice([4 * dimensions] * 8 + [0, 1, 3, 4, 4 * dimensions - 1, 4 * dimensions + 4, 8 * dimensions])
    words = [any_word(numbers) for _ in range(-(-octets // 4))]
    if numbers.random() < 0.5:
        words = [word & ~(1 << 23) for word in words]
    return struct.pack(f"<{len(words)}I", *words)[:octets]


@pytest.mark.parametrize("values", [2_000, pytest.param(1_000_000, marks=(pytest.mark.slow, pytest.mark.exhaustive))])
def test_of_any_bytes_it_makes_what_they_say_or_nothing(
    database: Database, values: int, record_property: Callable[..., None]
) -> None:
    seed = random.randrange(2**32)
    record_property("seed", seed)
    numbers = random.Random(seed)
    create_table(database)
    rows = random_rows(min(values, 10_000), DIM)
    for first in range(0, values, len(rows)):
        some = (row._replace(id=str(uuid.UUID(int=first + n)), v=any_value(numbers, DIM)) for n, row in enumerate(rows))
        load(database, some)
    v = checksum(database)

    alembic(database, "upgrade", BACKFILL, env={**NATIVE, "OM_VEC_DIM": str(DIM)}, timeout=600)

    assert mismatches(database, dim=DIM) == []
    assert 0.1 * values < converted(database) < 0.9 * values
    assert checksum(database) == v


def test_nothing_of_it_stays(database: Database) -> None:
    create_table(database)
    load(database, random_rows(60, DIM))
    with logged_statements(database) as statements:
        alembic(database, "upgrade", "head", env=NATIVE)
    texts = [text.lstrip() for _, text in statements]
    made = [text for text in texts if text.startswith("CREATE OR REPLACE FUNCTION pg_temp.")]
    dropped = [text for text in texts if text.startswith("DROP FUNCTION IF EXISTS pg_temp.")]
    assert (len(made), len(dropped)) == (2, 1)  # one is to try it, and is rolled back
    assert database.value("SELECT count(*) FROM pg_proc WHERE prosrc = 'byteacat' AND proname <> 'byteacat'") == 0
    assert mismatches(database) == []


def test_who_is_no_superuser_is_told_so_before_any_change(database: Database, owner: Database) -> None:
    database.run("CREATE EXTENSION vector")
    alembic(owner, "upgrade", EXPAND)
    said = "OM_BACKFILL_ENGINE=native can't be had: role"

    refused(database, said, "is no superuser", env=NATIVE, by=owner)

    checked = om(owner, "check", env=NATIVE)
    assert checked.returncode == 1
    assert said in checked.stdout


def test_check_tries_it_and_says_how_long_it_takes(database: Database) -> None:
    create_table(database)
    load(database, [*random_rows(300, DIM), *with_v(pack([float("nan")] * DIM), 20, 1)])
    database.run("CREATE EXTENSION vector")
    found = json.loads(om(database, "check", "--json", env=NATIVE).stdout)
    assert found["engine"] == "native"
    assert found["estimate"]["seconds"]
    assert not snapshot(database)["functions"]


def test_nobody_else_can_call_it(database: Database, other: Database) -> None:
    create_table(database)
    load(database, random_rows(200, DIM))
    slow_rows(database, 0.01)
    call = "SELECT {}.openmemory_migrations_join('\\x0000'::bytea, '\\x00'::bytea)"
    with running(database, "upgrade", BACKFILL, env={**NATIVE, "BACKFILL_BATCH": "20"}) as run:
        schema = "SELECT pronamespace::regnamespace FROM pg_proc WHERE proname = 'openmemory_migrations_join'"
        eventually(lambda: database.rows(schema))
        (of_it,) = {name for (name,) in database.rows(schema)}
        # a function that is SECURITY DEFINER has the session's own pg_temp
        granted = "SELECT has_function_privilege('public', oid, 'EXECUTE') FROM pg_proc WHERE proname LIKE '%_join'"
        assert database.rows(granted) == [(False,)]
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            other.run(call.format(of_it))
        with pytest.raises((psycopg2.errors.UndefinedFunction, psycopg2.errors.InvalidSchemaName)):
            other.run(call.format("pg_temp"))
        assert run.ends() == 0


@pytest.mark.parametrize("new", ["'\\x00'", "NULL", "v || v", "decode(repeat('0000c07f', 8), 'hex')"])
def test_bytes_that_change_while_they_are_waited_for_are_looked_at_again(database: Database, new: str) -> None:
    """Without the trigger, whose value would be there already."""
    env = {**NATIVE, "OM_SYNC_TRIGGER": "off", "OM_LOCK_TIMEOUT_MS": "10000"}
    create_table(database)
    load(database, random_rows(200, DIM))
    alembic(database, "upgrade", EXPAND, env=env)
    database.run(f"ALTER DATABASE {database.name} SET deadlock_timeout = '20s'")
    with closing(database.connect()) as connection, connection.cursor() as cursor:
        connection.autocommit = False
        cursor.execute(f"UPDATE {TABLE} SET v = {new} WHERE ctid <= '(0,20)'")
        with running(database, "upgrade", BACKFILL, env=env) as run:
            eventually(lambda: database.value("SELECT count(*) FROM pg_locks WHERE NOT granted") > 0)
            connection.commit()
            assert run.ends() == 0
    assert mismatches(database) == []
    assert converted(database) == 180


def test_a_column_that_becomes_one_of_text_is_measured_as_what_is_converted(database: Database) -> None:
    """Of 15 bytes the text has as many characters as 8 dimensions have bytes."""
    create_table(database)
    load(database, [*random_rows(100, DIM), *with_v(bytes(15), 20, 1)])
    alembic(database, "upgrade", EXPAND)
    slow_rows(database, 0.01)
    with running(database, "upgrade", BACKFILL, env={**NATIVE, "BACKFILL_BATCH": "10"}) as run:
        eventually(lambda: converted(database))
        database.run(
            f"DROP TRIGGER openmemory_vectors_vvector_sync ON {TABLE};"
            f" ALTER TABLE {TABLE} ALTER v TYPE text USING v::text"
        )
        run.ends()

    made = f"SELECT count(*), count(v_vector) FROM {TABLE} WHERE length(v) = 2 + 30"
    assert database.rows(made) == [(20, 0)]


def test_check_runs_no_function_of_others(database: Database) -> None:
    """Those of an index on an expression would run as whoever checks."""
    create_table(database)
    load(database, random_rows(300, DIM))
    database.run(
        "CREATE FUNCTION loud(text) RETURNS text LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN"
        " IF current_setting('application_name') LIKE 'openmemory%' THEN RAISE 'called'; END IF; RETURN $1; END $$;"
        f" CREATE INDEX ON {TABLE} (loud(user_id)); CREATE INDEX ON {TABLE} (sector) WHERE loud(sector) = 'semantic';"
        "CREATE EXTENSION vector"
    )
    found = json.loads(om(database, "check", "--json", env=NATIVE).stdout)

    assert found["estimate"]["seconds"]


@pytest.mark.parametrize("engine", ["native", "server"])
def test_a_value_that_can_not_be_a_vector_is_no_row_that_a_check_refuses(
    database: Database, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though whole batches are written before their values are looked at."""
    monkeypatch.setattr(passes, "MOST_IN_A_ROW", 2)
    create_table(database)
    load(database, [*random_rows(60, DIM), *with_v(pack([float("nan")] * DIM), 3, 1)])
    alembic(database, "upgrade", EXPAND)
    database.run(f"ALTER TABLE {TABLE} ADD CHECK (v_vector IS NOT NULL AND public.vector_norm(v_vector) < 9) NOT VALID")

    run_backfill(database, PackageDatabase, backfill_engine=engine)

    assert mismatches(database) == []


@pytest.mark.parametrize(
    "index",
    [
        "ALTER TABLE {table} ADD UNIQUE (v_vector)",
        "ALTER TABLE {table} ADD g vector(8) GENERATED ALWAYS AS (v_vector) STORED",
        "CREATE INDEX ON {table} (vector_norm(v_vector)) WHERE dim = 8",
    ],
)
def test_nor_is_that_of_a_constraint_or_of_an_expression(database: Database, index: str) -> None:
    create_table(database)
    load(database, [*random_rows(300, DIM), *with_v(pack([float("nan")] * DIM), 3, 1)])
    alembic(database, "upgrade", EXPAND)
    database.run(index.format(table=TABLE))

    with logged_statements(database) as statements:
        alembic(database, "upgrade", "head", env=NATIVE | {"OM_INDEX": "none"})

    assert not [text for _, text in statements if "misfit" in text]
    assert mismatches(database) == []


def test_no_index_is_given_a_value_that_is_none(database: Database) -> None:
    """It would keep it after the batch was taken back."""
    create_table(database)
    load(database, random_rows(200, DIM))
    alembic(database, "upgrade", "head")
    database.run(f"ALTER TABLE {TABLE} DISABLE TRIGGER USER")
    load(database, with_v(pack([float("nan")] * DIM), 3, 1))
    database.run(f"UPDATE {TABLE} SET v_vector = NULL WHERE random() < 0.5")
    database.run(f"ALTER TABLE {TABLE} ENABLE TRIGGER USER")

    with logged_statements(database) as statements:
        assert om(database, "backfill", env=NATIVE).returncode == 0

    updates = [text for _, text in statements if "UPDATE ONLY" in text and "SET" in text]
    assert updates
    assert not [text for text in updates if "misfit" in text]
    assert mismatches(database) == []
