"""Decisions that ask no server: names, dimensions, what index to build, how long is left."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from openmemory_migrations import log
from openmemory_migrations.db.catalog import Extension, Index
from openmemory_migrations.encoding import dimensions
from openmemory_migrations.encoding.dimensions import Survey
from openmemory_migrations.encoding.stored import STORED
from openmemory_migrations.errors import MigrationError
from openmemory_migrations.index import choice
from openmemory_migrations.index.choice import NoIndex, Plan
from openmemory_migrations.settings import Settings
from openmemory_migrations.sql import literal, quote
from openmemory_migrations.target import Target, derived

SUFFIXES = ["_vvector_idx", "_vvector_idx_new", "_vvector_idx_old", "_vvector_ivfflat_idx", "_vvector_sync", "_adopted"]
identifiers = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1).filter(
    lambda text: len(text.encode()) <= 63
)

# -- names


def test_the_names_are_those_of_the_mirrored_sql() -> None:
    target = Target.of(Settings())

    assert (target.schema, target.table, target.source, target.vector) == (
        "public",
        "openmemory_vectors",
        "v",
        "v_vector",
    )
    assert target.index == "openmemory_vectors_vvector_idx"
    assert target.mirrored_index == "openmemory_vectors_vvector_ivfflat_idx"
    assert target.sync == "openmemory_vectors_vvector_sync"
    assert target.adopted == "v_vector_adopted"
    assert str(target) == '"public.openmemory_vectors"'


@pytest.mark.parametrize(("table", "whole"), [("t" * 51, True), ("t" * 52, False), ("é" * 25 + "t", True)])
def test_a_name_is_cut_only_where_postgres_would_cut_it(table: str, whole: bool) -> None:
    assert (derived(table, "_vvector_idx") == table + "_vvector_idx") is whole


@pytest.mark.parametrize("letter", ["t", "é", "漢", "🐘"])
def test_long_names_keep_their_suffix_and_differ_by_table(letter: str) -> None:
    stem = letter * (60 // len(letter.encode()))
    names = [derived(stem + last, suffix) for last in "abc" for suffix in SUFFIXES]

    assert len(set(names)) == len(names)
    for name in names:
        assert 60 <= len(name.encode()) <= 63
        assert re.fullmatch(rf"{letter}+_[0-9a-f]{{8}}({'|'.join(SUFFIXES)})", name)


@given(identifiers, identifiers, st.sampled_from(SUFFIXES))
def test_no_two_tables_share_a_name(one: str, other: str, suffix: str) -> None:
    assume(one != other)

    assert derived(one, suffix) != derived(other, suffix)
    assert len(derived(one, suffix).encode()) <= 63
    assert derived(one, suffix).endswith(suffix)


@pytest.mark.parametrize(
    ("identifier", "quoted"),
    [
        ("select", '"select"'),
        ("Om-Test", '"Om-Test"'),
        ('a"b', '"a""b"'),
        ("50%", '"50%"'),
        ("a:b", '"a:b"'),
        ("{x}", '"{x}"'),
        ("a\\b", '"a\\b"'),
        ("é", '"é"'),
    ],
)
def test_identifiers_are_quoted_always_and_changed_never(identifier: str, quoted: str) -> None:
    assert quote(identifier) == quoted


@pytest.mark.parametrize(
    ("text", "constant"), [("", "''"), ("it's", "'it''s'"), ("''", "''''''"), ("50% :x", "'50% :x'")]
)
def test_string_constants_double_their_quotes(text: str, constant: str) -> None:
    assert literal(text) == constant


def test_every_name_of_a_target_is_quoted_with_its_schema() -> None:
    names = Target('S"x', "t t", "v", "v_vector").names()

    assert names == {
        "schema": '"S""x"',
        "table": '"S""x"."t t"',
        "source": '"v"',
        "vector": '"v_vector"',
        "adopted": '"v_vector_adopted"',
        "sync": '"t t_vvector_sync"',
        "sync_function": '"S""x"."t t_vvector_sync"',
        "archive": '"v_bytea"',
        "back": '"t t_v_bytea_sync"',
        "back_function": '"S""x"."t t_v_bytea_sync"',
        "left": '"t t_vvector_left"',
        "guard": '"t t_vvector_guard"',
        "guard_function": '"S""x"."t t_vvector_guard"',
        "kept": '"S""x"."t t_v_kept"',
        "typed": '"v_typed"',
        "typing": '"t t_v_typed_sync"',
        "typing_function": '"S""x"."t t_v_typed_sync"',
        "convert": "pg_temp.openmemory_migrations_convert",
        "spread_convert": '"S""x"."t t_vvector_convert"',
        "comment": "'openmemory_migrations: kept equal to v'",
    }


# -- dimensions


def survey(octets: Mapping[int, int], sourceless: Mapping[int, int] | None = None) -> Survey:
    return Survey(Counter(octets), Counter(sourceless or {}))


@pytest.mark.parametrize(
    ("octets", "size", "reason"),
    [
        (0, None, "empty"),
        (0, 2, "empty"),
        (7, None, "length not a multiple of 4"),
        (7, 2, "length not a multiple of 4"),
        (64_004, None, "more than 16,000 dimensions"),
        (64_004, 2, "more than 16,000 dimensions"),
        (12, 2, "other dimension"),
        (64_000, None, None),
        (64_000, 16_000, None),
        (4, None, None),
        (8, 2, None),
    ],
)
def test_a_length_is_a_problem_by_its_first_reason(octets: int, size: int | None, reason: str | None) -> None:
    assert STORED.problem(octets, size) == reason


@pytest.mark.parametrize(
    ("configured", "found", "resolved"),
    [
        pytest.param(None, survey({}), None, id="nothing says"),
        pytest.param(256, survey({}), 256, id="configured, empty table"),
        pytest.param(None, survey({1024: 5}), 256, id="the rows agree"),
        pytest.param(None, survey({1024: 5, 0: 9, 7: 9, 64_004: 9}), 256, id="bad lengths have no vote"),
        pytest.param(None, survey({0: 1, 7: 1}), None, id="only bad lengths"),
        pytest.param(256, survey({1024: 1, 1536: 900}), 256, id="configured, others skipped"),
        pytest.param(None, survey({}, {384: 2}), 384, id="vectors without v say"),
        pytest.param(None, survey({1536: 1}, {384: 2}), 384, id="both agree"),
        pytest.param(384, survey({1536: 1}, {384: 2}), 384, id="configured and both agree"),
        pytest.param(384, survey({}, {384: 2}), 384, id="configured, vectors without v"),
    ],
)
def test_dimensions_are_the_configured_ones_or_those_the_rows_agree_on(
    configured: int | None, found: Survey, resolved: int | None
) -> None:
    assert dimensions.resolve(configured, found) == resolved


@pytest.mark.parametrize(
    ("configured", "found", "parts"),
    [
        pytest.param(
            None,
            survey({1024: 3, 1536: 20_000, 7: 2, 0: 1}),
            [
                "the rows hold vectors of different dimensions",
                "DETAIL:  Rows by length: 0 bytes: 1; 7 bytes: 2; 256 dimensions: 3; 384 dimensions: 20,000.",
                "OM_VEC_DIM=384;",
            ],
            id="rows disagree",
        ),
        pytest.param(
            None,
            survey({1024: 3}, {384: 2}),
            [
                "different dimensions",
                "256 dimensions: 3; vectors of 384 dimensions without v: 2.",
                "OM_VEC_DIM=256;",
            ],
            id="rows and vectors without v disagree",
        ),
        pytest.param(
            1536,
            survey({1024: 3, 6145: 1}),
            [
                "no row holds a vector of 1,536 dimensions, as OM_VEC_DIM or OM_TIER says",
                "256 dimensions: 3; 6,145 bytes: 1.",
                "HINT:  Correct OM_VEC_DIM, or leave it and OM_TIER unset",
            ],
            id="none has the configured",
        ),
        pytest.param(
            256, survey({0: 4}), ["no row holds a vector of 256 dimensions", "0 bytes: 4."], id="only bad lengths"
        ),
        pytest.param(
            256,
            survey({}, {384: 2}),
            ["no row holds a vector of 256 dimensions", "vectors of 384 dimensions without v: 2."],
            id="vectors without v have others",
        ),
        pytest.param(
            256,
            survey({1024: 3}, {384: 2, 1536: 1_000, 256: 7}),
            [
                "1,002 vectors of other than 256 dimensions have no v beside them and would be lost",
                "vectors of 256 dimensions without v: 7; vectors of 384 dimensions without v: 2;",
                "HINT:  Fill v in those rows, or delete them",
            ],
            id="vectors without v would be lost",
        ),
    ],
)
def test_dimensions_that_cannot_be_are_refused_with_the_histogram(
    configured: int | None, found: Survey, parts: list[str]
) -> None:
    with pytest.raises(MigrationError) as raised:
        dimensions.resolve(configured, found)

    assert [part for part in parts if part not in str(raised.value)] == []


# -- the index

NEWEST = Extension("public", (0, 8, 5))
TARGET = Target("public", "openmemory_vectors")


def settled(**values: str) -> Settings:
    return Settings.load(values, {})


def planned(
    rows: int, size: int | None = 256, version: tuple[int, ...] = (0, 8, 5), schema: str = "public", **values: str
) -> Plan:
    plan = choice.plan(TARGET, settled(**values), Extension(schema, version), size, rows)
    assert isinstance(plan, Plan), plan
    return plan


@pytest.mark.parametrize(
    ("values", "version", "size", "rows", "reason", "hint"),
    [
        pytest.param({"index": "none"}, (0, 8), 256, 1000, "OM_INDEX is none", None, id="not wanted"),
        pytest.param({}, (0, 8), None, 1000, '"v_vector" has no dimensions', "Set OM_VEC_DIM", id="no dimensions"),
        pytest.param(
            {"index": "hnsw"}, (0, 4, 4), 256, 1000, "pgvector 0.5.0", "ALTER EXTENSION vector UPDATE", id="hnsw on 0.4"
        ),
        pytest.param(
            {}, (0, 6, 2), 2001, 1000, "halfvec, which came with pgvector 0.7.0", "UPDATE", id="halfvec on 0.6"
        ),
        pytest.param(
            {}, (0, 8), 4001, 1000, "no index of pgvector takes more than 4,000 dimensions", "OM_INDEX=none", id="4,001"
        ),
        pytest.param({"index": "hnsw"}, (0, 8), 16_000, 1000, "more than 4,000", "OM_INDEX=none", id="hnsw, 16,000"),
        pytest.param(
            {}, (0, 8), 256, 49, "ivfflat needs 50 rows to learn from, there are 49", "OM_INDEX=hnsw", id="49"
        ),
        pytest.param({}, (0, 8), 256, 0, "there are 0", "When there are more rows", id="empty"),
    ],
)
def test_where_no_index_can_be_the_reason_is_given_and_the_next_step(
    values: dict[str, str], version: tuple[int, ...], size: int | None, rows: int, reason: str, hint: str | None
) -> None:
    plan = choice.plan(TARGET, settled(**values), Extension("public", version), size, rows)

    assert isinstance(plan, NoIndex)
    assert reason in plan.reason
    assert plan.hint is None if hint is None else hint in str(plan.hint)


@pytest.mark.parametrize(
    ("rows", "lists"),
    [
        (50, 1),
        (999, 1),
        (1000, 1),
        (2000, 2),
        (20_000, 20),
        (999_999, 999),
        (1_000_000, 1000),
        (1_000_001, 1000),
        (1_500_000, 1224),
        (4_000_000, 2000),
        (100_000_000, 10_000),
    ],
)
def test_ivfflat_gets_its_lists_from_the_rows(rows: int, lists: int) -> None:
    plan = planned(rows)

    assert plan.options == f"lists = {lists}"
    assert rows // lists >= 50
    assert plan.probes**2 <= lists < (plan.probes + 1) ** 2


def test_configured_lists_are_kept_whatever_the_rows() -> None:
    assert [planned(rows, index_lists="77").options for rows in (0, 50, 10**7)] == ["lists = 77"] * 3


@pytest.mark.parametrize("rows", [0, 1, 10**6])
def test_hnsw_needs_no_rows_and_has_the_configured_options(rows: int) -> None:
    plan = planned(rows, index="hnsw", index_m="24", index_ef_construction="100")

    assert (plan.method, plan.options, plan.probes) == ("hnsw", "m = 24, ef_construction = 100", 0)


@pytest.mark.parametrize("index", ["ivfflat", "hnsw"])
@pytest.mark.parametrize(("metric", "operator"), [("l2", "<->"), ("cosine", "<=>"), ("ip", "<#>")])
def test_metric_chooses_operator_class_and_operator(index: str, metric: str, operator: str) -> None:
    plan = planned(1000, index=index, index_metric=metric, schema="Ext x")

    assert plan.expression == f'"v_vector" "Ext x".vector_{metric}_ops'
    assert plan.query == f'ORDER BY "v_vector" OPERATOR("Ext x".{operator}) $1'
    assert (plan.opclass, plan.key) == (f"vector_{metric}_ops", "v_vector")


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
@pytest.mark.parametrize("size", [2001, 4000])
def test_above_2000_dimensions_the_index_is_on_the_halfvec_cast(size: int, metric: str) -> None:
    plan = planned(1000, size, (0, 7), "Ext x", index_metric=metric)

    assert plan.expression == f'("v_vector"::"Ext x".halfvec({size})) "Ext x".halfvec_{metric}_ops'
    assert plan.query.startswith(f'ORDER BY "v_vector"::"Ext x".halfvec({size}) OPERATOR("Ext x".')
    assert plan.query.endswith(f'$1::"Ext x".halfvec({size})')


def test_with_the_setting_it_is_on_the_cast_below_2000_dimensions_too() -> None:
    plan = planned(1000, 384, (0, 7), index_halfvec="on")

    assert plan.expression == '("v_vector"::"public".halfvec(384)) "public".halfvec_l2_ops'


def test_up_to_2000_dimensions_there_is_no_cast() -> None:
    assert "halfvec" not in str(planned(1000, 2000))


@pytest.mark.parametrize("index", ["ivfflat", "hnsw"])
def test_memory_grows_with_rows_and_dimensions_and_halves_with_halfvec(index: str) -> None:
    def memory(rows: int, size: int) -> int:
        return planned(rows, size, index=index).memory_kb

    assert memory(10**5, 256) < memory(10**6, 256) < memory(10**7, 256)
    assert memory(10**6, 256) < memory(10**6, 1536) < memory(10**6, 2000)
    assert memory(10**6, 2000) / memory(10**6, 2001) > 1.4


def test_memory_covers_what_has_to_be_in_it() -> None:
    # a vector each: every row for hnsw, 50 rows a list for ivfflat
    assert planned(10**6, 1536, index="hnsw").memory_kb > 10**6 * 1536 * 4 / 1024
    assert planned(10**6, 1536).memory_kb > 1000 * 50 * 1536 * 4 / 1024


HNSW_DEFAULTS = {"m=16", "ef_construction=64"}


def index(**changes: object) -> Index:
    wanted = {
        "name": "openmemory_vectors_vvector_idx",
        "table_oid": 1,
        "valid": True,
        "method": "ivfflat",
        "opclass": "vector_l2_ops",
        "column": "v_vector",
        "half": None,
        "key": "v_vector",
        "options": frozenset({"lists=20"}),
        "partial": False,
        "size": 8192,
    }
    return Index(**(wanted | changes))  # type: ignore[arg-type]


def test_an_index_with_lists_from_other_rows_is_as_good() -> None:
    assert planned(20_000).matches(index())
    assert planned(30_000).matches(index())


@pytest.mark.parametrize(
    ("rows", "lists", "outgrown"),
    [
        *((rows, 20, None) for rows in (10_000, 20_000, 40_000)),
        *((rows, 20, 20) for rows in (9_999, 41_000)),
        (60, 100, 100),
        (60, 1, None),
    ],
)
def test_an_index_is_outgrown_by_twice_or_half_as_many_lists(rows: int, lists: int, outgrown: int | None) -> None:
    found = index(options=frozenset({f"lists={lists}"}))
    assert planned(rows).outgrown(found) == outgrown
    assert planned(rows).suits(found) == (outgrown is None)
    assert planned(rows, index_lists=str(lists)).suits(found)


def test_an_hnsw_index_is_not_outgrown() -> None:
    assert planned(20_000, index="hnsw").outgrown(index(method="hnsw", options=frozenset(HNSW_DEFAULTS))) is None


def test_each_index_beside_another_has_a_name_of_its_own() -> None:
    for table in ("vectors", "t" * 63, 'é"' * 21):
        target = Target("public", table)
        assert len({target.index, *target.indexes}) == 4
        assert target.new.index == target.new.new.index
        assert all(len(name.encode()) <= 63 for name in target.indexes)
        assert (target.new.names(), target.new.sync) == (target.names(), target.sync)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "hnsw", "options": frozenset()},
        {"opclass": "vector_cosine_ops"},
        {"key": "other"},
        {"partial": True},
    ],
)
def test_an_index_of_another_definition_is_not_the_wanted_one(changes: dict[str, object]) -> None:
    assert not planned(20_000).matches(index(**changes))


@pytest.mark.parametrize(
    ("lists", "found", "same"),
    [("20", {"lists=20"}, True), ("21", {"lists=20"}, False)],
)
def test_configured_lists_must_be_those_of_the_index(lists: str, found: set[str], same: bool) -> None:
    assert planned(20_000, index_lists=lists).matches(index(options=frozenset(found))) is same


@pytest.mark.parametrize(
    ("found", "same"),
    [(HNSW_DEFAULTS, True), ({"m=24", "ef_construction=64"}, False), ({"m=16", "ef_construction=65"}, False)],
)
def test_options_of_hnsw_must_be_those_of_the_index(found: set[str], same: bool) -> None:
    plan = planned(20_000, index="hnsw")

    assert plan.matches(index(method="hnsw", options=frozenset(found))) is same


@pytest.mark.parametrize(
    ("key", "same"),
    [("v_vector::halfvec(3000)", True), ("v_vector::halfvec(2999)", False), ("v_vector", False)],
)
def test_a_halfvec_index_is_one_of_as_many_dimensions(key: str, same: bool) -> None:
    found = index(opclass="halfvec_l2_ops", key=key)

    assert planned(20_000, 3000).matches(found) is same


# -- the log


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (3.6, "4 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 0 min"),
        (7500, "2 h 5 min"),
        (90_000, "25 h 0 min"),
    ],
)
def test_a_duration_is_told_in_the_two_units_that_matter(seconds: float, text: str) -> None:
    assert log.duration(seconds) == text
