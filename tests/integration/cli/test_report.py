"""`openmemory-migrations report`: one HTML file that needs nothing else, and reads well in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import numpy.typing as npt
import pytest

from demo.openmemory import TABLE, environment
from openmemory_migrations.verify.norms import Norms
from tests.support.clustered_rows import clustered_rows
from tests.support.commands import NOTHING, Result, alembic, om
from tests.support.openmemory import Database, create_table, load, pack, random_rows
from tests.support.states import snapshot

ROWS, DIM = 1000, 16
FEW = ("--queries", "20")
BROWSER = shutil.which("chromium")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


class Page(HTMLParser):
    """What a browser would show, and whatever it would fetch."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.open, self.fetched = "", [""], list[str]()
        self.tags: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.open.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


@pytest.fixture
def table(database: Database) -> Database:
    create_table(database)
    load(database, clustered_rows(ROWS, DIM))
    alembic(database, "upgrade", "head", env={"OM_INDEX": "hnsw"})
    return database


def report(database: Database, *args: str, env: Mapping[str, str] = NOTHING) -> Result:
    return om(database, "report", "-x", "index=hnsw", *FEW, *args, env=env)


def test_it_is_one_file_that_fetches_nothing_and_says_all(table: Database, tmp_path: Path) -> None:
    before = snapshot(table)
    file = tmp_path / "report.html"

    done = report(table, "--output", str(file))

    assert done.returncode == 0, done.log
    assert done.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert snapshot(table) == before
    page = Page(file.read_text())
    assert [link for link in page.fetched if not link.startswith("#")] == []
    assert not page.tags & {"script", "link", "iframe", "img", "object"}
    for said in (
        "Migrated and right",
        "1,000 looked at; 1,000 equal to the bit",
        "hnsw with vector_l2_ops",
        "sector episodic",
        "largest users",
        "every row, without an index",
        "16 dimensions",
        "Recall against latency",
        "milliseconds a search",  # inside a picture, as text
        "1,000 vectors from",
    ):
        assert said in page.text, said
    assert file.read_text().count("<svg") == 3


@pytest.mark.slow
def test_without_a_file_it_goes_to_stdout(table: Database) -> None:
    done = report(table)

    assert done.returncode == 0
    assert done.stdout.startswith("<!DOCTYPE html>")
    assert "Migrated and right" in done.stdout
    assert "<!DOCTYPE" not in done.stderr


@pytest.mark.slow
def test_as_json_it_has_the_same(table: Database) -> None:
    found = json.loads(report(table, "--json").stdout)

    assert found["fine"] is True
    assert found["status"]["at_head"] is True
    assert found["verify"]["comparison"]["equal"] == ROWS
    assert found["lengths"] == {"16 dimensions": ROWS}
    assert sum(rows for _, _, rows in found["norms"]["bins"]) == found["norms"]["rows"] == ROWS


@pytest.mark.slow
def test_a_file_may_be_a_link_and_may_be_json(table: Database, tmp_path: Path) -> None:
    (tmp_path / "there.json").write_text("old")
    (tmp_path / "link").symlink_to("there.json")

    done = report(table, "--json", "--output", str(tmp_path / "link"))

    assert (done.returncode, done.stdout) == (0, "")
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "there.json").read_text())["fine"] is True


@pytest.mark.slow
def test_what_is_wrong_is_in_it_and_in_the_exit_code(table: Database) -> None:
    table.run(f"ALTER TABLE {TABLE} DISABLE TRIGGER USER")
    table.run(f"UPDATE {TABLE} SET v = %s WHERE user_id = 'user03'", pack([1.5] * DIM))

    done = report(table)

    assert done.returncode == 1
    page = Page(done.stdout)
    assert "Not finished, or not right" in page.text
    assert "the vector is another than the bytes" in page.text


@pytest.mark.slow
def test_before_the_migration_it_has_the_state_and_the_lengths(database: Database) -> None:
    create_table(database)
    load(database, [*random_rows(60, 8), *random_rows(5, 3)])

    done = om(database, "report")

    assert done.returncode == 1
    page = Page(done.stdout)
    assert "openmemory-migrations upgrade" in page.text
    assert "8 dimensions" in page.text
    assert "3 dimensions" in page.text
    assert "Searches" not in page.text


@pytest.mark.slow
@pytest.mark.parametrize("rows", [0, 1])
def test_of_hardly_a_row(database: Database, rows: int) -> None:
    create_table(database)
    load(database, random_rows(rows, 8))
    alembic(database, "upgrade", "head", env={"OM_VEC_DIM": "8"})

    done = om(database, "report", "-x", "vec_dim=8")

    assert done.returncode == 0, done.log
    assert f"{rows:,} looked at" in Page(done.stdout).text


