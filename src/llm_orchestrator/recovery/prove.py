"""Proving a backup: it is restored, read to the last byte, and an engine runs on the copy (P7).

    verify the file -> restore it aside -> every chain, row, message, definition and page
    -> heads and counts as the manifest says -> the audit log -> an engine starts on the copy and
    finishes one synthetic run -> the copy is removed -> the result is a record of the live store

A proof that fails is an answer, not an error: it is recorded and returned with what was wrong.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llm_orchestrator.clock import Clock
from llm_orchestrator.engine.audit import verify_store
from llm_orchestrator.errors import OrchestratorError
from llm_orchestrator.model import Json
from llm_orchestrator.recovery.create import BACKUP
from llm_orchestrator.recovery.manifest import Manifest
from llm_orchestrator.recovery.quiet import quiet
from llm_orchestrator.store.base import Batch, Database, PutRecord, Store
from llm_orchestrator.store.copying import Aside, Copier

PROVED, DISPROVED = "proved", "disproved"
"""Keys of records of kind BACKUP, beside `last`."""
_REMEMBERED = 200
FLAWS_MAX = 20
CheckAudit = Callable[[Store], Awaitable[Sequence[str]]]
"""What is wrong with a store's audit log (security/audit_check.py, handed in)."""
TryEngine = Callable[[Database], Awaitable[str]]
"""Starts an engine on a quiet store; why it could not do its work, or ""."""


@dataclass(frozen=True, slots=True)
class Checks:
    """What a proof needs of other parts."""

    audit: CheckAudit
    engine: TryEngine


@dataclass(slots=True)
class Proof:
    """What came of a proof."""

    backup_id: str
    runs: int = 0
    took_s: float = 0.0
    flaws: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """True when nothing was found wrong."""
        return not self.flaws

    def to_json(self) -> dict[str, Json]:
        """For the record and for `--json`."""
        return {
            "backup_id": self.backup_id,
            "runs": self.runs,
            "took_s": round(self.took_s, 3),
            "is_good": self.is_good,
            "flaws": self.flaws[:FLAWS_MAX],
        }


async def prove(
    manifest: Manifest, dump: Path, *, copier: Copier, checks: Checks, clock: Clock
) -> Proof:
    """Restore a verified dump aside and try it. The live store is not touched.

    Raises StoreError when there is no room or no right to restore anything aside.
    """
    proof = Proof(manifest.backup_id)
    begun = clock.monotonic()
    try:
        aside = await copier.load(dump)
    except OrchestratorError as error:
        if error.exit_code != _INTEGRITY:
            raise
        proof.flaws.append(f"it cannot be restored: {error.message}")
    else:
        try:
            proof.runs, proof.flaws = await check_copy(aside, manifest, checks)
        finally:
            await aside.discard()
    proof.took_s = clock.monotonic() - begun
    return proof


_INTEGRITY = 8


async def check_copy(
    aside: Aside, manifest: Manifest | None, checks: Checks
) -> tuple[int, list[str]]:
    """How many runs a copy has, and everything that is wrong with it."""
    flaws: list[str] = []
    store = aside.store()
    await store.open_as_client()
    try:
        run_ids = await store.look.run_ids()
        flaws += [
            f"run {flaw.run_id}, entry {flaw.seq}: {flaw.what}" if flaw.run_id else flaw.what
            for flaw in await verify_store(store)
        ]
        if manifest is not None:
            flaws += await _against(store, manifest, run_ids)
        flaws += await checks.audit(store)
    finally:
        await store.close()
    if not flaws:
        trouble = await checks.engine(quiet(aside.store()))
        flaws += [f"an engine on the copy: {trouble}"] if trouble else []
    return len(run_ids), flaws


async def _against(store: Database, manifest: Manifest, run_ids: Sequence[str]) -> list[str]:
    """What the manifest says and the copy does not have."""
    flaws: list[str] = []
    wanted = manifest.counts.get("runs", 0)
    if len(run_ids) != wanted:
        flaws.append(f"it has {len(run_ids)} runs, its manifest says {wanted}")
    heads = {head.run_id: head for head in manifest.heads}
    unfinished = list(heads)
    for start in range(0, len(unfinished), 50):
        some = unfinished[start : start + 50]
        for run_id, journal in (await store.look.load(some)).items():
            head = heads.pop(run_id, None)
            last = journal.entries[-1] if journal.entries else None
            if head is not None and (last is None or last.digest.hex() != head.digest):
                flaws.append(f"run {run_id} does not end as its manifest says (entry {head.seq})")
    flaws += [f"run {run_id} of its manifest is not there" for run_id in heads]
    return flaws


async def record_proof(store: Store, proof: Proof, now_us: int) -> None:
    """Where metrics, `doctor` and `prune` find it. The last good one is never overwritten by bad.

    Raises StoreError; Refused never: whoever wrote meanwhile wrote as good a proof.
    """
    key = PROVED if proof.is_good else DISPROVED
    before, version = await store.shelf.record(BACKUP, key)
    known = before.get("all") if isinstance(before, dict) else None
    every = {**(known if isinstance(known, dict) else {}), proof.backup_id: now_us}
    kept = dict(sorted(every.items())[-_REMEMBERED:])
    value = {**proof.to_json(), "at": now_us, "all": kept}
    await store.commit(Batch(changes=(PutRecord(BACKUP, key, value, version),)))
