"""Progress on a terminal, and elsewhere."""

from __future__ import annotations

import io
import logging
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path

import pytest

from demo.openmemory import TABLE
from openmemory_migrations import console, log
from tests.support.commands import alembic, om, result, start_om
from tests.support.openmemory import Database, create_table, load, mismatches, random_rows
from tests.support.running import transaction
from tests.support.sessions import converted, eventually, terminate
from tests.support.states import BACKFILL, EXPAND, HEAD, INDEX, stamp
from tests.support.terminal import ALEMBIC, OURS, Terminal, in_a_pipe, on_terminal

ROWS, DIM = 4_000, 16
SLOWLY = {"BACKFILL_BATCH": "50", "OM_BACKFILL_PAUSE_MS": "15"}  # 80 batches, about 2 seconds
BAR = re.compile(rf"\rbackfill {TABLE}: +(\d+)%\|[^|]*\| (\d+)/(\d+) rows \[\d\d:\d\d<[\d:?]+, +[\d.?]+ rows/s")
LINE = rf"^(?:INFO  \[\S+\] )?NOTICE:  backfill {TABLE}: ([\d,]+) of 4,000 rows"
LOG = r"(NOTICE|WARNING|DETAIL|HINT|ERROR|FATAL):  \S|INFO  \[alembic\.|Running |Context |Will assume |$"
OFTEN = "from openmemory_migrations import console; from openmemory_migrations.backfill import progress; "
OFTEN += "progress.LOG_INTERVAL = console.LOG_INTERVAL = 0.2"
WITHOUT_TQDM = "sys.modules['tqdm'] = None"


@pytest.fixture
def table(database: Database) -> Database:
    create_table(database)
    load(database, random_rows(ROWS, DIM))
    alembic(database, "upgrade", EXPAND)
    return database


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """For this process' own stderr, which a test has to redirect by itself: pytest does so after its fixtures."""
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(console, "DRAW_INTERVAL", 0.01)
    level = log.logger.level
    log.logger.setLevel(logging.INFO)
    yield terminal
    log.logger.setLevel(level)
    terminal.end()


@pytest.mark.parametrize(
    ("main", "args"),
    [
        (ALEMBIC, ["upgrade", "head"]),
        pytest.param(OURS, ["upgrade"], marks=pytest.mark.slow),
        pytest.param(OURS, ["backfill"], marks=pytest.mark.slow),
        pytest.param(OURS, ["backfill", "-x", "backfill_engine=server"], marks=pytest.mark.slow),
        pytest.param(OURS, ["backfill", "-x", "backfill_workers=3"], marks=pytest.mark.slow),
    ],
)
def test_a_bar_moves_on_a_terminal_and_log_lines_come_above_it(table: Database, main: str, args: list[str]) -> None:
    lock = f"SELECT FROM {TABLE} WHERE ctid = (SELECT max(ctid) FROM {TABLE}) FOR UPDATE"

    with (
        transaction(table, lock) as other,
        on_terminal(table, main, *args, env={**SLOWLY, "OM_LOCK_TIMEOUT_MS": "50"}, patch=OFTEN) as run,
    ):
        run.shows("rows are locked, another pass")
        other.rollback()
        assert run.ends() == 0

    bars = [tuple(map(int, found)) for found in BAR.findall(run.terminal.written)]
    # the last row is that of the passes that follow
    shares = [share for share, _, total in bars if total == ROWS]
    assert len(set(shares)) > 4
    assert shares == sorted(shares)
    assert {total for _, _, total in bars} == {ROWS, 1}
    lines = run.terminal.lines
    assert [line for line in lines if not re.match(LOG, line)] == []
    assert any(f"backfill {TABLE}: rows are locked, another pass in" in line for line in lines)
    # what the bar stands for isn't said as well
    assert re.findall(LINE, "\n".join(lines), re.MULTILINE) == ["3,999"]
    assert "\r" in run.terminal.written.split("another pass")[1], "the bar doesn't come back"
    assert mismatches(table) == []


