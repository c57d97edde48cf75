"""TLS by OM_PG_SSL as OpenMemory means it, against a server with a certificate: Debian's, as the wheel's has no TLS."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg2
import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError

from demo.openmemory import environment
from openmemory_migrations import embedded
from openmemory_migrations.db.connections import engine_for, url_of
from openmemory_migrations.settings import Settings
from tests.support.commands import ROOT, alembic
from tests.support.openmemory import Database, create_database, create_table, drop_database
from tests.support.servers import OPTIONS

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: float(path.parts[-3]))
PASSWORD = "pa55-of-mine"

pytestmark = [
    pytest.mark.tls,
    pytest.mark.skipif(not PROGRAMS, reason="no PostgreSQL with TLS: /usr/lib/postgresql/*/bin/postgres is not there"),
    pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl command to make certificates with"),
]


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]


@pytest.fixture(scope="module")
def certificates() -> Iterator[Path]:
    """ca.pem signed server.pem, which is for localhost; other.pem has signed nothing."""
    with tempfile.TemporaryDirectory(prefix="om-tls-") as name:
        folder = Path(name)
        for ca in ("ca", "other"):
            subject = f"/CN=openmemory-migrations test {ca}"
            files = ["-keyout", f"{ca}.key", "-out", f"{ca}.pem"]
            openssl(folder, "req", "-x509", *KEY, *files, "-days", "2", "-subj", subject)
        (folder / "extensions").write_text("subjectAltName=DNS:localhost\n")
        openssl(folder, "req", *KEY, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=localhost")
        signed = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "extensions"]
        openssl(folder, "x509", "-req", "-in", "server.csr", *signed, "-out", "server.pem")
        (folder / "server.key").chmod(0o600)
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(folder / "server.key", nobody.pw_uid, nobody.pw_gid)
        (folder / "not-pem.pem").write_text("not a certificate\n")
        folder.chmod(0o755)
        yield folder


@pytest.fixture(scope="module")
def tls_server(certificates: Path) -> Iterator[embedded.Server]:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    tls = {
        "ssl": "on",
        "ssl_cert_file": str(certificates / "server.pem"),
        "ssl_key_file": str(certificates / "server.key"),
    }
    options = OPTIONS | tls | {"listen_addresses": "127.0.0.1", "port": port}
    with embedded.temporary(bin=PROGRAMS[-1].parent, options=options) as server:
        yield server


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of nobody's, where libpq looks for certificates, and none of the caller's settings for TLS."""
    for name in os.environ:
        if name.startswith(("PG", "SSL_CERT_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def settings(server: embedded.Server, mode: str, ca: Path | None = None, host: str = "localhost") -> dict[str, str]:
    return {
        "OM_PG_HOST": host,
        "OM_PG_PORT": server.options["port"],
        "OM_PG_DB": "postgres",
        "OM_PG_USER": "postgres",
        "OM_PG_PASSWORD": PASSWORD,
        "OM_PG_SSL": mode,
    } | ({"OM_PG_SSL_CA": str(ca)} if ca else {})


def encrypted(env: dict[str, str]) -> bool:
    """Whether the server says that a connection with these settings is; raises OperationalError if there is none."""
    found = url_of(Settings.load({}, env))
    assert found is not None
    with engine_for(found).connect() as connection:
        return bool(connection.execute(sa.text("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")).scalar())


def refused(env: dict[str, str]) -> str:
    with pytest.raises(OperationalError) as raised:
        encrypted(env)
    return str(raised.value.orig)


def trust(home: Path, ca: Path) -> None:
    (home / ".postgresql").mkdir()
    shutil.copy(ca, home / ".postgresql" / "root.crt")


@pytest.mark.parametrize(("mode", "expected"), [("disable", False), ("require", True)])
def test_tls_is_as_configured_whatever_libpqs_own_variables_say(
    tls_server: embedded.Server, mode: str, expected: bool, monkeypatch: pytest.MonkeyPatch, certificates: Path
) -> None:
    assert encrypted(settings(tls_server, mode)) is expected

    monkeypatch.setenv("PGSSLMODE", "disable" if expected else "require")
    monkeypatch.setenv("PGSSLROOTCERT", str(certificates / "other.pem"))
    assert encrypted(settings(tls_server, mode)) is expected


def test_without_a_setting_there_is_no_tls(tls_server: embedded.Server) -> None:
    assert encrypted(settings(tls_server, "")) is False


def test_require_accepts_any_certificate_even_where_libpq_would_verify(
    tls_server: embedded.Server, certificates: Path, home: Path
) -> None:
    trust(home, certificates / "other.pem")
    plain = f"host=localhost port={tls_server.options['port']} user=postgres dbname=postgres sslmode=require"
    with pytest.raises(psycopg2.OperationalError, match="certificate verify failed"):
        psycopg2.connect(plain)

    assert encrypted(settings(tls_server, "require"))
    assert encrypted(settings(tls_server, "require", certificates / "other.pem", host="127.0.0.1"))


def test_verify_full_accepts_the_name_that_the_ca_has_signed(tls_server: embedded.Server, certificates: Path) -> None:
    assert encrypted(settings(tls_server, "verify-full", certificates / "ca.pem"))


@pytest.mark.parametrize(
    ("ca", "host", "because"),
    [
        pytest.param("ca.pem", "127.0.0.1", 'does not match host name "127.0.0.1"', id="another name"),
        pytest.param("other.pem", "localhost", "certificate verify failed", id="another CA"),
        pytest.param("server.key", "localhost", "could not read root certificate file", id="no certificate"),
        pytest.param("not-pem.pem", "localhost", "could not read root certificate file", id="no PEM"),
        pytest.param(None, "localhost", "certificate verify failed", id="system authorities"),
    ],
)
def test_verify_full_refuses_what_it_cannot_verify(
    tls_server: embedded.Server, certificates: Path, ca: str | None, host: str, because: str
) -> None:
    assert because in refused(settings(tls_server, "verify-full", certificates / ca if ca else None, host))


def test_verify_full_without_a_ca_does_not_ask_the_home_folder(
    tls_server: embedded.Server, certificates: Path, home: Path
) -> None:
    trust(home, certificates / "ca.pem")

    assert "certificate verify failed" in refused(settings(tls_server, "verify-full"))


def test_verify_full_without_a_ca_honours_ssl_cert_file(
    tls_server: embedded.Server, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "ca.pem"))
    assert encrypted(settings(tls_server, "verify-full"))
    assert "does not match host name" in refused(settings(tls_server, "verify-full", host="127.0.0.1"))

    monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "other.pem"))
    assert "certificate verify failed" in refused(settings(tls_server, "verify-full"))


