"""How many dimensions the vectors have: configured, or agreed by the rows. Of bytes, only lengths are looked at."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ..db.database import Database
from ..errors import MigrationError
from ..settings import MAX_DIMENSIONS
from ..target import Target, quote


@dataclass(frozen=True)
class Survey:
    """Rows by the length of `v` in bytes, and rows whose vector has no `v` beside it, by dimensions."""

    octets: Counter[int]
    sourceless: Counter[int]

    def votes(self) -> Counter[int]:
        found = Counter({octets // 4: rows for octets, rows in self.octets.items() if problem(octets, None) is None})
        return found + self.sourceless

    def histogram(self) -> str:
        parts = [f"{length(octets)}: {rows:,}" for octets, rows in sorted(self.octets.items())]
        parts += [
            f"vectors of {size:,} dimensions without v: {rows:,}" for size, rows in sorted(self.sourceless.items())
        ]
        return "Rows by length: " + "; ".join(parts) + "."


def length(octets: int) -> str:
    if octets and octets % 4 == 0:
        return f"{octets // 4:,} dimensions"
    return f"{octets:,} bytes"


def problem(octets: int, dimensions: int | None) -> str | None:
    """Why `octets` bytes can't become a vector of `dimensions` (None: of any), or None if they can."""
    if octets == 0:
        return "empty"
    if octets % 4:
        return "length not a multiple of 4"
    if octets // 4 > MAX_DIMENSIONS:
        return f"more than {MAX_DIMENSIONS:,} dimensions"
    if dimensions is not None and octets != 4 * dimensions:
        return "other dimension"
    return None


# The same in SQL, of bytes beside a vector of `size` dimensions, and whether they hold a value whose exponent is all
# ones: NaN or infinite. A seventh of the time of converting them (measured: 11 us with 256 dimensions, 70 with 1,536)
# of the bytes, whatever the column is of by now: without fetching what is out of line
OCTETS = "pg_catalog.octet_length(CAST({source} AS pg_catalog.bytea))"
OTHER_LENGTH = "({source} IS NULL OR octet_length({source}) <> 4 * {size})"
NOT_FINITE_BYTES = "encode({source}, 'hex') ~ '^(........)*....[89a-f].[7f]f'"

# and whether they hold one that is infinite as a half: its size is 0x477FF000, 65,520, or more
BEYOND_HALF_BYTES = (
    "encode({source}, 'hex') ~ '^(........)*(......[4c][89a-f]|......[5-7d-f].|....[89a-f].[4c]7|..f.7f[4c]7)'"
    f" AND NOT {NOT_FINITE_BYTES}"
)


def survey(db: Database, vector: str | None = None, **names: str) -> Survey:
    """Two passes over the table at most; `vector` is a quoted column whose values may have no source."""
    # octet_length reads the length of a value out of line without fetching it
    octets = db.rows("SELECT octet_length({source}), count(*) FROM {table} WHERE {source} IS NOT NULL GROUP BY 1")
    return Survey(Counter({row[0]: row[1] for row in octets}), sourceless(db, vector, **names) if vector else Counter())


def sourceless(db: Database, vector: str, **names: str) -> Counter[int]:
    """Rows whose vector in that (quoted) column has no `v` beside it, by dimensions."""
    rows = db.rows(
        """
        SELECT {ext}.vector_dims({which}), count(*) FROM {table}
        WHERE {source} IS NULL AND {which} IS NOT NULL GROUP BY 1
        """,
        which=vector,
        **names,
    )
    return Counter({row[0]: row[1] for row in rows})


def resolve(configured: int | None, found: Survey) -> int | None:
    """The dimensions of the column, or None where nothing is configured and no row says.

    Raises MigrationError with the histogram where the rows don't agree, or none has the configured dimensions.
    """
    votes = found.votes()
    if configured is None:
        if len(votes) > 1:
            raise MigrationError(
                "the rows hold vectors of different dimensions",
                detail=found.histogram(),
                hint=f"Set OM_VEC_DIM to the one to keep, such as OM_VEC_DIM={votes.most_common(1)[0][0]};"
                " rows of another length are skipped and reported.",
            )
        return next(iter(votes), None)
    if (found.octets or found.sourceless) and configured not in votes:
        raise MigrationError(
            f"no row holds a vector of {configured:,} dimensions, as OM_VEC_DIM or OM_TIER says",
            detail=found.histogram(),
            hint="Correct OM_VEC_DIM, or leave it and OM_TIER unset to take the dimensions from the rows.",
        )
    foreign = {size: rows for size, rows in found.sourceless.items() if size != configured}
    if foreign:
        raise MigrationError(
            f"{sum(foreign.values()):,} vectors of other than {configured:,} dimensions have no v beside them"
            " and would be lost",
            detail=found.histogram(),
            hint="Fill v in those rows, or delete them, then run the same command again.",
        )
    return configured


def vectors(db: Database, **names: str) -> Counter[int]:
    """Rows by the dimensions of a `v` that holds vectors itself."""
    rows = db.rows(
        "SELECT {ext}.vector_dims({source}), count(*) FROM {table} WHERE {source} IS NOT NULL GROUP BY 1", **names
    )
    return Counter({row[0]: row[1] for row in rows})


def resolve_vectors(target: Target, configured: int | None, found: Counter[int]) -> int | None:
    """The dimensions that such a `v` is to have, or None where nothing is configured and no row says.

    Raises MigrationError with the histogram where the rows don't agree: no row can be skipped here.
    """
    wanted = configured or next((size for size, _ in found.most_common(1)), None)
    others = sum(rows for size, rows in found.items() if size != wanted)
    if not others:
        return wanted
    detail = "Rows by dimensions: " + "; ".join(f"{size:,}: {rows:,}" for size, rows in sorted(found.items())) + "."
    if wanted not in found:
        raise MigrationError(
            f"no row of {target} holds a vector of {wanted:,} dimensions, as OM_VEC_DIM or OM_TIER says",
            detail=detail,
            hint="Correct OM_VEC_DIM, or leave it and OM_TIER unset to take the dimensions from the rows.",
        )
    raise MigrationError(
        f"{others:,} rows of {target} hold vectors of other than {wanted:,} dimensions",
        detail=detail,
        hint=f"{quote(target.source)} can have one number of dimensions only. Delete those rows, or have them embedded"
        f" anew: SELECT … WHERE vector_dims({quote(target.source)}) <> {wanted}."
        + ("" if configured else " For another number, set OM_VEC_DIM."),
    )
