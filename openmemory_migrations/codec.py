"""Re-encodes whole batches: COPY's binary rows of float32 little-endian bytes to COPY's binary rows of pgvector.

Pure: bytes in, bytes out, no I/O. It assumes that every row of a batch holds the same number of dimensions (the query
sees to that), so a batch is one array with a fixed stride and no row costs any Python.

Layouts: COPY's binary format, https://www.postgresql.org/docs/current/sql-copy.html; a vector's binary form is int16
dimensions, int16 zero, then float4 big-endian (pgvector, src/vector.c, vector_recv).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_HEADER = b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0)
_TRAILER = struct.pack(">h", -1)
SHOWN = 5  # tids of bad rows that a batch names; the rest are only counted
_ROW_START = [
    ("fields", ">i2"),
    ("tid_size", ">i4"),
    ("tid", "V6"),
    ("xmin_size", ">i4"),
    ("xmin", "V4"),
    ("size", ">i4"),
]


@dataclass(frozen=True)
class Batch:
    """`payload` is what COPY … FROM STDIN (FORMAT binary) takes (tid, xid, vector); `bad_tids` are the first few."""

    payload: bytes
    rows_read: int
    rows_good: int
    last_tid: tuple[int, int] | None
    bad_tids: list[str]


def convert(copied: bytes | memoryview, dimensions: int) -> Batch:
    """Converts one COPY … TO STDOUT (FORMAT binary) of rows (tid, xid, bytea), each value 4 * `dimensions` bytes.

    Rows that hold NaN or an infinite value, which pgvector refuses, are left out of the payload and counted.
    Raises ValueError if the stream isn't what the query should have given.
    """
    source = np.dtype([*_ROW_START, ("value", "<f4", (dimensions,))])
    body = memoryview(copied)[len(_HEADER) : -len(_TRAILER)]
    framed = bytes(copied[: len(_HEADER)]) == _HEADER and bytes(copied[-len(_TRAILER) :]) == _TRAILER
    if not framed or len(copied) < len(_HEADER) + len(_TRAILER) or len(body) % source.itemsize:
        raise ValueError(f"unexpected COPY data for {dimensions} dimensions: {len(copied)} bytes")
    rows = np.frombuffer(body, source)
    expected = {"fields": 3, "tid_size": 6, "xmin_size": 4, "size": 4 * dimensions}
    if not all((rows[name] == value).all() for name, value in expected.items()):
        raise ValueError(f"a row is not a tid, an xmin and {dimensions} dimensions")

    finite = np.isfinite(rows["value"]).all(axis=1)
    good, bad = (rows, rows[:0]) if finite.all() else (rows[finite], rows[~finite])
    return Batch(
        payload=_encode(good, dimensions),
        rows_read=len(rows),
        rows_good=len(good),
        last_tid=_tid(rows["tid"][-1]) if len(rows) else None,
        bad_tids=["({},{})".format(*_tid(tid)) for tid in bad["tid"][:SHOWN]],
    )


def _encode(rows: npt.NDArray[np.void], dimensions: int) -> bytes:
    target = np.dtype([*_ROW_START, ("dimensions", ">i2"), ("unused", ">i2"), ("value", ">u4", (dimensions,))])
    encoded = np.empty(len(rows), target)
    for name, _ in _ROW_START[:-1]:
        encoded[name] = rows[name]
    encoded["size"] = 4 + 4 * dimensions
    encoded["dimensions"] = dimensions
    encoded["unused"] = 0
    # as integers: a float conversion could quieten a NaN or flush a denormal, a byte swap can't
    encoded["value"] = rows["value"].view("<u4")
    return b"".join((_HEADER, encoded.tobytes(), _TRAILER))


def _tid(raw: np.void) -> tuple[int, int]:
    block, offset = struct.unpack(">IH", raw.tobytes())
    return block, offset
