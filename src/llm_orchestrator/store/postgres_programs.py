"""pg_dump and pg_restore: found, called without a password on their command line, and watched."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit, urlunsplit

from llm_orchestrator.errors import ConfigError, StoreError
from llm_orchestrator.telemetry.redact import redact

_PLACES = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/opt/homebrew/opt/postgresql@*/bin")
_VERSION = re.compile(r"(\d+)(?:\.\d+)?")
_SAID_MAX = 2_000
_PIECE_BYTES = 1 << 18


class Target(NamedTuple):
    """A database as libpq's programs are told of it: no password in the words of a command."""

    dsn: str
    inherited: tuple[int, ...] = ()
    """Descriptors that the program must inherit: the password, in memory."""


@contextlib.contextmanager
def reached(dsn: str, database: str = "") -> Iterator[Target]:
    """`dsn` for a program; of another database of the same server when one is named.

    The password is handed over as libpq's `passfile`, which is memory here: no file is left.
    """
    parts = urlsplit(dsn)
    user, at, place = parts.netloc.rpartition("@")
    name, colon, password = user.partition(":")
    path = f"/{database}" if database else parts.path
    if not colon:
        yield Target(urlunsplit((parts.scheme, parts.netloc, path, parts.query, "")))
        return
    memory = os.memfd_create("pgpass")
    try:
        os.fchmod(memory, 0o600)
        plain = unquote(password).replace("\\", "\\\\").replace(":", "\\:")
        os.write(memory, f"*:*:*:*:{plain}\n".encode())
        query = "&".join(filter(None, (parts.query, f"passfile=/proc/self/fd/{memory}")))
        bare = urlunsplit((parts.scheme, f"{name}{at}{place}", path, query, ""))
        yield Target(bare, (memory,))
    finally:
        os.close(memory)


NEW_RESTORE = 17
"""From this version on pg_restore sends a setting that older servers refuse."""


async def find(name: str, major: int) -> str:
    """The path of a program that is at least of the server's major version.

    Raises ConfigError: there is none, or only older ones, which refuse newer servers; or pg_restore
    is so new that the server refuses it.
    """
    is_bounded = name == "pg_restore" and 0 < major < NEW_RESTORE
    found: dict[int, str] = {}
    for path in await asyncio.to_thread(_candidates, name):
        with contextlib.suppress(StoreError, OSError):
            said = await run([path, "--version"])
            if (version := _VERSION.search(said)) is not None:
                found.setdefault(int(version[1]), path)
    fitting = [
        version
        for version in found
        if version >= major and not (is_bounded and version >= NEW_RESTORE)
    ]
    if fitting:
        return found[min(fitting)]
    there = f"only {', '.join(map(str, sorted(found)))}" if found else "none"
    raise ConfigError(
        f"{name} of PostgreSQL {major} or later"
        + (f", before {NEW_RESTORE}," if is_bounded else "")
        + f" is needed, there is {there}",
        hint=f"apt-get install postgresql-client-{major}, or put it on the PATH",
    )


def _candidates(name: str) -> list[str]:
    found = [shutil.which(name) or ""]
    for place in _PLACES:
        found += [str(path / name) for path in Path("/").glob(place[1:])]
    return [path for path in dict.fromkeys(found) if path and Path(path).exists()]


async def run(command: Sequence[str], *, inherited: Sequence[int] = ()) -> str:
    """What it says on stdout. Ends it when we are cancelled. Raises StoreError: what it said."""
    said: list[bytes] = []

    async def keep(piece: bytes) -> None:
        said.append(piece)

    await pour(command, keep, inherited=inherited)
    return b"".join(said).decode(errors="replace")


async def pour(
    command: Sequence[str],
    take: Callable[[bytes], Awaitable[None]],
    *,
    inherited: Sequence[int] = (),
) -> None:
    """Give `take` what a program says on stdout, as it comes and no faster. Raises as `run`."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        pass_fds=tuple(inherited),
        limit=_PIECE_BYTES,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    complaining = asyncio.create_task(process.stderr.read())
    try:
        while piece := await process.stdout.read(_PIECE_BYTES):
            await take(piece)
        complaint = await complaining
        await process.wait()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        await asyncio.gather(complaining, return_exceptions=True)
        raise
    if process.returncode:
        text = redact(complaint.decode(errors="replace").strip())[-_SAID_MAX:]
        raise StoreError(f"{Path(command[0]).name} failed: {text or process.returncode}")