def test_verify_full_without_a_ca_trusts_the_systems_authorities(
    tls_server: embedded.Server, certificates: Path
) -> None:
    """Our CA in the place of the system's file, for one process that has a view of its own of the file system."""
    system = ssl.get_default_verify_paths().cafile
    private = ["unshare", "--map-root-user", "--mount"]
    if system is None:
        pytest.skip("this Python knows of no file with the system's authorities")
    if not shutil.which("unshare") or subprocess.run([*private, "true"], capture_output=True).returncode:
        pytest.skip("no right to a mount of one's own")

    def current(in_place: str, configured: str | None = None) -> str:
        mounted = ["sh", "-ec", 'mount --bind "$0" "$1"; shift; exec "$@"', str(certificates / in_place), system]
        env = settings(tls_server, "verify-full", Path(configured) if configured else None)
        done = subprocess.run(
            [*private, *mounted, sys.executable, "-m", "alembic", "current"],
            cwd=ROOT,
            env=environment(None, env),
            capture_output=True,
            text=True,
        )
        return done.stderr if done.returncode else "connected"

    assert current("ca.pem", configured=system) == "connected"
    assert "certificate verify failed" in current("other.pem")
    assert current("ca.pem") == "connected"


@pytest.mark.parametrize("mode", ["disable", "require", "verify-full"])
def test_a_socket_has_no_tls_and_needs_none(tls_server: embedded.Server, certificates: Path, mode: str) -> None:
    env = settings(tls_server, mode, certificates / "ca.pem", str(tls_server.socket_dir))

    assert encrypted(env) is False


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("sslmode=disable", False),
        ("sslmode=require", True),
        ("sslmode=verify-full&sslrootcert={ca}", True),
    ],
)
def test_a_url_says_itself_what_tls_it_wants(
    tls_server: embedded.Server, certificates: Path, query: str, expected: bool
) -> None:
    url = f"postgresql://postgres@localhost:{tls_server.options['port']}/postgres?" + query
    env = {"OM_DATABASE_URL": url.format(ca=certificates / "ca.pem")}

    assert encrypted(env | settings(tls_server, "disable" if expected else "require")) is expected


def test_the_command_runs_over_verified_tls_and_says_why_it_cannot(
    tls_server: embedded.Server, certificates: Path
) -> None:
    alembic(None, "current", env=settings(tls_server, "verify-full", certificates / "ca.pem"))

    for env, because in (
        (settings(tls_server, "verify-full", certificates / "other.pem"), "certificate verify failed"),
        (
            settings(tls_server, "verify-full", certificates / "none.pem"),
            f'OM_PG_SSL_CA names "{certificates}/none.pem"',
        ),
    ):
        result = alembic(None, "current", env=env, check=False)

        assert result.returncode != 0
        assert because in result.stdout.partition("FAILED: ")[2]
        assert "Traceback" not in result.log
        assert PASSWORD not in result.log


def test_without_pgvector_the_upgrade_is_refused_before_any_change(
    tls_server: embedded.Server, certificates: Path
) -> None:
    admin = Database("postgres", tls_server.url())
    if admin.rows("SELECT FROM pg_available_extensions WHERE name = 'vector'"):
        pytest.skip("this server has pgvector")
    database = create_database(tls_server, "without_pgvector")
    try:
        create_table(database)
        everything = "SELECT relname FROM pg_class UNION ALL SELECT proname FROM pg_proc ORDER BY 1"
        before = database.rows(everything)
        env = settings(tls_server, "verify-full", certificates / "ca.pem") | {"OM_PG_DB": database.name}

        result = alembic(None, "upgrade", "head", env=env, check=False)

        assert result.returncode != 0
        first, hint = result.log.partition("FAILED: ")[2].splitlines()[:2]
        assert first == 'extension "vector" is not available on this server'
        assert "CREATE EXTENSION vector;" in hint
        assert "Traceback" not in result.log
        assert database.rows(everything) == before
        assert alembic(None, "current", env=env).stdout == ""
    finally:
        drop_database(tls_server, database.name)
