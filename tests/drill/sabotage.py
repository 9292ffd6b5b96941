"""The drill bites: with a guard of ours taken out, the matching scenario must end with exit code 8.

Not part of `make test` (each is a whole drill): `make drill` runs it. A guard is taken out by a
`sitecustomize.py` that every process of the drilled system finds first on its path
(scenario.System.sabotage); nothing in the product knows of it. The same drills pass untouched.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.disaster_recovery.drilling import carry_out

pytestmark = pytest.mark.timeout(600)
SOON = ("limits.recover_s=30", "limits.drain_s=20")
RESTORE_SWAP = """\
import llm_orchestrator.store.sqlite_copy as it
it.SQLiteAside._exchange = it.SQLiteAside._put_over = lambda self, identity: None
"""
"""The restore says that it has exchanged the stores, and has not."""
DUPLICATE_CHECK = """\
import asyncio
import llm_orchestrator.engine.control as control
import llm_orchestrator.engine.node as node
from llm_orchestrator.engine import acceptance

def key_record(new):
    found = acceptance.key_record(new)
    return found.__class__(found.kind, found.key + new.run_id, found.value, 0)

control.key_record = node.key_record = key_record
accept = node.Node.accept

async def slow(self, *given, **more):
    run_id = await accept(self, *given, **more)
    await asyncio.sleep(0.2)
    return run_id

node.Node.accept = slow
"""
"""A key is never known again; and answers are slow, so that one is under way at every moment."""
CHAIN_CHECK = """\
import llm_orchestrator.store.journal as journal
journal.chain_or_none = lambda previous, entry: entry.digest
"""
"""Whatever stands in a journal fits its digest."""
SWITCHES = {
    "restore_swap": ("backup_restore_full", RESTORE_SWAP),
    "duplicate_check": ("application_single_node_restart", DUPLICATE_CHECK),
    "chain_check": ("data_edited_payload", CHAIN_CHECK),
}


def drill(scenario: str, data: Path, *more: str) -> tuple[int, list[str]]:
    """Exit code, and the kinds of what the witness found."""
    code, result = carry_out(scenario, data, *SOON, *more)
    (run,) = result["runs"]
    return code, sorted({finding["kind"] for finding in run["findings"]})


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_guard_that_is_taken_out_is_missed(switch: str, tmp_path: Path) -> None:
    scenario, code = SWITCHES[switch]
    folder = tmp_path / "sabotage"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    found = drill(scenario, tmp_path, f"system.sabotage={folder}")
    assert found[0] == 8, found


def test_an_archive_that_lags_is_missed(tmp_path: Path) -> None:
    found = drill("backup_restore_archive", tmp_path, "system.archive=async")
    assert found[0] == 8, found


@pytest.mark.parametrize("scenario", sorted({name for name, _ in SWITCHES.values()}))
def test_with_all_guards_the_same_drill_passes(scenario: str, tmp_path: Path) -> None:
    code, kinds = drill(scenario, tmp_path, "objectives.recovery_time_s=100")
    assert (code, kinds) == (0, [])
