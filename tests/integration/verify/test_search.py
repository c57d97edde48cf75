"""`verify` on real embeddings: a broken index fails, a good one passes, and the settings that help are named."""

from __future__ import annotations

import numpy as np
import pytest

from demo.openmemory import TABLE
from tests.support.commands import om
from tests.support.embeddings import embeddings, index, real, rows_of, set_for_role
from tests.support.openmemory import SECTORS, Database, load
from tests.support.servers import CHOICE
from tests.support.states import INDEX
from tests.support.verification import verify

__all__ = ["real"]  # a fixture

SOME = ("--queries", "25")  # five of each sector
GATE = (*SOME, "--fail-under", "0.95")
IVFFLAT, HNSW = "ivfflat (v_vector vector_l2_ops)", "hnsw (v_vector vector_l2_ops)"
ITERATIVE = CHOICE != "16-0.6.2"  # iterative scans came with pgvector 0.8


def filled_after(database: Database, using: str, rows: int) -> None:
    """The index is built on so many rows, and all others come after it."""
    database.run(f"CREATE TABLE others AS SELECT * FROM {TABLE}; TRUNCATE {TABLE}")
    database.run(f"INSERT INTO {TABLE} SELECT * FROM others ORDER BY id LIMIT {rows}")
    index(database, using)
    database.run(f"INSERT INTO {TABLE} SELECT * FROM others ON CONFLICT DO NOTHING; DROP TABLE others")


def codes(found: dict[str, object]) -> list[str]:
    findings = found["findings"]
    assert isinstance(findings, list)
    return [one["code"] for one in findings]


def test_a_good_index_passes_with_enough_probes_and_fails_without(real: Database) -> None:
    index(real, f"{IVFFLAT} WITH (lists = 20)")

    found = verify(real, 1, *GATE)

    search = found["search"]
    assert found["index"]["options"] == {"lists": 20}
    assert (search["defaults"], search["metric"], search["k"]) == ({"ivfflat.probes": "1"}, "l2", 10)
    assert 0.1 < search["session"]["recall"] < 0.7
    # unit vectors are in one order by L2 and by cosine
    assert search["every_row"]["recall"] == search["every_row"]["in_memory"] == 1
    tried = {int(one["settings"]["ivfflat.probes"]): one["recall"] for one in search["tried"]}
    assert list(tried) == [1, 2, 4, 8, 16, 20][: len(tried)]
    assert sorted(tried.values()) == list(tried.values())
    assert tried[1] == search["session"]["recall"]
    assert max(tried.values()) > 0.99
    best = int(search["best"]["ivfflat.probes"])
    assert tried[best] >= 0.95
    assert codes(found)[0] == "fail-under"
    assert f"SET ivfflat.probes = {best};" in [one["hint"] for one in found["findings"]]

    assert "lists-uneven" not in codes(found)

    # what a session has by default is the role's
    set_for_role(real, "ivfflat.probes", str(best))
    found = verify(real, 0, *GATE)
    assert found["search"]["defaults"] == {"ivfflat.probes": str(best)}
    assert found["search"]["session"]["recall"] == tried[best]
    assert "recall" not in codes(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("using", "rows", "probes", "most"),
    [
        pytest.param(f"{IVFFLAT} WITH (lists = 100)", 200, 10, 0.94, id="200 rows in 100 lists"),
        pytest.param(f"{HNSW} WITH (m = 2, ef_construction = 4)", 4000, 1, 0.4, id="hnsw with m = 2"),
    ],
)
def test_a_broken_index_fails(real: Database, using: str, rows: int, probes: int, most: float) -> None:
    filled_after(real, using, rows)
    set_for_role(real, "ivfflat.probes", str(probes))

    found = verify(real, 1, *GATE)

    assert found["comparison"]["wrong"] == []
    assert found["search"]["session"]["recall"] < most
    assert codes(found)[0] == "fail-under"
    assert {"recall", "recall-out-of-reach"} & set(codes(found))