@pytest.mark.slow
def test_names_are_shown_and_not_obeyed(database: Database) -> None:
    name = "<script>alert(1)</script> & co"
    create_table(database, name)
    load(database, random_rows(60, 8), name)
    env = {"OM_VECTOR_TABLE": name}
    alembic(database, "upgrade", "head", env=env)

    done = om(database, "report", *FEW, env=env)

    assert done.returncode == 0, done.log
    page = Page(done.stdout)
    assert "script" not in page.tags
    assert f'Vectors of "public.{name}"' in page.text


@pytest.mark.slow
def test_without_matplotlib_the_figures_are_tables(table: Database) -> None:
    program = (
        "import sys; sys.modules['matplotlib'] = None; from openmemory_migrations.cli import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "report", "-x", "index=hnsw", *FEW],
        env=environment(table, {}),
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    page = Page(done.stdout)
    assert "svg" not in page.tags
    assert 'pip install "openmemory-migrations[report]"' in page.text
    assert "16 dimensions" in page.text


@pytest.mark.slow
@pytest.mark.parametrize(("file", "said"), [("missing/report.html", "folder that is there"), (".", "can't be written")])
def test_where_it_can_not_be_written_nothing_is_measured(table: Database, tmp_path: Path, file: str, said: str) -> None:
    done = report(table, "--output", str(tmp_path / file))

    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert "searching" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
@pytest.mark.parametrize("width", [1100, 420])
def test_it_reads_well_in_a_browser(table: Database, tmp_path: Path, width: int) -> None:
    file, picture = tmp_path / "report.html", tmp_path / "report.png"
    report(table, "--output", str(file))
    # what would be wider than the window is what a reader would have to drag
    measured = tmp_path / "measured.html"
    script = "<script>document.title = document.documentElement.scrollWidth + ' ' + innerWidth</script></body>"
    measured.write_text(file.read_text().replace("</body>", script))

    pixels = screenshot(file, picture, width)
    title = browse(measured, tmp_path / "profile", width, "--dump-dom")

    (needed, has) = (int(number) for number in re.findall(r"<title>(\d+) (\d+)</title>", title)[0])
    assert needed <= has, "the page is wider than its window"
    ink = (pixels[..., :3].min(axis=2) < 0.5).mean(axis=1)  # share of dark pixels, by line
    assert (ink > 0).mean() > 0.15, "hardly anything to be seen"
    assert green(pixels[: len(pixels) // 4]) > 500, "no verdict at the top"
    assert blue(pixels) > 2000, "no pictures"


def screenshot(file: Path, picture: Path, width: int) -> npt.NDArray[np.float32]:
    browse(file, picture.with_suffix(".profile"), width, f"--screenshot={picture}")
    pixels: npt.NDArray[np.float32] = matplotlib.image.imread(picture)
    return pixels


def browse(file: Path, profile: Path, width: int, *how: str) -> str:
    command = [str(BROWSER), *QUIET, f"--user-data-dir={profile}", f"--window-size={width},3000", *how, file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def green(pixels: npt.NDArray[np.float32]) -> int:
    """How many pixels have the colour of a verdict that all is well."""
    return int((np.abs(pixels[..., :3] - np.array([0x1A, 0x7F, 0x37]) / 255) < 0.02).all(axis=2).sum())


def blue(pixels: npt.NDArray[np.float32]) -> int:
    return int((np.abs(pixels[..., :3] - np.array([0x33, 0x67, 0x91]) / 255) < 0.02).all(axis=2).sum())


def test_norms_count_every_row_once() -> None:
    random = np.random.default_rng(0)
    lengths = np.concatenate([10.0 ** random.uniform(-7, 7, 500), np.ones(300), np.zeros(7), [1e-30, 1e30]])
    values = np.zeros((len(lengths), 3), "<f4")
    values[:, 1] = lengths

    found = Norms()
    for part in np.array_split(values, 7):
        found.add(part)
    found.add(np.full((2, 3), np.nan, "<f4"))

    assert (found.rows, found.zeros) == (len(lengths), 7)
    assert found.least == 0
    assert found.most == pytest.approx(1e30, rel=1e-6)
    bins = found.bins()
    assert sum(rows for *_, rows in bins) == len(lengths) - 7
    (at_one,) = [rows for low, high, rows in bins if low <= 1 < high]
    assert at_one >= 300
