"""What each fault does to a SingleTarget, and how it is confirmed."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

from llm_orchestrator.drill.scenario import Fault
from llm_orchestrator.drill.target import Injected, NotConfirmed

if TYPE_CHECKING:
    from llm_orchestrator.drill.single import SingleTarget

Does = Callable[["SingleTarget", Fault], Awaitable[Injected]]


async def process_kill(target: SingleTarget, fault: Fault) -> Injected:
    """SIGKILL. Confirmed: its parent has collected it, killed by that signal."""
    code = await target.node.end_with(signal.SIGKILL)
    at_s = [sight.at_s for sight in target.node.sights if sight.mark == "t1"][-1]
    if code != -signal.SIGKILL:
        raise NotConfirmed(f"the node ended with {code}, not by the signal")
    return Injected(at_s, f"exit code {code}")


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


FAULTS: Mapping[str, Does] = {
    "process_kill": process_kill,
    "graceful_stop": graceful_stop,
    "process_freeze": process_freeze,
}