@pytest.mark.slow
@pytest.mark.parametrize("main", [ALEMBIC, OURS])
def test_lines_at_intervals_elsewhere(table: Database, main: str) -> None:
    done = in_a_pipe(table, main, "upgrade", "head", env=SLOWLY, patch=OFTEN)

    assert done.returncode == 0
    assert "\r" not in done.log
    assert "\x1b" not in done.log
    rows = [int(text.replace(",", "")) for text in re.findall(LINE, done.stderr, re.MULTILINE)]
    assert len(rows) > 4
    assert rows == sorted(rows)
    assert rows[-1] == ROWS


@pytest.mark.slow
@pytest.mark.parametrize(("env", "patch"), [({}, WITHOUT_TQDM), ({"TERM": "dumb"}, ""), ({"TQDM_DISABLE": "1"}, "")])
def test_a_terminal_without_tqdm_or_without_a_cursor_gets_the_lines(
    table: Database, env: dict[str, str], patch: str
) -> None:
    with on_terminal(table, OURS, "upgrade", env={**SLOWLY, **env}, patch=f"{patch}\n{OFTEN}") as run:
        assert run.ends() == 0

    assert "\r" not in run.terminal.written.replace("\r\n", "\n")
    assert len(re.findall(LINE, "\n".join(run.terminal.lines), re.MULTILINE)) > 4


@pytest.mark.slow
@pytest.mark.parametrize("args", [["upgrade"], ["backfill"]])
def test_quiet_says_only_what_is_wrong(table: Database, args: list[str]) -> None:
    with on_terminal(table, OURS, *args, "--quiet", env=SLOWLY, patch=OFTEN) as run:
        assert run.ends() == 0
    assert run.terminal.written == ""

    table.run(f"UPDATE {TABLE} SET v = '' WHERE user_id = 'user1'")
    with on_terminal(table, OURS, "backfill", "--quiet", "-x", "on_bad_rows=fail") as run:
        assert run.ends() == 1
    assert [line.partition(":")[0] for line in run.terminal.lines] == ["ERROR", "DETAIL", "HINT"]


@pytest.mark.slow
@pytest.mark.parametrize("main", [ALEMBIC, OURS])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_the_line_to_the_prompt(table: Database, main: str, number: signal.Signals) -> None:
    with on_terminal(table, main, "upgrade", "head", env=SLOWLY) as run:
        eventually(lambda: converted(table) > ROWS / 4)
        code = run.ends(number)

    assert code == (3 if main == OURS else 255)
    lines = run.terminal.lines
    assert BAR.search(run.terminal.written)
    assert any(f"stopped by {number.name}; what is committed is kept" in line for line in lines)
    assert not any("rows/s" in line for line in lines)


@pytest.mark.slow
def test_an_error_comes_below_the_log_and_not_behind_the_bar(table: Database) -> None:
    with on_terminal(table, OURS, "backfill", env=SLOWLY) as run:
        eventually(lambda: converted(table) > ROWS / 4)
        table.run(f"ALTER TABLE {TABLE} DROP COLUMN v_vector CASCADE")
        assert run.ends() == 1

    assert BAR.search(run.terminal.written)
    assert any(line.startswith("ERROR:  ") for line in run.terminal.lines)
    assert [line for line in run.terminal.lines if "rows/s" in line] == []


@pytest.mark.slow
def test_a_connection_that_is_made_anew_gets_a_bar_anew(table: Database) -> None:
    with on_terminal(table, OURS, "backfill", env=SLOWLY) as run:
        eventually(lambda: converted(table) > ROWS / 4)
        assert terminate(table)
        assert run.ends() == 0

    totals = [int(total) for _, _, total in BAR.findall(run.terminal.written)]
    assert min(totals) < max(totals) == ROWS
    assert any("Connecting again in 1 s" in line for line in run.terminal.lines)
    assert [line for line in run.terminal.lines if not re.match(LOG, line)] == []


