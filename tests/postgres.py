"""A real PostgreSQL for tests: one server of this machine's own package, started, stopped or killed at will.

Needs `initdb` and `postgres`, on the path or where Debian's package `postgresql` puts them. The server refuses to run
as root, so started by root it runs as `postgres` or `nobody`. It asks for a password like a real one.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import psycopg

from tests.kafka import free_port

START_SECONDS = 60.0
USER = "trimtab"
PASSWORD = "not-to-be-shown"


class PostgresUnavailable(Exception):
    """This machine lacks PostgreSQL; the message says what to install."""


class PostgresFailed(Exception):
    """The server did not come up; the message ends with its log."""


class PostgresServer:
    """One server on a free port of 127.0.0.1, whose files go when it is stopped.

    Args:
        safe: flush to the disk as it does where it is installed; a test kills the server and not the machine.

    Raises:
        PostgresUnavailable: from the constructor, when its programs are not here.
    """

    def __init__(self, *, safe: bool = False) -> None:
        self._safe = safe
        self._programs = {name: _program(name) for name in ("initdb", "postgres")}
        self._identity = _identity()
        # Not below pytest's own folder, which only its owner may enter.
        self.directory = Path(tempfile.mkdtemp(prefix="trimtab-postgres-"))
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> PostgresServer:
        """Start it, for the first time or again with what it had, and wait until it answers.

        Raises:
            PostgresFailed: it does not.
        """
        data, log = self.directory / "data", self.directory / "log"
        if not data.exists():
            self._create(data)
        options = {"listen_addresses": "127.0.0.1", "port": self.port, "unix_socket_directories": ""}
        if not self._safe:
            options |= {"fsync": "off", "full_page_writes": "off", "shared_buffers": "64MB"}
        arguments = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                [self._programs["postgres"], "-D", str(data), *arguments],
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=self.directory,
                start_new_session=True,
                **self._identity,
            )
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                psycopg.connect(self._conninfo("postgres"), connect_timeout=2).close()
                return self
            except psycopg.OperationalError as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise PostgresFailed(f"{error}\n{log.read_text()[-4_000:]}") from error
                time.sleep(0.05)

    def database(self) -> str:
        """A new, empty database; returns its URL, password and all."""
        name = f"t{uuid.uuid4().hex[:12]}"
        self.execute(f"CREATE DATABASE {name}")
        return f"postgresql+psycopg://{USER}:{PASSWORD}@127.0.0.1:{self.port}/{name}"

    def drop(self, url: str) -> None:
        """Let go of a database, whoever is still connected to it."""
        self.execute(f"DROP DATABASE IF EXISTS {url.rpartition('/')[2]} WITH (FORCE)")

    def execute(self, statement: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """One statement on its own; what it returns, if anything."""
        with psycopg.connect(self._conninfo(database), autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def halt(self) -> None:
        """End the server at once, every connection with it; `start` brings it back with what was committed."""
        assert self._process is not None
        # SIGQUIT is its immediate shutdown: after kill -9 of the first process the others would outlive it for a while.
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait(120)

    def stop(self) -> None:
        """End the server and delete its files."""
        if self._process is not None and self._process.poll() is None:
            self.halt()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _conninfo(self, database: str) -> str:
        return f"host=127.0.0.1 port={self.port} user={USER} password={PASSWORD} dbname={database}"

    def _create(self, data: Path) -> None:
        secret = self.directory / "password"
        secret.write_text(PASSWORD)
        if self._identity:
            for path in (self.directory, secret):
                os.chown(path, self._identity["user"], self._identity["group"])
        made = subprocess.run(
            [
                *(self._programs["initdb"], "--pgdata", str(data), "--username", USER, "--pwfile", str(secret)),
                *("--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C", "--no-sync"),
            ],
            capture_output=True,
            text=True,
            cwd=self.directory,
            check=False,
            **self._identity,
        )
        secret.unlink()
        if made.returncode:
            raise PostgresFailed(made.stdout + made.stderr)


def _program(name: str) -> str:
    """Where a program of the server lies; the newest of Debian's, where it is not on the path."""
    found = shutil.which(name)
    if found is not None:
        return found
    packaged = sorted(
        Path("/usr/lib/postgresql").glob(f"*/bin/{name}"),
        key=lambda path: [int(number) for number in re.findall(r"\d+", path.parts[-3])],
    )
    if packaged:
        return str(packaged[-1])
    raise PostgresUnavailable(f"{name} is not here: install the Debian package postgresql")


def _identity() -> dict[str, Any]:
    """Whom the server runs as: nobody else, or another than root."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            user = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    raise PostgresUnavailable("PostgreSQL does not run as root, and this machine has no user postgres or nobody")
