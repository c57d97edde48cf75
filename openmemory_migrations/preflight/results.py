"""What a check has found out, and what becomes of that which it couldn't."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

from sqlalchemy.exc import DBAPIError

from ..backfill.engines import Chosen
from ..db import locks
from ..db.catalog import Extension, Table
from ..db.replication import Replication
from ..db.signals import Interrupted
from ..db.sqlerrors import DENIED, LOCK_NOT_AVAILABLE, PASSING, as_migration_error, sqlstate
from ..errors import ConnectionLost, MigrationError
from ..finding import Finding
from ..index.choice import NoIndex, Plan
from ..steps.step import Step
from .activity import Connections
from .disk import Growth
from .rows import Bad, Lengths, Sizes
from .trial import Trial


@dataclass
class Facts:
    """What has been found; None is what could not be looked at, for the reason that `findings` give."""

    server: int = 0
    extension: Extension | None = None  # as it is, or as it would be created
    installed: bool = False
    table: Table | None = None
    leaves: int = 0
    ours: bool = False  # there is a column of ours, with whatever is still pending
    revisions: list[str] | None = None
    sizes: Sizes | None = None
    lengths: Lengths | None = None
    bad: Bad = field(default_factory=Bad)
    dimensions: int | None = None
    origin: str = ""
    engine: Chosen | None = None
    shards: int | None = None
    growth: Growth | None = None
    index: Plan | NoIndex | None = None
    memory_kb: int = 0  # that the build of the index gets
    trial: Trial | None = None
    untold: str = "the rows could not be looked at"  # why there is no trial
    connections: Connections | None = None
    replication: Replication | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def errors(self) -> int:
        return sum(one.severity == "error" for one in self.findings)

    @property
    def convertible(self) -> int:
        """Pending rows without those that would be skipped; in a sample, as many as that makes of the whole."""
        if self.lengths is None:
            return 0
        return self.lengths.whole(self.lengths.pending.total() - self.bad.reasons.total())

    def has(self, *codes: str) -> bool:
        return any(one.code in codes for one in self.findings)


def part(step: Step, facts: Facts, code: str, look: Callable[[], None], *, rows: bool = False) -> None:
    """One part of the check: what it refuses, or the server does, becomes a finding, and the next part goes on.

    What looks at `rows` has transactions of its own; the others look at catalogs, whether there is a table or not.
    """
    try:
        with nullcontext() if rows else _catalogs(step):
            look()
    except (Interrupted, ConnectionLost):
        raise
    except MigrationError as error:
        facts.findings.append(Finding.of(code, error))
    except DBAPIError as error:
        step.db.rollback()
        problem = as_migration_error(error, f"looking at {step.target}")
        if problem.exit_code != MigrationError.exit_code and sqlstate(error) not in PASSING:
            raise
        finding = Finding.of(code, problem)
        if sqlstate(error) == LOCK_NOT_AVAILABLE:
            finding = replace(finding, code="locked")
        elif sqlstate(error) == DENIED:
            with step.db.transaction():
                finding = replace(finding, code="rights", hint=step.db.grant)
        # without a trial a migration goes just as well
        facts.findings.append(replace(finding, severity="warning") if code == "trial" else finding)


@contextmanager
def _catalogs(step: Step) -> Iterator[None]:
    """Read-only; each statement sees what is so once it has its locks, and none waits for those longer than a step."""
    db = step.db
    with db.transaction():
        db.run("SET TRANSACTION READ ONLY")
        locks.set_timeout(db, f"{step.settings.lock_timeout_ms}ms")
        yield