@pytest.mark.slow
def test_an_ivfflat_built_on_an_empty_table_looks_at_nearly_everything(real: Database) -> None:
    """Its lists are at random places, and unit vectors all nearest to a few of them: right, and slow."""
    filled_after(real, f"{IVFFLAT} WITH (lists = 100)", 0)

    found = verify(real, 0, *SOME)

    assert "lists-uneven" in codes(found)
    search = found["search"]
    assert search["tried"][-1]["recall"] > 0.99
    assert len(search["tried"]) <= 5  # 1 to 5 in thirteen runs: the places are random


@pytest.mark.slow
def test_rebuilt_it_has_lists_of_its_rows(real: Database) -> None:
    filled_after(real, f"{IVFFLAT} WITH (lists = 100)", 0)
    assert om(real, "index", "--rebuild", "-x", "index_lists=40").returncode == 0

    found = verify(real, 0, *SOME)

    assert found["index"]["options"] == {"lists": 40}
    assert found["search"]["session"]["recall"] < 0.7
    assert "lists-uneven" not in codes(found)


@pytest.mark.slow
def test_an_index_that_somebody_has_made_under_another_name_is_measured(real: Database) -> None:
    real.run(f"CREATE INDEX theirs ON {TABLE} USING {HNSW}; CREATE INDEX part ON {TABLE} USING {HNSW} WHERE dim = 1")
    assert verify(real, 0, *SOME)["index"]["name"] == "theirs"

    index(real, f"{IVFFLAT} WITH (lists = 20)")
    assert verify(real, 0, *SOME)["index"]["name"] == INDEX


@pytest.mark.slow
@pytest.mark.parametrize("analyzed", [False, True])
def test_the_gate_is_the_index_whatever_the_planner_takes_for_now(real: Database, analyzed: bool) -> None:
    index(real, f"{IVFFLAT} WITH (lists = 20)")
    if analyzed:
        real.run(f"ANALYZE {TABLE}")
    else:  # with so few rows by the statistics it rather reads them all
        real.run("SET allow_system_table_mods = on; DELETE FROM pg_statistic WHERE starelid = %s::regclass", TABLE)
        real.run("UPDATE pg_class SET reltuples = 10, relpages = 1 WHERE oid = %s::regclass", TABLE)

    search = verify(real, 1, *GATE)["search"]

    assert search["session"]["by_index"] == search["queries"]
    assert search["session"]["recall"] < 0.7
    if not analyzed and CHOICE != "16-0.6.2":  # 0.6 takes the index however few rows there are
        assert search["planned"]["by_index"] < search["queries"]
        assert search["planned"]["recall"] > search["session"]["recall"]
    assert search["every_row"]["by_index"] == 0


@pytest.mark.slow
def test_hnsw_behind_a_filter_is_short_and_the_advice_names_the_iterative_scan(real: Database) -> None:
    index(real, HNSW)

    found = verify(real, 1, *GATE)

    search = found["search"]
    groups = search["session"]["groups"]
    assert set(groups) == {*(f"sector {sector}" for sector in SECTORS), "largest users", "smallest users"}
    # 40 rows, of which the sector has 2 % or half
    assert groups["sector reflective"]["short"] == groups["sector reflective"]["queries"] == 5
    assert groups["sector episodic"]["short"] == 0
    assert groups["sector reflective"]["recall"] < 0.3 < 0.9 < groups["sector episodic"]["recall"]
    assert search["session"]["short"] == sum(
        group["short"] for name, group in groups.items() if name.startswith("sector")
    )
    (short,) = [one for one in found["findings"] if one["code"] == "short"]
    iterative = [one for one in search["tried"] if "hnsw.iterative_scan" in one["settings"]]
    if not ITERATIVE:
        assert iterative == []
        assert "ALTER EXTENSION vector UPDATE" in short["hint"]
        return
    assert "SET hnsw.iterative_scan = strict_order;" in short["hint"]
    assert [one["short"] for one in iterative] == [0] * len(iterative)
    assert iterative[-1]["recall"] >= 0.95

    set_for_role(real, "hnsw.iterative_scan", "strict_order")
    assert verify(real, 0, *SOME, "--fail-under", "0.9")["search"]["session"]["short"] == 0


