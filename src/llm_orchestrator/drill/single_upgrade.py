"""An upgrade of a SingleTarget whose schema migration fails half way: done by a newer release.

The newer release is a copy of this package in a folder of its own, whose schema has one version
more: a table, and a row with a column that it has not. It is started on the real store in the
node's place. The row's error names the table, so it was made when the migration failed.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import llm_orchestrator
from llm_orchestrator.drill.scenario import Fault
from llm_orchestrator.drill.single_damage import shape_of
from llm_orchestrator.drill.target import Broken, Injected, NotConfirmed
from llm_orchestrator.store.sqlite_file import SCHEMA_VERSION

if TYPE_CHECKING:
    from llm_orchestrator.drill.single import SingleTarget

_COMMAND_S = 120.0
_ADDS = (
    "CREATE TABLE of_newer (number INTEGER PRIMARY KEY)",
    "INSERT INTO of_newer (absent) VALUES (1)",
)
_SAYS = "of_newer has no column"


async def migration_fails(target: SingleTarget, fault: Fault) -> Injected:
    """Stop the node in order, start a newer release whose migration fails, start the node again.

    Confirmed: the newer release has ended with the error of its second statement. Broken: anything
    of the first one is left. t0 is the end of the newer release.
    """
    newer = target.folder / "newer"
    await asyncio.to_thread(_make_newer, newer)
    target.node.hold()
    try:
        code = await target.node.end_with(signal.SIGTERM)
        if code != 0:
            raise NotConfirmed(f"the node ended with {code}, not in order")
        before = await asyncio.to_thread(shape_of, target.store_path)
        code, said = await _serve(target, newer)
        at_s = target.clock.monotonic()
        after = await asyncio.to_thread(shape_of, target.store_path)
    finally:
        target.node.release()
    if code == 0 or _SAYS not in said:
        raise NotConfirmed(f"the newer release ended with {code}: {said[-300:]}")
    if after != before:
        left = sorted(str(each[1]) for each in after.schema - before.schema)
        raise Broken(f"half a migration is left: version {after.version}, {left}")
    evidence = f"a release with schema {before.version + 1} ended with {code}: {_SAYS}"
    return Injected(at_s, f"{evidence}; the file has schema {after.version} and nothing new")


def _make_newer(folder: Path) -> None:
    """Raises NotConfirmed when this package is not as it was when this was written."""
    package = folder / "llm_orchestrator"
    source = Path(llm_orchestrator.__file__).parent
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("__pycache__"))
    module = package / "store" / "sqlite_file.py"
    text = module.read_text()
    version, added = f"SCHEMA_VERSION = {SCHEMA_VERSION}\n", "_ADDED = {"
    if text.count(version) != 1 or text.count(added) != 1:
        raise NotConfirmed(f"{module.name} cannot be made newer")
    number = SCHEMA_VERSION + 1
    begins = tuple(each.partition(" (")[0] for each in _ADDS)
    text = text.replace(version, f"SCHEMA_VERSION = {number}\n")
    module.write_text(text.replace(added, f"{added}{number}: {begins!r}, "))
    with module.with_name("schema_sqlite.sql").open("a") as schema:
        schema.write("".join(f"{each};\n" for each in _ADDS))


async def _serve(target: SingleTarget, newer: Path) -> tuple[int, str]:
    """The newer release in the node's place, until it ends: its exit code and all that it said."""
    environment = target.environment()
    environment["PYTHONPATH"] = os.pathsep.join((str(newer), environment["PYTHONPATH"]))
    process = await asyncio.create_subprocess_exec(
        *("setpriv", "--pdeathsig=KILL", sys.executable, "-m", "llm_orchestrator"),
        *("serve", "--port", target.endpoints[0].rpartition(":")[2]),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=environment,
        cwd=target.folder,
    )
    try:
        said, _ = await asyncio.wait_for(process.communicate(), _COMMAND_S)
    except TimeoutError as error:
        process.kill()
        await process.wait()
        raise NotConfirmed("the newer release serves") from error
    return process.returncode or 0, said.decode(errors="replace")
