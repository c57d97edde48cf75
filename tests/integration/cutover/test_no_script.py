"""The cutover runs online only: with --sql it says which command to run, and prints no part of a script."""

from __future__ import annotations

import pytest

from tests.support.commands import alembic, om

NO_SCRIPT = "the cutover has no script (--sql), it runs online only"
WHERE = {
    "upgrade": "alembic -n cutover upgrade head, or openmemory-migrations cutover upgrade",
    "downgrade": "alembic -n cutover downgrade base, or openmemory-migrations cutover downgrade",
}


# whatever is set: nobody is to look for a setting that is missing for a script that there isn't
@pytest.mark.parametrize("env", [{}, {"OM_VEC_DIM": "8", "OM_CUTOVER": "swap"}], ids=["", "all is set"])
@pytest.mark.parametrize("command", [("upgrade", "head"), ("downgrade", "head:base")], ids=WHERE)
def test_alembic_says_which_command_to_run(command: tuple[str, str], env: dict[str, str]) -> None:
    result = alembic(None, "-n", "cutover", *command, "--sql", env=env, check=False)

    assert result.returncode != 0
    # Alembic itself prints that line to stdout
    assert result.stdout == (
        f"FAILED: {NO_SCRIPT}\nHINT:  Run it online: {WHERE[command[0]]} (in a chain of the host's, the same command"
        " without --sql).\n"
    )
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("do", ["upgrade", "downgrade", "current"])
def test_the_console_script_says_so_as_a_wrong_use(do: str) -> None:
    result = om(None, "cutover", do, "--sql", env={"OM_VEC_DIM": "8", "OM_CUTOVER": "swap"})

    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == f"ERROR:  {NO_SCRIPT}\nHINT:  Run it online: openmemory-migrations cutover {do}.\n"
