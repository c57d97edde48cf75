"""Conversion by the server's own code: on a little-endian server the bytes of a `vector` are a header, then `v`.

A vector in memory is a varlena header, its dimensions and a zero as int16, then the float32s as `v` has them (pgvector,
src/vector.h), and what joins two bytea values makes the first of these. So a C function that every server has, declared
to return a vector, converts at the pace of a copy. It checks nothing: a value that is shorter than its header says is
read beyond its end. Hence the function is made by a superuser, in pg_temp, where nobody else can call it and it dies
with the session, and is called behind a check of the length only.
"""

from __future__ import annotations

import struct

from sqlalchemy.exc import DBAPIError

from ..db.catalog import Extension
from ..db.database import Database
from ..db.sqlerrors import sqlstate
from ..settings import MAX_DIMENSIONS
from ..sql import SQL, blocks, fill, joined, literal, quote
from .stored import STORED
from .temporary import Temporary

BLOCKS = blocks("encoding")

OLDEST = (0, 5)  # before, norms are sums of float32, which overflow for vectors that are finite
SIGNATURE = "pg_temp.openmemory_migrations_join(pg_catalog.bytea, pg_catalog.bytea)"
JOIN = Temporary(
    (
        f"""CREATE OR REPLACE FUNCTION {SIGNATURE} RETURNS {{ext}}.vector
LANGUAGE internal IMMUTABLE STRICT PARALLEL SAFE AS 'byteacat'""",
        f"REVOKE ALL ON FUNCTION {SIGNATURE} FROM PUBLIC",
    ),
    f"DROP FUNCTION IF EXISTS {SIGNATURE}",
)
# the norm adds squares up in double: infinite, or NaN, for just those that hold such a value
UNFIT = "coalesce(NOT {ext}.vector_norm({value}) < CAST('Infinity' AS pg_catalog.float8), true)"

# the number of dimensions reads the same from either end, so that no server reads beyond the value
TRIED = 257
FINITE = (0, 1 << 31, 1, 0x80000001, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x3F800000)
NOT_FINITE = (0x7F800000, 0xFF800000, 0x7FC00000, 0xFFFFFFFF, 0x7F800001)
FIT = """(SELECT CASE WHEN {ext}.vector_norm(made) < CAST('Infinity' AS pg_catalog.float8) THEN made END
   FROM (SELECT {value}) AS m (made))"""


def fit(dimensions: int) -> str:
    """SQL of a value's vector, NULL where it can't be one; with the names of a `Database` and {ext}."""
    return FIT.replace("{value}", value(dimensions))


def trial(**ext: SQL) -> SQL:
    """SQL of whether the function does here what it has to."""

    def of(text: str, place: str) -> SQL:
        return fill(text, {"source": SQL(f"{place}.tried"), **ext})

    def words(order: str, *which: int) -> str:
        return struct.pack(f"{order}{len(which)}I", *which).hex()

    made, bad = value(TRIED), unfit(TRIED)

    names = {
        "value": of(made, "t"),
        "unfit": of(bad, "t"),
        "value_of_short": of(made, "s"),
        "unfit_short": of(bad, "s"),
        "unfit_bad": of(bad, "b"),
        "octets": STORED.octets(TRIED),
        "times": TRIED // len(FINITE) + 1,
        "header": struct.pack(">HH", TRIED, 0).hex(),
        "words": words("<", *FINITE),
        "words_sent": words(">", *FINITE),
        "bad": joined(", ", [literal(words("<", word)) for word in NOT_FINITE]),
    }
    return fill(BLOCKS.try_native, {**names, **ext})


def value(dimensions: int) -> str:
    """SQL of a value's vector, NULL where it has another length; with the names of a `Database` and {ext}."""
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise ValueError(f"{dimensions} dimensions")
    header = struct.pack("<HH", dimensions, 0).hex()
    sized = BLOCKS.native_value.replace("{octets}", str(STORED.octets(dimensions)))
    return sized.replace("{header}", header).replace("{length}", STORED.length)


def unfit(dimensions: int) -> str:
    """SQL of whether a value can't be a vector of so many dimensions."""
    return UNFIT.replace("{value}", value(dimensions))


def refusal(db: Database, extension: Extension | None) -> str | None:
    """Why it can't be had here; in a transaction that may write, of which nothing stays."""
    if db.value("SELECT current_setting('is_superuser')") != "on":
        return f"role {quote(db.value('SELECT current_user'))} is no superuser"
    if extension is None:
        return None
    if extension.version < OLDEST:
        return f"pgvector {'.'.join(map(str, extension.version))} is older than {'.'.join(map(str, OLDEST))}"
    if db.value("SELECT current_setting('transaction_read_only')") == "on":
        return None  # whoever only looks can try nothing
    try:
        with db.attempt(keep=False):
            JOIN.make(db, extension)
            works = db.value("{trial}", trial=trial(**extension.names()))
            return None if works else "this server keeps vectors in another way"
    except DBAPIError as error:
        if error.connection_invalidated:
            raise
        return f"the server refuses its function (SQLSTATE {sqlstate(error)})"
