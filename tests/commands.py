"""The console script, started as a user does, in a folder with nothing in it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping

from demo.openmemory import environment

from .helpers import NOTHING, Database, Result
from .interruption import result


def start_om(database: Database | None, *args: str, env: Mapping[str, str] = NOTHING) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "openmemory_migrations", *args],
        cwd=tempfile.gettempdir(),
        env=environment(database, env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def om(database: Database | None, *args: str, env: Mapping[str, str] = NOTHING) -> Result:
    return result(start_om(database, *args, env=env))
