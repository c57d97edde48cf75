"""Rows whose bytes are no vector, one of each kind."""

from __future__ import annotations

import struct

from tests.support.openmemory import Row, pack, random_rows

NAN, INF = float("nan"), float("inf")


SIGNALLING = struct.pack("<I", 0x7F800001)


ZEROS = pack([0.0] * 7)


# reason in the log -> values of `v` beside a column of 8 dimensions
BAD: dict[str, list[bytes]] = {
    "empty": [b""],
    "length not a multiple of 4": [b"abc", ZEROS + b"abc"],
    "other dimension": [pack([1, 2, 3, 4]), ZEROS, ZEROS + ZEROS],
    "NaN or infinite values": [
        pack([NAN]) + ZEROS,
        ZEROS + pack([NAN]),
        ZEROS + pack([-NAN]),
        SIGNALLING + ZEROS,
        pack([INF]) + ZEROS,
        ZEROS + pack([INF]),
        ZEROS + pack([-INF]),
    ],
    "more than 16,000 dimensions": [pack([0.0]) * 16_001],
}


BAD_COUNT = sum(map(len, BAD.values()))


CONFIGURED = {"OM_VEC_DIM": "8"}


def with_v(v: bytes | None, count: int, seed: int) -> list[Row]:
    return [row._replace(v=v) for row in random_rows(count, 8, seed)]
