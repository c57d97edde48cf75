"""One real server for each process of the tests, one fresh database for each test.

OM_TEST_SERVER chooses it: 18 or 16, both with pgvector 0.8, or 16-0.6.2, which has pgvector 0.6.2.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from openmemory_migrations import embedded

from .helpers import ROOT, Database, create_database, drop_database

CHOICE = os.environ.get("OM_TEST_SERVER") or "18"
OPTIONS = {"fsync": "off", "max_connections": "100"}

# a shared machine pauses a process now and then
hypothesis.settings.register_profile("shared", deadline=None)
hypothesis.settings.load_profile("shared")


def programs() -> Path:
    if CHOICE in ("16", "18"):
        return embedded.binaries(int(CHOICE))
    folder = ROOT / f".cache/pgserver-{CHOICE.removeprefix('16-')}/pgserver/pginstall/bin"
    if not folder.exists():
        raise pytest.UsageError(f"OM_TEST_SERVER={CHOICE}: no {folder}; 18 and 16 need none, .ci/run gets 16-0.6.2")
    return folder


def pytest_report_header() -> str:
    postgres = subprocess.run([programs() / "postgres", "--version"], capture_output=True, text=True, check=True)
    control = (programs().parent / "share/postgresql/extension/vector.control").read_text()
    (pgvector,) = re.findall("default_version = '(.*)'", control)
    return f"server: {postgres.stdout.strip()}, pgvector {pgvector}"


# of so many combinations of a slow test `make test-slow`, and so .ci/run, has one; `make test-all` has them all
THINNED = {
    "test_a_column_made_by_hand_is_adopted_as_online": 8,
    "test_a_host_upgrades_fails_continues_downgrades_and_upgrades_again": 5,
    "test_a_network_that_fails_at_a_random_point_is_survived": 4,
    "test_a_network_that_fails_is_survived": 3,
    "test_a_table_too_small_for_an_index_is_cut_over": 2,
    "test_a_tree_is_cut_over_and_back": 2,
    "test_a_v_is_killed_at_a_random_point": 8,
    "test_a_v_is_killed_at_a_statement": 6,
    "test_a_v_that_has_its_dimensions_keeps_them": 2,
    "test_a_wrong_password": 3,
    "test_an_index_under_our_names_is_dealt_with_as_online": 4,
    "test_another_index_on_v": 3,
    "test_any_leaf_may_be_dropped_at_any_moment": 3,
    "test_every_batch_costs_what_it_costs_in_a_small_table": 2,
    "test_every_range_up_and_down_does_what_the_online_commands_do": 2,
    "test_files_please_ruff_and_mypy": 2,
    "test_four_of_which_one_is_killed_while_the_application_writes": 2,
    "test_indexes_on_our_own_column_end_as_one_that_is_valid": 2,
    "test_killed_anywhere": 4,
    "test_killed_at_a_random_point": 6,
    "test_killed_at_a_statement": 2,
    "test_life_cycle_in_a_host_with_history": 2,
    "test_one_bit_in_one_vector_of_thousands": 3,
    "test_pages_by_a_key_of_any_kind": 4,
    "test_rows_are_named_and_found_again_by_keys_of_any_type": 3,
    "test_signals_at_any_moment_lose_nothing": 2,
    "test_something_is_missing_or_in_the_way": 3,
    "test_template_with_stubs_is_healthy": 2,
    "test_the_cutover_killed_at_a_random_point": 8,
    "test_the_cutovers_script_and_the_way_back_leave_what_the_online_runs_leave": 2,
    "test_the_script_leaves_what_the_online_run_leaves": 12,
    "test_the_script_leaves_what_the_online_run_leaves_of_a_v": 3,
    "test_the_server_stops_and_comes_back": 2,
    "test_the_size_of_the_index": 2,
    "test_the_verdict_on_rows_is_the_upgrades": 2,
    "test_up_down_and_up_again_while_the_application_writes": 2,
    "test_what_already_has_the_name_of_our_index_is_left_as_it_is_with_a_warning": 2,
    "test_what_can_not_be_cut_over_stops_the_script_before_any_change": 2,
    "test_what_can_not_be_given_dimensions_stops_the_script_before_any_change": 5,
    "test_what_can_not_be_looked_at": 2,
    "test_what_can_not_be_meant": 2,
    "test_what_can_not_be_meant_is_refused_before_anything_is_connected": 2,
    "test_what_can_not_be_migrated_or_looked_at": 2,
    "test_what_can_not_be_migrated_stops_the_script_before_any_change": 4,
    "test_what_can_not_be_tuned": 2,
    "test_what_hangs_on_v_is_named_before_any_change": 4,
    "test_what_happens_to_a_partition_during_the_backfill_does_not_fail_it": 8,
    "test_what_happens_to_a_partition_during_the_build_does_not_fail_it": 4,
    "test_what_happens_to_a_partition_meanwhile_does_not_fail_it": 4,
    "test_what_was_done_by_hand_ends_as_a_fresh_run": 4,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seen: Counter[str] = Counter()
    for item in sorted(items, key=lambda item: item.nodeid):
        if "server" in getattr(item, "fixturenames", ()):
            item.add_marker("server")
        name = getattr(item, "originalname", "")
        if name in THINNED and item.get_closest_marker("slow"):
            if seen[name] % THINNED[name]:
                item.add_marker("exhaustive")
            seen[name] += 1


@pytest.fixture(scope="session")
def server() -> Iterator[embedded.Server]:
    with embedded.temporary(bin=programs(), options=OPTIONS) as server:
        yield server


@pytest.fixture(scope="session")
def names() -> Iterator[int]:
    return itertools.count()


@pytest.fixture
def database(server: embedded.Server, names: Iterator[int]) -> Iterator[Database]:
    """An empty database: not even the extension is in it."""
    database = create_database(server, f"test_{next(names)}")
    yield database
    drop_database(server, database.name)
