"""What each fault does to a SingleTarget, and how it is confirmed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from llm_orchestrator.drill.child import ChildError
from llm_orchestrator.drill.scenario import Fault
from llm_orchestrator.drill.single_damage import (
    backup_damaged,
    journal_damage,
    llmo,
    rows_deleted,
    store_lost,
)
from llm_orchestrator.drill.single_memory import memory_at_once, memory_step_by_step
from llm_orchestrator.drill.single_upgrade import migration_fails
from llm_orchestrator.drill.target import Injected, NotConfirmed

if TYPE_CHECKING:
    from llm_orchestrator.drill.single import SingleTarget

Json = Any
Does = Callable[["SingleTarget", Fault], Awaitable[Injected]]
_CONFIRM_S = 30.0
_POLL_S = 0.02


# --- the process ---


async def process_kill(target: SingleTarget, fault: Fault) -> Injected:
    """SIGKILL. Confirmed: its parent has collected it, killed by that signal."""
    code = await target.node.end_with(signal.SIGKILL)
    if code != -signal.SIGKILL:
        raise NotConfirmed(f"the node ended with {code}, not by the signal")
    return Injected(target.node.ended_at_s, f"exit code {code}")


async def graceful_stop(target: SingleTarget, fault: Fault) -> Injected:
    """SIGTERM, as a rolling update does. Confirmed: it ended in order; t0 is the order."""
    at_s = target.clock.monotonic()
    code = await target.node.end_with(signal.SIGTERM)
    if code != 0:
        raise NotConfirmed(f"the node ended with {code}, not in order")
    return Injected(at_s, f"exit code {code}")


async def process_freeze(target: SingleTarget, fault: Fault) -> Injected:
    """SIGSTOP. Confirmed: the kernel says it is stopped."""
    target.node.send(signal.SIGSTOP)
    await target.node.until(lambda: target.node.state() == "T", "it does not freeze")
    return Injected(target.clock.monotonic(), "state T")


async def misbehave(target: SingleTarget, fault: Fault) -> Injected:
    """A step breaks something (fault_flows.py), once. `how`: exception, thread, loop, segfault.

    Confirmed: the step has left its flag, and where it kills, its process is dead.
    """
    how, dies_with = str(fault.options["how"]), fault.options.get("exit_code")
    flag = target.folder / f"flag-{how}"
    lives = len(target.node.codes)
    url = f"{target.endpoints[0]}/api/v1/workflows/drill_misbehave/execute"
    inputs = {"key": how, "how": how, "flag": str(flag)}
    if dies_with is not None:
        with contextlib.suppress(ChildError):  # it dies before it has answered
            await target.post(url, {"inputs": inputs})
    else:
        await target.post(url, {"inputs": inputs})
        await target.node.until(flag.exists, "the step is not made")
        return Injected(target.clock.monotonic(), f"the step has met its {how}")
    code = await target.node.ended(lives)
    if code != dies_with:
        raise NotConfirmed(f"the node ended with {code}, not with {dies_with}")
    return Injected(target.node.ended_at_s, f"exit code {code}")


# --- the provider ---


async def llm_misbehave(target: SingleTarget, fault: Fault) -> Injected:
    """The provider answers as `options` say (fake_script.Behaviour), every request.

    Confirmed: a request of the engine has met it, by the provider's own ledger.
    """
    start = target.llm_ledger.stat().st_size
    await target.control(default=dict(fault.options))
    wanted = _wanted(fault.options)
    met = await _first_line(target, start, wanted)
    return Injected(target.clock.monotonic(), f"a request of the engine met it: {met}")


def _wanted(options: Mapping[str, Json]) -> Callable[[dict[str, Json]], bool]:
    if options.get("hang"):
        return lambda line: line["event"] == "arrived"
    if status := options.get("status"):
        return lambda line: line.get("status") == status
    outcome = "garbage" if options.get("garbage") else "cut"
    return lambda line: line.get("outcome") == outcome


async def _first_line(
    target: SingleTarget, start: int, wanted: Callable[[dict[str, Json]], bool]
) -> str:
    """What the first line of the provider's ledger behind `start` (bytes) that fits says."""
    end_s = target.clock.monotonic() + _CONFIRM_S
    while target.clock.monotonic() < end_s:
        data = (await asyncio.to_thread(target.llm_ledger.read_bytes))[start:]
        for text in data.splitlines():
            if text.endswith(b"}") and wanted(line := json.loads(text)):
                return f"{line['event']} {line.get('outcome', '')} {line.get('status', '')}".strip()
        await target.clock.sleep(_POLL_S)
    raise NotConfirmed("no request of the engine met the provider's fault")