@pytest.mark.slow
def test_the_wanted_recall_is_what_the_best_settings_reach(real: Database) -> None:
    index(real, f"{IVFFLAT} WITH (lists = 40)")

    probes = {}
    for wanted in ("0.5", "0.99"):
        search = verify(real, 0, *SOME, "--recall", wanted)["search"]
        (best,) = [one for one in search["tried"] if one["settings"] == search["best"]]
        assert best["recall"] >= float(wanted)
        probes[wanted] = int(best["settings"]["ivfflat.probes"])

    assert probes["0.5"] < probes["0.99"]
    assert verify(real, 1, *SOME, "--fail-under", "1")["findings"][0]["code"] == "fail-under"
    verify(real, 0, *SOME, "--fail-under", "0.05")


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["cosine", "ip"])
def test_an_index_that_openmemorys_operator_does_not_take_is_warned_of(real: Database, metric: str) -> None:
    index(real, f"ivfflat (v_vector vector_{metric}_ops) WITH (lists = 20)")

    found = verify(real, 0, *SOME)

    search = found["search"]
    assert search["metric"] == metric
    assert codes(found).count("other-metric") == 1
    assert search["session"]["by_index"] == search["queries"]
    assert search["every_row"]["recall"] == 1
    assert search["tried"][-1]["recall"] >= 0.995
    assert 0.1 < search["session"]["recall"] < 0.7
    assert "other-than-in-memory" not in codes(found)


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_vectors_of_different_lengths_are_found_in_another_order_than_in_memory(real: Database, metric: str) -> None:
    lengths = np.random.default_rng(2).uniform(0.5, 2, (len(embeddings()), 1)).astype("<f4")
    real.run(f"TRUNCATE {TABLE}")
    load(real, rows_of(embeddings() * lengths))
    index(real, f"ivfflat (v_vector vector_{metric}_ops) WITH (lists = 4)")

    found = verify(real, 0, *SOME)

    assert found["search"]["every_row"]["recall"] == 1
    assert found["search"]["every_row"]["in_memory"] < 0.9
    (finding,) = [one for one in found["findings"] if one["code"] == "other-than-in-memory"]
    assert finding["detail"] == "The vectors are not of one length."


@pytest.mark.slow
def test_no_index_is_no_failure_and_everything_is_found(real: Database) -> None:
    for invalid in (False, True):
        if invalid:
            index(real, f"{IVFFLAT} WITH (lists = 20)")
            real.run("UPDATE pg_index SET indisvalid = false WHERE indexrelid = %s::regclass", INDEX)

        found = verify(real, 0, *GATE, env={"OM_INDEX": "none"})

        assert found["index"] is None
        assert codes(found) == ["no-index"]
        assert found["search"]["session"]["recall"] == found["search"]["every_row"]["recall"] == 1
        assert found["search"]["tried"] == []
        assert found["search"]["best"] is None
    assert "none that is valid" in om(real, "verify", *SOME).stdout


@pytest.mark.slow
def test_lists_that_are_many_or_a_sample_that_is_small_are_no_uneven_lists(real: Database) -> None:
    # a search reads the centres of all lists, whatever it finds in one
    index(real, f"{IVFFLAT} WITH (lists = 400)")
    assert "lists-uneven" not in codes(verify(real, 0, *SOME))

    real.run(f"DROP INDEX {INDEX}")
    index(real, f"{IVFFLAT} WITH (lists = 8)")
    assert "lists-uneven" not in codes(verify(real, 0, *SOME, "--sample", "50"))


@pytest.mark.slow
def test_without_an_index_only_a_few_searches_read_every_row(real: Database) -> None:
    before = real.value("SELECT seq_scan FROM pg_stat_user_tables WHERE relname = %s", TABLE)

    verify(real, 0, "--queries", "100")

    scans = real.value("SELECT seq_scan FROM pg_stat_user_tables WHERE relname = %s", TABLE) - before
    assert scans < 40, scans  # 10 searches, twice each; counts; each parallel worker counts as well