@pytest.mark.slow
@pytest.mark.parametrize("main", [ALEMBIC, OURS])
def test_a_terminal_that_is_gone_stops_nothing(table: Database, main: str) -> None:
    with on_terminal(table, main, "upgrade", "head", env=SLOWLY) as run:
        eventually(lambda: converted(table) > ROWS / 4)
        run.terminal.hang_up()
        run.ends()

    assert BAR.search(run.terminal.written)
    assert converted(table) == ROWS
    assert stamp(table) == [HEAD]


@pytest.mark.slow
def test_a_bar_moves_with_what_others_do(table: Database) -> None:
    """Also while there is nothing left to do but to wait for them."""
    client = {"OM_BACKFILL_ENGINE": "client"}  # which claims what it has read, also while it rests
    other = start_om(table, "backfill", env={"BACKFILL_BATCH": "20", "OM_BACKFILL_PAUSE_MS": "40", **client})
    eventually(lambda: converted(table) > 0)

    with on_terminal(table, OURS, "backfill", env={"BACKFILL_BATCH": "4000", **client}, patch=OFTEN) as run:
        assert run.ends() == 0

    assert result(other).returncode == 0
    assert mismatches(table) == []
    waiting = run.terminal.written.split("another run is at work on a part of the table; waiting for it")
    assert len(waiting) > 1, "it had nothing to wait for"
    assert len({done for _, done, _ in BAR.findall(waiting[1])}) > 2


@pytest.mark.slow
def test_few_batches_move_it_too(table: Database) -> None:
    env = {"BACKFILL_BATCH": "1000", "OM_BACKFILL_PAUSE_MS": "700"}

    with on_terminal(table, OURS, "backfill", env=env) as run:
        assert run.ends() == 0

    assert len({done for _, done, _ in BAR.findall(run.terminal.written)}) > 3


@pytest.mark.slow
@pytest.mark.parametrize("main", [ALEMBIC, OURS])
def test_an_index_build_shows_its_phase(database: Database, main: str) -> None:
    create_table(database)
    load(database, random_rows(6_000, 128))
    alembic(database, "upgrade", BACKFILL)
    often = "from openmemory_migrations import console; from openmemory_migrations.index import build_progress; "
    often += "build_progress.LOOK_INTERVAL = console.DRAW_INTERVAL = 0.05"

    with on_terminal(database, main, "upgrade", "head", env={"OM_INDEX": "hnsw"}, patch=often) as run:
        assert run.ends() == 0

    bars = re.findall(rf'\rindex "{INDEX}": +(\d+)%\|[^|]*\| \[[\d:]+<[\d:?]+, loading tuples\]', run.terminal.written)
    assert len(set(bars)) > 4
    assert [line for line in run.terminal.lines if not re.match(LOG, line)] == []
    assert not any("loading tuples" in line for line in run.terminal.lines)


