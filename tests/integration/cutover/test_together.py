"""The cutover beside other runs: whoever comes second waits, and finds the table as the first has left it."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from demo.openmemory import TABLE
from tests.support.cutover import DOWN, STAMP, UNDO, UP, changed, stamped, table, whole
from tests.support.interruption import holding, waits_for_a_lock
from tests.support.openmemory import Database
from tests.support.running import running
from tests.support.sessions import eventually
from tests.support.states import HEAD, column_type, stamp

__all__ = ["table"]  # a fixture

pytestmark = pytest.mark.slow  # many processes: .ci/run has the time

WAITING = "waiting for another run on the chain of"
SAID = f'"public.{TABLE}" was cut over'


def test_whatever_comes_during_a_cutover_or_its_undoing_waits_for_its_end(table: Database) -> None:
    before = whole(table)
    env = {"OM_CUTOVER": "drop"}
    for first, others in (
        (UP, [(UP, 0, ""), (("upgrade", "head"), 0, ""), (("downgrade", "base"), 255, UNDO)]),
        (DOWN, [(DOWN, 0, ""), (("upgrade", "head"), 0, "")]),
    ):
        with ExitStack() as stack:
            with holding(table, "ACCESS SHARE"):
                run = stack.enter_context(running(table, *first, env=env))
                eventually(lambda: waits_for_a_lock(table, ""))
                runs = [stack.enter_context(running(table, *command, env=env)) for command, *_ in others]
                for waiting in runs:
                    waiting.says(WAITING)
            assert run.ends() == 0, run.log
            assert [one.ends() for one in runs] == [code for _, code, _ in others], [one.log for one in runs]
            assert all(said in one.log for one, (*_, said) in zip(runs, others, strict=True))
        assert stamp(table) == [HEAD]
        if first == UP:
            assert stamped(table) == [STAMP]
            assert column_type(table, "v") is None
    assert not changed(before, whole(table))
