"""How many dimensions the vectors have: configured, or agreed by the rows. Of bytes, only lengths are looked at."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ..db.database import Database
from ..errors import MigrationError
from ..sql import SQL, blocks, quote
from ..target import Target
from .stored import STORED

BLOCKS = blocks("encoding")


@dataclass(frozen=True)
class Survey:
    """Rows by the length of `v` in bytes, and rows whose vector has no `v` beside it, by dimensions."""

    octets: Counter[int]
    sourceless: Counter[int]

    def votes(self) -> Counter[int]:
        whole = {octets: rows for octets, rows in self.octets.items() if STORED.problem(octets, None) is None}
        return Counter({STORED.dimensions(octets): rows for octets, rows in whole.items()}) + self.sourceless

    def histogram(self) -> str:
        parts = [f"{STORED.said(octets)}: {rows:,}" for octets, rows in sorted(self.octets.items())]
        parts += [
            f"vectors of {size:,} dimensions without v: {rows:,}" for size, rows in sorted(self.sourceless.items())
        ]
        return "Rows by length: " + "; ".join(parts) + "."


def sizes(db: Database, rows: str, **names: SQL) -> list[int]:
    """The numbers of dimensions that the bytes have in these rows, as `FROM … WHERE …` has them."""
    found = db.rows("SELECT DISTINCT " + STORED.length + " " + rows, **names)
    return sorted(
        STORED.dimensions(octets) for (octets,) in found if octets is not None and STORED.problem(octets, None) is None
    )


def survey(db: Database, vector: SQL | None = None, **names: SQL) -> Survey:
    """Two passes over the table at most; `vector` is a quoted column whose values may have no source."""
    octets = db.rows(f"SELECT {STORED.length}, count(*) FROM {{table}} WHERE {{source}} IS NOT NULL GROUP BY 1")
    return Survey(Counter({row[0]: row[1] for row in octets}), sourceless(db, vector, **names) if vector else Counter())


def sourceless(db: Database, vector: SQL, **names: SQL) -> Counter[int]:
    """Rows whose vector in that (quoted) column has no `v` beside it, by dimensions."""
    rows = db.rows(BLOCKS.sourceless, which=vector, **names)
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


def vectors(db: Database, **names: SQL) -> Counter[int]:
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