@pytest.mark.slow
def test_an_index_build_shows_whom_it_waits_for(table: Database) -> None:
    alembic(table, "upgrade", BACKFILL)

    with (
        transaction(table, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ", "SELECT 1") as other,
        on_terminal(table, OURS, "upgrade") as run,
    ):
        run.shows(f"waiting for process {other.info.backend_pid}]")
        other.rollback()
        assert run.ends() == 0


@pytest.mark.slow
@pytest.mark.parametrize(("command", "units"), [("verify", "pages|ways"), ("tune", "indexes")])
def test_what_measures_has_a_bar_and_its_data_are_not_in_it(table: Database, command: str, units: str) -> None:
    alembic(table, "upgrade", "head")
    often = "from openmemory_migrations import console; console.DRAW_INTERVAL = 0.01"

    with on_terminal(table, OURS, command, "--queries", "30", patch=often) as run:
        assert run.ends() == 0

    assert len(set(re.findall(rf"\|\s*(\d+)/\d+ (?:{units})", run.terminal.written))) > 2
    assert not any("%|" in line for line in run.terminal.lines)


@pytest.mark.slow
def test_data_of_a_command_stays_apart(table: Database) -> None:
    assert om(table, "backfill", "--json").stdout.count("\n") == 4


def test_handlers_of_other_streams_stay_as_they_are(terminal: Terminal, tmp_path: Path) -> None:
    """And those of this terminal keep their format, level and filters; afterwards everything is as before."""
    text = io.StringIO()
    plain, strict, kept = (logging.StreamHandler(stream) for stream in (terminal.stream, terminal.stream, text))
    file = logging.FileHandler(tmp_path / "log")
    plain.setFormatter(logging.Formatter("<%(message)s>"))
    strict.setLevel(logging.WARNING)
    strict.addFilter(lambda record: "secret" not in record.getMessage())
    logger = logging.getLogger("host")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = [plain, strict, kept, file]
    child = logging.getLogger("host.without_handlers")

    with redirect_stderr(terminal.stream), console.shown("work", 10) as shown:
        shown.to(3)
        child.info("one")
        child.warning("two")
        logger.warning("secret")

    logger.handlers = []
    file.close()
    assert [plain.stream, strict.stream, kept.stream] == [terminal.stream, terminal.stream, text]
    terminal.end()
    assert terminal.lines == ["<one>", "<two>", "two", "<secret>"]
    assert text.getvalue() == (tmp_path / "log").read_text() == "one\ntwo\nsecret\n"


def test_another_pass_and_a_total_of_nothing(terminal: Terminal) -> None:
    def shows(text: str) -> None:
        eventually(lambda: text in terminal.written, 5)

    with redirect_stderr(terminal.stream):
        with console.shown("passes", 100, "%") as shown:
            for done, note in ((90, "first"), (5, "second"), (4, "overtaken"), (200, "too much")):
                shown.to(done, note)
                shows(f", {note}]")
        with console.shown("nothing", 0, "users") as shown:
            shown.to(3, "found")
            shows(", found]")

    terminal.end()
    assert re.findall(r"passes: +(\d+)%\|[^|]*\| \[00:00<[\d:?]+, too much\]", terminal.written)[-1] == "100"
    assert re.search(r"nothing: +\| +\| 3/\S users \[", terminal.written)
    assert terminal.lines == []


def test_an_exception_passes_through_and_takes_the_bar_away(terminal: Terminal) -> None:
    def fail() -> None:
        with redirect_stderr(terminal.stream), console.shown("work", 10) as shown:
            shown.to(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()

    assert not [thread for thread in threading.enumerate() if thread.name == "openmemory-migrations bar"]
    terminal.end()
    assert "work: " in terminal.written
    assert terminal.lines == []


def test_lines_tell_no_more_than_one_at_an_interval(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with console.shown("short work", 10) as shown:
        shown.to(5)
    assert caplog.messages == []

    monkeypatch.setattr(console, "LOG_INTERVAL", 0.05)
    with console.shown("verify", 50_000) as shown:
        time.sleep(0.1)
        threads = [threading.Thread(target=shown.to, args=[done, "3 wrong"]) for done in (12_000, 12_001, 12_002)]
        for thread in threads:
            thread.start()
            thread.join()

    (said,) = caplog.messages
    assert re.fullmatch(r"NOTICE:  verify: 12,000 of 50,000 rows \(24 %\), [\d,]+ rows/s, 0 s left, 3 wrong", said)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (console.line("w", 0, 0, "rows", 0.0), "w: 0 of 0 rows (100 %), 0 rows/s"),
        (console.line("w", 0, 9, "rows", 5.0), "w: 0 of 9 rows (0 %), 0 rows/s"),
        (console.line("w", 3, 6, "indexes", 60.0), "w: 3 of 6 indexes (50 %), 0.05 indexes/s, 1 min 0 s left"),
        (console.line("w", 900, 1000, "rows", 1.0, 100), "w: 900 of 1,000 rows (100 %), 900 rows/s"),
        (console.line("w", 1200, 1000, "rows", 1.0), "w: 1,200 of 1,000 rows (100 %), 1,200 rows/s"),
    ],
)
def test_a_line_says_how_far_and_how_long(line: str, said: str) -> None:
    assert line == said
