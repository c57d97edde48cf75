"""Re-encodes whole batches: COPY's binary rows of float32 little-endian bytes to arrays of pgvector's binary form, and
back.

Pure: bytes in, bytes out, no I/O. It assumes that every row of a batch holds the same number of dimensions (the query
sees to that), so a batch is one array with a fixed stride and no row costs any Python.

The server takes the rows in groups: one COPY row holds the arrays tid[], xid[] and vector[] of a group. That saves most
of what a row costs there, as long as a group fits into the processor's caches (measured, docs/performance.md).

Layouts: COPY's binary format, https://www.postgresql.org/docs/current/sql-copy.html; an array's is int32 dimensions
(one), int32 flags, oid of the element type, int32 length, int32 lower bound, then the elements, each after its int32
size (PostgreSQL, src/backend/utils/adt/arrayfuncs.c, array_recv); a vector's is int16 dimensions, int16 zero, then
float4 big-endian (pgvector, src/vector.c, vector_recv).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .stored import STORED

_HEADER = b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0)
_TRAILER = struct.pack(">h", -1)
SHOWN = 5  # tids of bad rows that a batch names; the rest are only counted
GROUP_BYTES, GROUP_ROWS = 64 * 1024, 256
BITS, VECTOR_BITS = "<u4", ">u4"  # a number as an integer, as stored and as COPY has it in a vector
BYTEA, TID, XID = 17, 27, 28  # oids of the types, the same in every PostgreSQL


@dataclass(frozen=True)
class Rows:
    """What was read: `good` are the rows (tid, xmin, value) that can be vectors; `bad_tids` the first few others."""

    good: npt.NDArray[np.void]
    rows_read: int
    last_tid: tuple[int, int] | None
    bad_tids: list[str]

    @property
    def rows_bad(self) -> int:
        return self.rows_read - len(self.good)


def parse(copied: bytes | memoryview, dimensions: int) -> Rows:
    """Reads one COPY … TO STDOUT (FORMAT binary) of rows (tid, xid, bytea), each value 4 * `dimensions` bytes.

    Rows that hold NaN or an infinite value, which pgvector refuses, are set apart and counted.
    Raises ValueError if the stream isn't what the query should have given.
    """
    value = ("value", STORED.number, (dimensions,))
    rows = records(copied, f"{dimensions} dimensions", ("tid", "V6"), ("xmin", "V4"), value)

    finite = np.isfinite(rows["value"]).all(axis=1)
    good, bad = (rows, rows[:0]) if finite.all() else (rows[finite], rows[~finite])
    return Rows(
        good=good,
        rows_read=len(rows),
        last_tid=tid_of(rows["tid"][-1]) if len(rows) else None,
        bad_tids=[tid_text(tid) for tid in bad["tid"][:SHOWN]],
    )


def parse_vectors(copied: bytes | memoryview, dimensions: int) -> Rows:
    """The same of rows (tid, xid, vector), whose values can all be bytes."""
    value = vector_column("value", dimensions)
    rows = records(copied, f"{dimensions} dimensions", ("tid", "V6"), ("xmin", "V4"), value)
    good = np.empty(len(rows), [("tid", "V6"), ("xmin", "V4"), bytes_column("value", dimensions)])
    good["tid"], good["xmin"], good["value"] = rows["tid"], rows["xmin"], rows["value"]["elements"]
    return Rows(good, len(rows), tid_of(rows["tid"][-1]) if len(rows) else None, [])


def bytes_column(name: str, dimensions: int) -> tuple[str, str, tuple[int]]:
    """What is stored, for `records`, as integers: NaN equals nothing, and -0 is not 0."""
    return name, BITS, (dimensions,)


def vector_column(name: str, dimensions: int) -> tuple[str, np.dtype[np.void]]:
    """The same of a vector, whose integers are `elements`."""
    return name, np.dtype([("size", ">i2"), ("unused", ">i2"), ("elements", VECTOR_BITS, (dimensions,))])


def numbers(bits: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Of such integers."""
    return bits.astype(BITS, copy=False).view(STORED.number)


