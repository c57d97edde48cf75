"""How OpenMemory stores a vector: its numbers, float32 and little-endian, one after the other, and nothing else.

What follows from that is here, in Python and as SQL of `{source}`: lengths, and which bytes can't be a vector. Only
those know it besides who take the bytes apart: codec.py, native.py, and the triggers, whose texts are frozen with the
first release.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..settings import MAX_DIMENSIONS


@dataclass(frozen=True)
class Encoding:
    """`width` bytes a number, each a `number` of numpy's; in SQL, whether bytes hold a number that is `not_finite`, or
    one that `overflows_half`, infinite as a half. Both cost a seventh of the time of converting them (measured: 11 us
    with 256 dimensions, 70 with 1,536)."""

    width: int
    number: str
    not_finite: str
    overflows_half: str
    # whatever the column is of by now, and without fetching what is out of line
    length: str = "pg_catalog.octet_length(CAST({source} AS pg_catalog.bytea))"

    def octets(self, dimensions: int) -> int:
        return self.width * dimensions

    def dimensions(self, octets: int) -> int:
        return octets // self.width

    def batch(self, octets: int, dimensions: int, most: int) -> int:
        """How many rows of such vectors, of so many bytes together, and no more than `most`."""
        return max(1, min(most, octets // self.octets(dimensions)))

    def problem(self, octets: int, dimensions: int | None) -> str | None:
        """Why `octets` bytes can't become a vector of `dimensions` (None: of any), or None if they can."""
        if octets == 0:
            return "empty"
        if octets % self.width:
            return f"length not a multiple of {self.width}"
        if self.dimensions(octets) > MAX_DIMENSIONS:
            return f"more than {MAX_DIMENSIONS:,} dimensions"
        if dimensions is not None and octets != self.octets(dimensions):
            return "other dimension"
        return None

    def problem_sql(self, dimensions: int | str) -> str:
        """The same as SQL of the bytes' text, NULL if they can."""
        return f"""CASE WHEN {self.length} = 0 THEN 'empty'
                  WHEN {self.length} % {self.width} <> 0 THEN 'length not a multiple of {self.width}'
                  WHEN {self.length} > {self.octets(MAX_DIMENSIONS)} THEN 'more than {MAX_DIMENSIONS:,} dimensions'
                  WHEN {self.not_of(dimensions)} THEN 'other dimension' END"""

    def said(self, octets: int) -> str:
        if octets and octets % self.width == 0:
            return f"{self.dimensions(octets):,} dimensions"
        return f"{octets:,} bytes"

    def of(self, dimensions: int | str) -> str:
        """SQL of whether bytes have the length of a vector; `dimensions` may be SQL too."""
        return f"{self.length} = {self._octets(dimensions)}"

    def not_of(self, dimensions: int | str) -> str:
        return f"{self.length} <> {self._octets(dimensions)}"

    def without(self, dimensions: int | str) -> str:
        """SQL of whether a row has no bytes of that length."""
        return f"({{source}} IS NULL OR {self.not_of(dimensions)})"

    def fits(self, dimensions: int | str | None) -> str:
        """SQL of whether bytes can become a vector of so many dimensions, None: of any."""
        if dimensions is not None:
            return f"{self.of(dimensions)} AND NOT {self.not_finite}"
        most = f"{self.length} BETWEEN {self.width} AND {self.octets(MAX_DIMENSIONS)}"
        return f"{self.length} % {self.width} = 0 AND {most} AND NOT {self.not_finite}"

    def pending(self, dimensions: int | str) -> str:
        """SQL of whether a row is to get its vector."""
        return f"{{vector}} IS NULL AND {self.of(dimensions)}"

    def _octets(self, dimensions: int | str) -> str:
        return str(self.octets(dimensions)) if isinstance(dimensions, int) else f"{self.width} * {dimensions}"


# an exponent all of ones; 65,520 as float32, 0x477FF000, is the least that a half can't hold
_HEX = "encode({source}, 'hex') ~ "
_NOT_FINITE = _HEX + "'^(........)*....[89a-f].[7f]f'"
_OVERFLOWS_HALF = _HEX + "'^(........)*(......[4c][89a-f]|......[5-7d-f].|....[89a-f].[4c]7|..f.7f[4c]7)'"
STORED = Encoding(4, "<f4", _NOT_FINITE, f"{_OVERFLOWS_HALF} AND NOT {_NOT_FINITE}")
