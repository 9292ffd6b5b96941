"""Recovery, put together from its parts: which copier, which places, which checks.

`recovery/` knows no configuration and no concrete database; the command line and the server come
here for what they need.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from llm_orchestrator.clock import Clock
from llm_orchestrator.config import Config
from llm_orchestrator.engine.driver import NodeOptions
from llm_orchestrator.errors import OrchestratorError
from llm_orchestrator.recovery.prove import Checks
from llm_orchestrator.security.audit_check import check_audit
from llm_orchestrator.store.base import Batch, Database, Expire, Store, Unregister
from llm_orchestrator.wire.orchestrator import Orchestrator, is_postgres

PROOF_NAME = "llmo-proof-of-a-backup"
PROOF = f"""\
name: {PROOF_NAME}
description: what the engine runs on a restored copy; it asks nobody outside
inputs: {{word: string}}
steps:
  - {{id: say, type: llm, provider: echo, model: echo, prompt: "{{{{ inputs.word }}}}"}}
outputs: {{said: "{{{{ steps.say.text }}}}"}}
"""
WORD = "still here"


def make_checks(config: Config, clock: Clock) -> Checks:
    """The audit log's check, and an engine that runs one synthetic run on a copy."""

    async def engine(store: Database) -> str:
        return await try_engine(store, config, clock)

    return Checks(audit=audit_flaws, engine=engine)


async def audit_flaws(store: Store) -> list[str]:
    """What is wrong with a store's audit log."""
    found = await check_audit(store)
    return [f"audit chain {each.chain_id}, {each.number}: {each.what}" for each in found.flaws]


async def try_engine(store: Database, config: Config, clock: Clock) -> str:
    """Start an engine on a quiet copy and let it finish a run; why it could not, or ""."""
    alone = replace(config, otel_endpoint="", queues={}, archive_place="", backup_schedule="")
    options = NodeOptions(heart="thread" if is_postgres(store.shown) else "none")
    with tempfile.TemporaryDirectory(prefix="llmo-proof-") as folder:
        file = Path(folder) / "proof.yaml"
        file.write_text(PROOF)
        try:
            async with Orchestrator(
                config=alone, options=options, clock=clock, store=store
            ) as orchestrator:
                run_id = await orchestrator.start(file, {"word": WORD})
                output = await orchestrator.result(run_id)
                await _forget(store, run_id)
        except OrchestratorError as error:
            return error.message
    said = output.get("said") if isinstance(output, dict) else None
    return "" if said and WORD in str(said) else f"the run gave {output!r}"


async def _forget(store: Database, run_id: str) -> None:
    """A copy that is checked may become the live store: nothing of the check stays in it."""
    await store.commit(Batch(changes=(Expire((run_id,)),)))
    await store.commit(Batch(changes=(Unregister(PROOF_NAME),)))