async def llm_down(target: SingleTarget, fault: Fault) -> Injected:
    """The whole provider is gone: nobody listens. Confirmed: it is dead and refuses.

    `closes_books`: it first writes down what it had sent of each answer, so that the price of
    what is asked again is known; clients see their connections break either way.
    """
    target.llm.hold()
    number = signal.SIGTERM if fault.options.get("closes_books") else signal.SIGKILL
    code = await target.llm.end_with(number)
    if await target.answers(f"{target.llm_url}/health"):
        raise NotConfirmed("the provider still answers")
    return Injected(target.llm.ended_at_s, f"exit code {code}, connections refused")


# --- where copies go ---


async def object_store_down(target: SingleTarget, fault: Fault) -> Injected:
    """The whole object store is gone. Confirmed: it is dead and refuses connections."""
    store = target.copies.store
    if store is None:
        raise NotConfirmed("the scenario asks for no object store: system.object_store")
    store.hold()
    code = await store.end_with(signal.SIGKILL)
    assert target.http is not None
    if await target.copies.is_reached(target.http):
        raise NotConfirmed("the object store still answers")
    return Injected(store.ended_at_s, f"exit code {code}, connections refused")


async def object_store_frozen(target: SingleTarget, fault: Fault) -> Injected:
    """The object store takes connections and never answers. Confirmed: the kernel, a request."""
    store = target.copies.store
    if store is None:
        raise NotConfirmed("the scenario asks for no object store: system.object_store")
    store.send(signal.SIGSTOP)
    await store.until(lambda: store.state() == "T", "it does not freeze")
    at_s = target.clock.monotonic()
    assert target.http is not None
    if await target.copies.is_reached(target.http, limit_s=1.0):
        raise NotConfirmed("the object store still answers")
    return Injected(at_s, "state T, a request was not answered in a second")


async def backup_key_lost(target: SingleTarget, fault: Fault) -> Injected:
    """The file of the key that opens backups is gone. Confirmed: the command says so."""
    for words in (("create",), ("verify",)):
        code, said = await llmo(target, "backup", *words)
        if code != 0:
            raise NotConfirmed(f"backup {words[0]} ended with {code}: {said[-300:]}")
    target.copies.identity.rename(target.copies.hidden)
    at_s = target.clock.monotonic()
    code, _ = await llmo(target, "backup", "verify")
    if code == 0:
        raise NotConfirmed("a backup could still be opened")
    return Injected(at_s, f"the key's file is gone, llmo backup verify ended with {code}")


FAULTS: Mapping[str, Does] = {
    "process_kill": process_kill,
    "graceful_stop": graceful_stop,
    "process_freeze": process_freeze,
    "misbehave": misbehave,
    "memory_at_once": memory_at_once,
    "memory_step_by_step": memory_step_by_step,
    "llm_misbehave": llm_misbehave,
    "llm_down": llm_down,
    "migration_fails": migration_fails,
    "journal_damage": journal_damage,
    "store_lost": store_lost,
    "rows_deleted": rows_deleted,
    "backup_damaged": backup_damaged,
    "object_store_down": object_store_down,
    "object_store_frozen": object_store_frozen,
    "backup_key_lost": backup_key_lost,
}
