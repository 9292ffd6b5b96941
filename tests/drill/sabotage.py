"""The drill bites: with a guard of ours taken out, the matching scenario must end with exit code 8.

Not part of `make test` (each is a whole drill): `make drill` runs it. A guard is taken out by a
`sitecustomize.py` that every process of the drilled system finds first on its path
(scenario.System.sabotage); nothing in the product knows of it. The same drills pass untouched.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.disaster_recovery.drilling import carry_out, needs_root

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
FENCING = """\
from llm_orchestrator.store.base import Outcome
from llm_orchestrator.store.journal import link
from llm_orchestrator.store.postgres_apply import Applier

land = Applier._land
LAST = "SELECT seq, digest FROM journal WHERE run_id = $1 ORDER BY seq DESC LIMIT 1"

async def push(self, appends, posted):
    refused = await land(self, appends, posted)
    for append in appends:
        if refused.get(append.run_id) is Outcome.FENCED and append.entries:
            look = lambda connection, _: connection.fetchrow(LAST, append.run_id)
            seq, digest = await self._try(look, is_commit=False)
            entries = []
            for number, entry in enumerate(append.entries, seq + 1):
                columns = (number, *entry[2:7])
                head = link(entries[-1].digest if entries else digest, append.run_id, columns)
                entries.append(entry._replace(seq=number, digest=head))
            again = append._replace(prev_seq=seq, prev_digest=digest, entries=entries)
            if not await land(self, [again], posted):
                del refused[append.run_id]
    return refused

Applier._land = push
"""
"""Who is fenced off puts its entries behind those of the new owner."""
COMMIT_LOOKUP = """\
from llm_orchestrator.store.postgres_apply import Applier
from llm_orchestrator.store.postgres_lane import Lane

async def landed(self, unsure):
    return True

async def nobody(self, appends, blame, *, is_done=False):
    return {}

Lane.settle, Applier._judge = landed, nobody
"""
"""A commit whose answer was lost is taken for done."""
ON_THE_LAB = {
    "fencing": ("network_partition_both_ways", FENCING),
    "commit_lookup": ("database_connection_loss_black_hole", COMMIT_LOOKUP),
}
SWITCHES = {
    "restore_swap": ("backup_restore_full", RESTORE_SWAP),
    "duplicate_check": ("application_single_node_restart", DUPLICATE_CHECK),
    "chain_check": ("data_edited_payload", CHAIN_CHECK),
}


def drill(scenario: str, data: Path, *more: str, against: str = "single") -> tuple[int, list[str]]:
    """Exit code, and the kinds of what the witness found."""
    code, result = carry_out(scenario, data, *SOON, *more, against=against)
    (run,) = result["runs"]
    return code, sorted({finding["kind"] for finding in run["findings"]})


def without(code: str, folder: Path) -> str:
    """The override that lets every process of the system find `code` first."""
    place = folder / "sabotage"
    place.mkdir()
    (place / "sitecustomize.py").write_text(code)
    return f"system.sabotage={place}"


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_guard_that_is_taken_out_is_missed(switch: str, tmp_path: Path) -> None:
    scenario, code = SWITCHES[switch]
    found = drill(scenario, tmp_path, without(code, tmp_path))
    assert found[0] == 8, found


@needs_root
@pytest.mark.parametrize("switch", ON_THE_LAB)
def test_a_guard_of_many_nodes_that_is_taken_out_is_missed(switch: str, tmp_path: Path) -> None:
    scenario, code = ON_THE_LAB[switch]
    found = drill(scenario, tmp_path, without(code, tmp_path), against="lab")
    assert found[0] == 8, found


def test_an_archive_that_lags_is_missed(tmp_path: Path) -> None:
    found = drill("backup_restore_archive", tmp_path, "system.archive=async")
    assert found[0] == 8, found


@pytest.mark.parametrize("scenario", sorted({name for name, _ in SWITCHES.values()}))
def test_with_all_guards_the_same_drill_passes(scenario: str, tmp_path: Path) -> None:
    code, kinds = drill(scenario, tmp_path, "objectives.recovery_time_s=100")
    assert (code, kinds) == (0, [])


@needs_root
@pytest.mark.parametrize("scenario", sorted({name for name, _ in ON_THE_LAB.values()}))
def test_with_all_guards_the_same_drill_passes_on_the_lab(scenario: str, tmp_path: Path) -> None:
    code, kinds = drill(scenario, tmp_path, "objectives.recovery_time_s=100", against="lab")
    assert (code, kinds) == (0, [])
