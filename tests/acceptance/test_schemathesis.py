"""The running server does what its committed document says, for right requests and for wrong ones.

schemathesis makes requests from docs/reference/openapi.json: the edges of every schema, random
right and wrong ones, and sequences in which one answer feeds the next request. All its checks are
on (schemathesis.toml says what is known of single operations, and why). It plays the same requests
every time; a longer play: EXAMPLES=300 .venv/bin/pytest tests/acceptance/test_schemathesis.py
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import string
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import store_url  # noqa: F401 (a fixture: the store of each kind)
from tests.server.support import ECHO, TOKEN, WAITS, Site, make_config, serve

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "reference" / "openapi.json"
EXAMPLES = int(os.environ.get("EXAMPLES", "8"))
ALONE = {"admin_maintenance_enable", "admin_node_drain"}


def operations() -> set[str]:
    document = json.loads(DOCUMENT.read_text())
    return {each["operationId"] for path in document["paths"].values() for each in path.values()}


async def prepared(site: Site) -> dict[str, str]:
    """What requests may refer to: two workflows, a run that waits, one that has ended."""
    await site.register(ECHO)
    await site.register(WAITS)
    waiting = (await site.execute("waits", wait=0))["run_id"]
    ended = (await site.execute("echo", {"topic": "x"}))["run_id"]
    await site.until(waiting, "waiting")
    return {"WAITING": waiting, "ENDED": ended, "NODE": site.serving.name}


async def play(site: Site, folder: Path, *, but: set[str]) -> str:
    """Run schemathesis on all operations but some; what it printed. Anything found fails."""
    facts = {**await prepared(site), "TOKEN": TOKEN, "EXAMPLES": str(EXAMPLES)}
    template = string.Template((Path(__file__).parent / "schemathesis.toml").read_text())
    (folder / "schemathesis.toml").write_text(template.substitute(facts))
    leave_out = [word for name in sorted(but) for word in ("--exclude-operation-id", name)]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "schemathesis.cli", "run", str(DOCUMENT)),
        *("--url", site.serving.url, *leave_out),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    printed = (await process.communicate())[0].decode()
    assert process.returncode == 0, printed[printed.find("\n====") :]
    return printed


def said(pattern: str, printed: str) -> Any:
    found = re.search(pattern, printed)
    assert found is not None, printed
    return found.groups()


@pytest.mark.timeout(60 + 40 * EXAMPLES)
async def test_the_server_does_what_its_document_says(
    store_url: str,  # noqa: F811 (the fixture)
    tmp_path: Path,
) -> None:
    async with serve(make_config(store_url, tmp_path)) as site:
        printed = await play(site, tmp_path, but=ALONE)
    assert int(said(r"Tested: (\d+)", printed)[0]) == len(operations() - ALONE)
    assert [
        said(rf"(\S+) +{phase}", printed)[0] for phase in ("Coverage", "Fuzzing", "Stateful")
    ] == ["✅"] * 3
    assert (
        int(said(r"(\d+) generated", printed)[0]) > 50 * len(operations()) * min(EXAMPLES, 8) // 10
    )


@pytest.mark.timeout(60 + 40 * EXAMPLES)
async def test_operations_that_refuse_new_runs_do_so_as_documented(tmp_path: Path) -> None:
    config = make_config(f"sqlite:///{tmp_path / 'runs.db'}", tmp_path)
    async with serve(config) as site:
        printed = await play(site, tmp_path, but=operations() - ALONE)
    assert int(said(r"Tested: (\d+)", printed)[0]) == len(ALONE)
