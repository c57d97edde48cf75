"""What the tests of `openmemory-migrations check` share: one run of it, its exit code and what it must not do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tests.support.commands import NOTHING, om
from tests.support.openmemory import Database
from tests.support.states import snapshot

Found = dict[str, Any]

# nothing of a trial: neither its table nor its stage, in whatever session's schema
LEFT = "SELECT relname FROM pg_class WHERE relname LIKE 'openmemory\\_migrations\\_%'"


def check(database: Database, code: int, *args: str, env: Mapping[str, str] = NOTHING) -> Found:
    """Run it with --json and see that its exit code, its verdict and its findings say the same, without a traceback."""
    done = om(database, "check", "--json", *args, env=env)

    assert done.returncode == code, done.log
    assert "Traceback" not in done.log, done.log
    found: Found = json.loads(done.stdout)
    assert found["migratable"] == (code == 0)
    assert ("error" in severities(found).values()) == (code == 1)
    return found


def unchanged(database: Database, code: int, *args: str, env: Mapping[str, str] = NOTHING) -> Found:
    """The same, and see that it has left everything as it was."""
    before = snapshot(database)

    found = check(database, code, *args, env=env)

    assert snapshot(database) == before
    assert database.rows(LEFT) == []
    return found


def severities(found: Found) -> dict[str, str]:
    """By code, without what is said of pgvector's release, which differs from server to server."""
    return {one["code"]: one["severity"] for one in found["findings"] if not one["code"].startswith("pgvector-")}


def finding(found: Found, code: str) -> Found:
    (one,) = (one for one in found["findings"] if one["code"] == code)
    return dict(one)
