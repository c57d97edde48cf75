"""The codec: pgvector's own output to the byte for every finite float32, and a refusal for whatever isn't a batch."""

from __future__ import annotations

import importlib
import io
import struct
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pgvector
import psycopg2
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from openmemory_migrations.encoding.codec import GROUP_BYTES, GROUP_ROWS, SHOWN, encode, parse
from tests.support.openmemory import Database

# before 0.4 it was elsewhere
Vector: Any = getattr(pgvector, "Vector", None) or importlib.import_module("pgvector.utils").Vector
HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
TRAILER = b"\xff\xff"
ZEROS = [0x00000000, 0x80000000]
DENORMALS = [0x00000001, 0x80000001, 0x007FFFFF, 0x807FFFFF]
EXTREMES = [0x00800000, 0x80800000, 0x7F7FFFFF, 0xFF7FFFFF]  # smallest normal, largest
INFINITE = [0x7F800000, 0xFF800000]
# signalling and quiet, smallest and largest payload, both signs
NAN = [0x7F800001, 0x7FBFFFFF, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFBFFFFF, 0xFFC00000, 0xFFFFFFFF]
FINITE = [*ZEROS, *DENORMALS, *EXTREMES, 0x3F800000]

Row = tuple[tuple[int, int], int, bytes]  # tid, xmin, v

anything = st.sampled_from([*FINITE, *INFINITE, *NAN]) | st.integers(0, 2**32 - 1)
finite = st.sampled_from(FINITE) | st.integers(0, 2**32 - 1).filter(lambda pattern: is_finite(pattern))
tids = st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**16 - 1))


def batches(pattern: st.SearchStrategy[int], most: int = 12) -> st.SearchStrategy[tuple[int, list[Row]]]:
    """Dimensions, and rows of so many bit patterns."""
    return st.integers(1, 9).flatmap(
        lambda dimensions: st.tuples(
            st.just(dimensions),
            st.lists(
                st.tuples(
                    tids,
                    st.integers(0, 2**32 - 1),
                    st.lists(pattern, min_size=dimensions, max_size=dimensions).map(little_endian),
                ),
                max_size=most,
            ),
        )
    )


def is_finite(pattern: int) -> bool:
    return pattern >> 23 & 255 != 255


def little_endian(patterns: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(patterns)}I", *patterns)


