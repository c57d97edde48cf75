"""The README's claims: its settings are the package's, its commands run, its sample output is what is printed."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from demo.openmemory import environment
from openmemory_migrations.settings import OPTIONS, Settings
from tests.support.commands import ROOT, alembic, om
from tests.support.openmemory import Database, checksum, create_table, load, mismatches, real_rows
from tests.support.states import column_type

README = (ROOT / "README.md").read_text()
OPERATING = (ROOT / "docs/operating.md").read_text()


def settings_table() -> str:
    """The README's table, from the options themselves; run this module to have it printed."""
    defaults: dict[str, object] = {field.name: field.default for field in dataclasses.fields(Settings)}
    lines = ["| variable | default | allowed | meaning |", "|---|---|---|---|"]
    for name, option in OPTIONS.items():
        default = defaults[name]
        if isinstance(default, bool):
            default = "on" if default else "off"
        lines.append(
            f"| `{option.variable}` | {'unset' if default is None else default} | {option.allowed} | {option.meaning} |"
        )
    return "\n".join(lines)


def block(marker: str, text: str = README) -> str:
    """The lines that follow `<!-- marker -->`, without the fence."""
    after = text.split(f"<!-- {marker} -->\n")[1]
    return after.split("\n\n")[0].replace("```\n", "").replace("\n```", "")


def commands(section: str) -> list[str]:
    """What is typed in a section, without the remarks."""
    text = README.split(f"## {section}\n")[1].split("\n## ")[0]
    return [line.split("#")[0].strip() for line in re.findall(r"^\$ (.*)", text, re.MULTILINE)]


def shape(line: str) -> str:
    """A line with what differs from run to run taken out."""
    return re.sub(r" +", " ", re.sub(r"[\d,.]+", "#", line))


def test_settings_are_the_packages_own() -> None:
    assert block("table: settings") == settings_table()


def test_make_has_the_targets_that_are_named() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^\$ make ([a-z-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_named_files_exist() -> None:
    for path, heading in re.findall(r"\]\(([^):#]+)(?:#([^)]+))?\)", README):
        assert (ROOT / path).exists(), path
        if heading:
            headings = re.findall(r"^#+ (.+)", (ROOT / path).read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}


def test_demo_ends_well() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "demo"], cwd=ROOT, env=environment(None, {}), capture_output=True, text=True
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "Everything is as it should be" in done.stdout
    assert "NOT TRUE" not in done.stdout


def test_sample_output_is_what_is_printed(database: Database) -> None:
    create_table(database)
    load(database, real_rows(256))

    printed = alembic(database, "upgrade", "head").stderr

    missing = [line for line in block("sample: upgrade").splitlines() if shape(line) not in shape(printed)]
    assert not missing, printed


def test_sample_of_check_is_what_is_printed(database: Database) -> None:
    create_table(database)
    load(database, real_rows(256))
    database.run("CREATE EXTENSION vector")

    printed = om(database, "check").stdout

    missing = [line for line in block("sample: check", OPERATING).splitlines() if shape(line) not in shape(printed)]
    assert not missing, printed


def test_sample_of_verify_is_what_is_printed(database: Database) -> None:
    create_table(database)
    load(database, real_rows(256))
    alembic(database, "upgrade", "head", env={"OM_INDEX": "hnsw"})

    printed = om(database, "verify").stdout

    # which settings are tried, and which is the fastest that finds enough, is chance
    always = [
        line for line in block("sample: verify", OPERATING).splitlines() if not re.search("hnsw.ef_search|100 %", line)
    ]
    missing = [line for line in always if shape(line) not in shape(printed)]
    assert not missing, printed
    assert "hnsw.ef_search = 40" in printed


@pytest.mark.slow
def test_samples_of_the_cutover_are_what_is_printed(database: Database) -> None:
    create_table(database)
    load(database, real_rows(256))
    om(database, "upgrade")

    printed = om(database, "cutover", "upgrade", "-x", "cutover=swap").stderr + om(database, "status").stdout

    samples = block("sample: cutover", OPERATING) + "\n" + block("sample: status after the cutover", OPERATING)
    missing = [line for line in samples.splitlines() if shape(line) not in shape(printed)]
    assert not missing, printed


def test_commands_that_are_named_are_there() -> None:
    from openmemory_migrations.cli import COMMANDS

    for text in (README, OPERATING):
        for name in re.findall(r"`openmemory-migrations ([a-z]+)", text):
            assert name in COMMANDS, name
    for name in set(COMMANDS) - {"upgrade", "downgrade", "current", "sql"}:
        assert f"openmemory-migrations {name}" in README, name


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The two files, as they are shown."""
    ini, env = re.search(r"```ini\n(.*?)```\s*```python\n(.*?)```", README, re.DOTALL).groups()  # type: ignore[union-attr]
    (tmp_path / "alembic").mkdir()
    (tmp_path / "alembic.ini").write_text(ini)
    (tmp_path / "alembic" / "env.py").write_text(env)
    return tmp_path


def run(command: str, project: Path, database: Database) -> None:
    words = command.split()
    settings = dict(word.split("=") for word in words if word.startswith("OM_"))
    done = subprocess.run(
        [sys.executable, "-m", *words[len(settings) :]],
        cwd=project,
        env=environment(database, settings),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_project_of_two_files_migrates_as_shown(database: Database, project: Path) -> None:
    create_table(database)
    load(database, real_rows(256))

    for command in commands("Five minutes"):
        if not command.startswith("alembic"):
            continue
        run(command, project, database)
        if "upgrade" in command:
            assert not mismatches(database)
    assert not database.rows("SELECT FROM information_schema.columns WHERE column_name = 'v_vector'")


@pytest.mark.slow
def test_the_last_step_as_shown(database: Database, project: Path) -> None:
    create_table(database)
    load(database, real_rows(256))
    before = checksum(database)
    run("alembic upgrade head", project, database)
    swap, drop, back = commands("The last step: one column")

    for command, column in ((swap, "v"), (drop, "v_vector")):
        run(command, project, database)
        assert column_type(database, column) == "vector(256)"
        run(back, project, database)
        assert checksum(database) == before


def test_several_processes_as_shown(database: Database) -> None:
    create_table(database)
    load(database, real_rows(256))

    for command in commands("Large tables"):
        program, *args = command.split()
        done = subprocess.run(
            [sys.executable, "-m", program.replace("-", "_"), *args],
            cwd=ROOT,
            env=environment(database, {}),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert not mismatches(database)


@pytest.mark.parametrize("version", re.findall(r"PostgreSQL (\d\d) or newer", README))
def test_oldest_server_is_the_one_that_is_checked(version: str) -> None:
    from openmemory_migrations.steps import requirements

    assert int(version) * 10_000 == requirements.OLDEST_SERVER


if __name__ == "__main__":
    print(settings_table())