def records(copied: bytes | memoryview, what: str, *columns: tuple[Any, ...]) -> npt.NDArray[np.void]:
    """The rows of one COPY … TO STDOUT (FORMAT binary), each column (name, numpy type, shape) always of one size.

    Raises ValueError if the stream isn't what the query should have given.
    """
    layout: list[tuple[Any, ...]] = [("fields", ">i2")]
    for name, *kind in columns:
        layout += [(f"{name}_size", ">i4"), (name, *kind)]
    row = np.dtype(layout)
    body = memoryview(copied)[len(_HEADER) : -len(_TRAILER)]
    framed = bytes(copied[: len(_HEADER)]) == _HEADER and bytes(copied[-len(_TRAILER) :]) == _TRAILER
    if not framed or len(copied) < len(_HEADER) + len(_TRAILER) or len(body) % row.itemsize:
        raise ValueError(f"unexpected COPY data for {what}: {len(copied)} bytes")
    rows = np.frombuffer(body, row)
    expected = {"fields": len(columns)} | {f"{name}_size": row[name].itemsize for name, *_ in columns}
    if not all((rows[name] == value).all() for name, value in expected.items()):
        raise ValueError(f"unexpected COPY data for {what}: not every row has the sizes {expected}")
    return rows


def encode(rows: npt.NDArray[np.void], element_oid: int, filenode: int) -> bytes:
    """Encodes good rows as COPY … FROM STDIN (FORMAT binary) takes them, (filenode oid, tid[], xid[], values) each.

    The values are an array of vectors, whose type has an oid of its own in every database, or of bytea.
    `filenode` is the file that the table had when they were read.
    """
    dimensions = rows.dtype["value"].shape[0]
    each = max(1, min(GROUP_ROWS, GROUP_BYTES // STORED.octets(dimensions)))
    full = len(rows) - len(rows) % each
    parts = [_groups(rows[:full], each, element_oid, filenode)]
    if full < len(rows):
        parts.append(_groups(rows[full:], len(rows) - full, element_oid, filenode))
    return b"".join((_HEADER, *(part.data for part in parts), _TRAILER))


def _groups(rows: npt.NDArray[np.void], each: int, element_oid: int, filenode: int) -> npt.NDArray[np.void]:
    dimensions = rows.dtype["value"].shape[0]
    head = [("size", ">i4")] if element_oid == BYTEA else [("size", ">i4"), ("dimensions", ">i2"), ("unused", ">i2")]
    value = ("value", BITS if element_oid == BYTEA else VECTOR_BITS, (dimensions,))
    layout = np.dtype(
        [
            ("fields", ">i2"),
            ("filenode_size", ">i4"),
            ("filenode", ">u4"),
            ("tids", _array([("size", ">i4"), ("value", "V6")], each)),
            ("xmins", _array([("size", ">i4"), ("value", "V4")], each)),
            ("values", _array([*head, value], each)),
        ]
    )
    groups = np.empty(len(rows) // each, layout)
    groups["fields"] = 4
    groups["filenode_size"] = 4
    groups["filenode"] = filenode
    for name, oid in (("tids", TID), ("xmins", XID), ("values", element_oid)):
        array = groups[name]
        items = array["items"]
        array["size"] = layout[name].itemsize - 4
        array["ndim"] = 1
        array["flags"] = 0
        array["oid"] = oid
        array["length"] = each
        array["lower"] = 1
        items["size"] = items.dtype.itemsize - 4
    groups["tids"]["items"]["value"] = rows["tid"].reshape(-1, each)
    groups["xmins"]["items"]["value"] = rows["xmin"].reshape(-1, each)
    values = groups["values"]["items"]
    if element_oid != BYTEA:
        values["dimensions"] = dimensions
        values["unused"] = 0
    # as integers: a float conversion could quieten a NaN or flush a denormal, a byte swap can't
    values["value"] = rows["value"].view(BITS).reshape(-1, each, dimensions)
    return groups


def _array(item: list[Any], length: int) -> np.dtype[np.void]:
    head = [(name, ">i4") for name in ("size", "ndim", "flags")] + [("oid", ">u4"), ("length", ">i4"), ("lower", ">i4")]
    return np.dtype([*head, ("items", item, (length,))])


def tid_of(raw: np.void) -> tuple[int, int]:
    block, offset = struct.unpack(">IH", raw.tobytes())
    return block, offset


def tid_text(raw: np.void) -> str:
    """As the server writes it."""
    return "({},{})".format(*tid_of(raw))
