"""pg_dump and pg_restore: found, called without a password on their command line, and watched."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit, urlunsplit

from llm_orchestrator.errors import ConfigError, StoreError
from llm_orchestrator.telemetry.redact import redact

_PLACES = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/opt/homebrew/opt/postgresql@*/bin")
_VERSION = re.compile(r"(\d+)(?:\.\d+)?")
_SAID_MAX = 2_000


class Target(NamedTuple):
    """A database for libpq's programs: the address without password, and the password beside it."""

    dsn: str
    environment: Mapping[str, str]


def target_of(dsn: str, database: str = "") -> Target:
    """`dsn` for a program; of another database of the same server when one is named."""
    parts = urlsplit(dsn)
    user, at, place = parts.netloc.rpartition("@")
    name, colon, password = user.partition(":")
    path = f"/{database}" if database else parts.path
    bare = urlunsplit((parts.scheme, f"{name}{at}{place}", path, parts.query, ""))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PGOPT")}
    if colon:
        environment["PGPASSWORD"] = unquote(password)
    return Target(bare, environment)


async def find(name: str, major: int) -> str:
    """The path of a program that is at least of the server's major version.

    Raises ConfigError: there is none, or only older ones, which refuse newer servers.
    """
    found: dict[int, str] = {}
    for path in await asyncio.to_thread(_candidates, name):
        with contextlib.suppress(StoreError, OSError):
            said = await run([path, "--version"], os.environ)
            if (version := _VERSION.search(said)) is not None:
                found.setdefault(int(version[1]), path)
    fitting = [version for version in found if version >= major]
    if fitting:
        return found[min(fitting)]
    there = f"only {', '.join(map(str, sorted(found)))}" if found else "none"
    raise ConfigError(
        f"{name} of PostgreSQL {major} or later is needed, there is {there}",
        hint=f"apt-get install postgresql-client-{major}, or put it on the PATH",
    )


def _candidates(name: str) -> list[str]:
    found = [shutil.which(name) or ""]
    for place in _PLACES:
        found += [str(path / name) for path in Path("/").glob(place[1:])]
    return [path for path in dict.fromkeys(found) if path and Path(path).exists()]


async def run(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """What it says on stdout. Ends it when we are cancelled. Raises StoreError: what it said."""
    process = await asyncio.create_subprocess_exec(
        *command,
        env=dict(environment),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, said = await process.communicate()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise
    if process.returncode:
        text = redact(said.decode(errors="replace").strip())[-_SAID_MAX:]
        raise StoreError(f"{Path(command[0]).name} failed: {text or process.returncode}")
    return out.decode(errors="replace")