def patterns_of(v: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(v) // 4}I", v)


def row(v: bytes, block: int = 0, item: int = 1, xmin: int = 700) -> Row:
    return (block, item), xmin, v


def stream(rows: Sequence[Row]) -> bytes:
    """What COPY (SELECT ctid, xmin, v …) TO STDOUT (FORMAT binary) gives, and takes back."""
    encoded = b"".join(struct.pack(">hiIHiIi", 3, 6, *tid, 4, xmin, len(value)) + value for (tid, xmin, value) in rows)
    return HEADER + encoded + TRAILER


FILENODE, VECTOR = 4_000_000_000, 16_400


@dataclass(frozen=True)
class Done:
    payload: bytes
    rows_read: int
    rows_good: int
    last_tid: tuple[int, int] | None
    bad_tids: list[str]


def convert(copied: bytes | memoryview, dimensions: int, vector: int = VECTOR) -> Done:
    rows = parse(copied, dimensions)
    assert rows.rows_bad == rows.rows_read - len(rows.good)
    payload = encode(rows.good, vector, FILENODE)
    return Done(payload, rows.rows_read, len(rows.good), rows.last_tid, rows.bad_tids)


def grouped(rows: Sequence[Row], dimensions: int) -> bytes:
    """What the server takes: for each group its arrays of tid, xid and vector."""
    each = max(1, min(GROUP_ROWS, GROUP_BYTES // (4 * dimensions)))
    groups = [rows[i : i + each] for i in range(0, len(rows), each)]
    return HEADER + b"".join(map(group, groups)) + TRAILER


def group(rows: Sequence[Row]) -> bytes:
    tids = array(27, [struct.pack(">IH", *tid) for tid, _, _ in rows])
    xmins = array(28, [struct.pack(">I", xmin) for _, xmin, _ in rows])
    return struct.pack(">hiI", 4, 4, FILENODE) + tids + xmins + array(VECTOR, [value for _, _, value in rows])


def array(oid: int, values: Sequence[bytes]) -> bytes:
    body = struct.pack(">iiIii", 1, 0, oid, len(values), 1)
    body += b"".join(struct.pack(">i", len(value)) + value for value in values)
    return struct.pack(">i", len(body)) + body


def by_hand(v: bytes) -> bytes:
    patterns = patterns_of(v)
    return struct.pack(f">hh{len(patterns)}I", len(patterns), 0, *patterns)


@given(batches(finite))
def test_finite_values_become_what_pgvectors_own_encoder_gives(batch: tuple[int, list[Row]]) -> None:
    dimensions, rows = batch

    done = convert(stream(rows), dimensions)

    encoded = [(tid, xmin, Vector(np.frombuffer(v, "<f4")).to_binary()) for tid, xmin, v in rows]
    assert done.payload == grouped(encoded, dimensions)
    assert (done.rows_read, done.rows_good, done.bad_tids) == (len(rows), len(rows), [])


@given(batches(anything))
@example((1, [row(little_endian([pattern]), i) for i, pattern in enumerate([*FINITE, *NAN, *INFINITE])]))
def test_any_bits_are_carried_exactly_or_left_out_counted_and_named(batch: tuple[int, list[Row]]) -> None:
    dimensions, rows = batch
    good = [row for row in rows if all(map(is_finite, patterns_of(row[2])))]
    bad = [tid for tid, _, v in rows if not all(map(is_finite, patterns_of(v)))]

    done = convert(stream(rows), dimensions)

    assert done.payload == grouped([(tid, xmin, by_hand(v)) for tid, xmin, v in good], dimensions)
    assert (done.rows_read, done.rows_good) == (len(rows), len(good))
    assert done.bad_tids == [f"({block},{item})" for block, item in bad[:SHOWN]]
    assert done.last_tid == (rows[-1][0] if rows else None)


@pytest.mark.parametrize("where", [0, 3, 7])
@pytest.mark.parametrize("pattern", [*INFINITE, *NAN], ids=hex)
def test_one_value_that_is_not_finite_costs_its_row_and_no_other(pattern: int, where: int) -> None:
    values = [0x3F800000] * 8
    before, after = row(little_endian(values), 4, 1), row(little_endian(values), 4, 3)
    values[where] = pattern

    done = convert(stream([before, row(little_endian(values), 4, 2), after]), 8)

    assert done.payload == grouped([(tid, xmin, by_hand(v)) for tid, xmin, v in [before, after]], 8)
    assert (done.rows_read, done.rows_good, done.bad_tids, done.last_tid) == (3, 2, ["(4,2)"], (4, 3))


def test_every_bad_row_is_counted_and_the_first_few_are_named() -> None:
    rows = [row(little_endian([NAN[0]]), 0, item) for item in range(1, SHOWN + 3)]

    done = convert(stream(rows), 1)

    assert (done.rows_read, done.rows_good, done.payload) == (SHOWN + 2, 0, HEADER + TRAILER)
    assert done.bad_tids == [f"(0,{item})" for item in range(1, SHOWN + 1)]


@pytest.mark.parametrize("dimensions", [1, 64, 1536, 16_000])
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_groups_are_full_but_for_the_last(dimensions: int, more: int) -> None:
    each = max(1, min(GROUP_ROWS, GROUP_BYTES // (4 * dimensions)))
    values = np.random.default_rng(1).standard_normal((3 * each + more, dimensions), dtype="<f4")
    rows = [row(value.tobytes(), i) for i, value in enumerate(values)]
    good = parse(stream(rows), dimensions).good

    encoded = [(tid, xmin, by_hand(v)) for tid, xmin, v in rows]
    assert encode(good, VECTOR, FILENODE) == grouped(encoded, dimensions)
    assert encode(good[1:3], VECTOR, FILENODE) == grouped(encoded[1:3], dimensions)


def test_no_rows_become_no_rows() -> None:
    done = convert(stream([]), 1536)

    assert (done.payload, done.rows_read, done.rows_good, done.last_tid) == (HEADER + TRAILER, 0, 0, None)


def test_a_memoryview_is_taken_as_well_and_not_changed() -> None:
    given = bytearray(stream([row(little_endian(FINITE))]))
    before = bytes(given)

    assert convert(memoryview(given), len(FINITE)) == convert(before, len(FINITE))
    assert given == before


GOOD = row(little_endian([0x3F800000, 0x40000000]))
WHOLE = stream([GOOD, GOOD])


@pytest.mark.parametrize(
    "copied",
    [
        pytest.param(b"", id="empty"),
        pytest.param(HEADER[:-1], id="part of a header"),
        pytest.param(HEADER, id="no trailer"),
        pytest.param(HEADER + b"\0\0", id="another trailer"),
        pytest.param(b"X" + WHOLE[1:], id="another signature"),
        pytest.param(WHOLE[:14] + b"\1" + WHOLE[15:], id="another flag"),
        pytest.param(WHOLE[:-1], id="cut in the trailer"),
        pytest.param(WHOLE[:-2], id="cut before the trailer"),
        pytest.param(WHOLE[:-10], id="cut in a value"),
        pytest.param(WHOLE + b"\0", id="one byte too many"),
        pytest.param(WHOLE + TRAILER, id="two trailers"),
        pytest.param(stream([GOOD, row(bytes(12))]), id="a longer value"),
        pytest.param(stream([row(bytes(4)), GOOD]), id="a shorter value"),
        pytest.param(stream([row(bytes(4)), row(bytes(12))]), id="lengths that only together are right"),
        pytest.param(stream([row(b"")]), id="an empty value"),
        pytest.param(stream([row(bytes(7))]), id="not a multiple of 4"),
        pytest.param(WHOLE.replace(b"\0\3\0\0\0\6", b"\0\4\0\0\0\6"), id="another number of fields"),
        pytest.param(WHOLE.replace(b"\0\3\0\0\0\6", b"\0\3\0\0\0\7"), id="another size of tid"),
        pytest.param(HEADER + struct.pack(">hiIHiIi", 3, 6, 0, 1, 4, 7, -1) + TRAILER, id="NULL"),
    ],
)
def test_what_is_no_batch_of_these_dimensions_is_refused(copied: bytes) -> None:
    with pytest.raises(ValueError, match=r"COPY data|2 dimensions"):
        convert(copied, 2)


@pytest.mark.parametrize("dimensions", [1, 3, 16_000])
def test_a_batch_of_other_dimensions_is_refused(dimensions: int) -> None:
    with pytest.raises(ValueError, match=f"{dimensions} dimensions"):
        convert(WHOLE, dimensions)


@pytest.mark.parametrize("dimensions", [1, 2, 384, 16_000])
def test_the_server_takes_the_payload_and_holds_the_same_bits(database: Database, dimensions: int) -> None:
    random = np.random.default_rng(dimensions)
    patterns = random.integers(0, 2**32, 400_000 // dimensions // 4 * dimensions, "<u4")
    patterns[patterns >> 23 & 255 == 255] = 0
    patterns[: len(FINITE) * 20] = (FINITE * 20)[: len(patterns)]
    values = patterns.reshape(-1, dimensions)
    database.run("CREATE EXTENSION vector; CREATE TABLE source (v bytea, sent bytea)")
    database.run("CREATE TABLE target (filenode oid, tids tid[], versions xid[], vectors vector[])")
    vector: int = database.value("SELECT 'vector'::regtype::oid")
    with closing(database.connect()) as connection, connection.cursor() as cursor:
        rows = [struct.pack(">hi", 2, 4 * dimensions) + v.tobytes() for v in values]
        sent = [struct.pack(">ihh", 4 + 4 * dimensions, dimensions, 0) + v.astype(">u4").tobytes() for v in values]
        put = b"".join(part for pair in zip(rows, sent, strict=True) for part in pair)
        cursor.copy_expert("COPY source FROM STDIN (FORMAT binary)", io.BytesIO(HEADER + put + TRAILER))
        out = io.BytesIO()
        cursor.copy_expert("COPY (SELECT ctid, xmin, v FROM source) TO STDOUT (FORMAT binary)", out)

        done = convert(out.getbuffer(), dimensions, vector)
        cursor.copy_expert("COPY target FROM STDIN (FORMAT binary)", io.BytesIO(done.payload))

    assert (done.rows_read, done.rows_good) == (len(values), len(values))
    database.run(
        "CREATE TABLE rows AS SELECT tid, version, v"
        " FROM target CROSS JOIN unnest(tids, versions, vectors) AS u (tid, version, v)"
    )
    assert database.value(
        "SELECT count(*) FROM source s JOIN rows t ON t.tid = s.ctid AND t.version = s.xmin"
        " WHERE vector_send(t.v) = s.sent"
    ) == len(values)
    assert database.rows("SELECT DISTINCT filenode FROM target") == [(FILENODE,)]
    last: str = database.value("SELECT max(tid)::text FROM rows")
    assert last == "({},{})".format(*(done.last_tid or ()))


def test_what_is_left_out_is_what_the_server_refuses(database: Database) -> None:
    database.run("CREATE EXTENSION vector; CREATE TABLE target (tid tid, version xid, v vector)")
    with closing(database.connect()) as connection, connection.cursor() as cursor:
        for pattern in [*INFINITE, *NAN]:
            payload = stream([((0, 1), 700, by_hand(little_endian([pattern])))])

            with pytest.raises(psycopg2.DataError, match="not allowed in vector"):
                cursor.copy_expert("COPY target FROM STDIN (FORMAT binary)", io.BytesIO(payload))
