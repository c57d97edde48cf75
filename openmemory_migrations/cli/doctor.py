"""Says what is wrong with the Alembic set-up of a host application, and which line mends it.

Three things are looked at: the configuration, the history of revisions, and what env.py does when it runs. Findings
go to stdout in PostgreSQL's manner: `error` keeps the steps from working, `warning` is a trap, `notice` good to know.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

from alembic.config import Config

from ..errors import UsageError
from ..finding import Finding
from ..hosts import env_py, history, probe, project
from . import output

UNREADABLE = ("history-unreadable", "env-fails", "no-connection")  # the rest can't be told then: exit code 2


def arguments(parser: argparse.ArgumentParser) -> None:
    project.arguments(parser)
    output.arguments(parser)


def run(options: argparse.Namespace) -> int:
    config = project.configuration(options)
    if config is None:
        raise UsageError(
            f"there is neither an ini file with a section [{options.name}] nor a [tool.alembic] in pyproject.toml here",
            hint="Run this in the host's folder, or name its configuration with --config.",
        )
    found = examine(config)
    output.write(options, {"findings": [asdict(one) for one in found]}, [("", one) for one in found])
    if not (found or options.quiet):  # not by the logger, with which env.py may have done anything
        print("NOTICE:  nothing is wrong", file=sys.stderr)
    if any(one.code in UNREADABLE for one in found):
        return 2
    return 1 if any(one.severity == "error" for one in found) else 0


def examine(config: Config) -> list[Finding]:
    """Every finding about the set-up that `config` describes; runs its env.py. Raises UsageError."""
    script = project.script_directory(config)
    # env.py first: it may put on sys.path what the revisions import
    observed = probe.run(config, script)
    found = list(history.places(config, script, project.locations(script)))
    scripts = None
    try:
        scripts = project.revisions(script)
    except Exception as error:
        found.append(history.unreadable(error))
    if scripts is not None:
        found += history.revisions(script, scripts, blamed=any(one.code.startswith("location") for one in found))
    found += env_py.whole(observed, guarded=any(map(history.asks_for_engine, scripts or [])))
    for seen in observed.seen:
        found += env_py.database(seen, several=len(observed.seen) > 1)
        found += history.version_table(seen, scripts)
    return list(dict.fromkeys(found))  # several databases may have the same to say


__all__ = ["arguments", "examine", "run"]
