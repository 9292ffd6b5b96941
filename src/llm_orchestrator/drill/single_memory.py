"""User code that takes the memory of a SingleTarget whose node is in a control group.

Two ways. `memory_at_once`: one step takes all of it in one go; no guard in the process can be
quick enough, so the kernel kills. `memory_step_by_step`: many runs take a part each and keep it;
the guard (engine/memory.py) has to stop before the kernel does. Confirmed by the kernel's counters.
"""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llm_orchestrator.drill.child import ChildError
from llm_orchestrator.drill.memory_group import MemoryGroup
from llm_orchestrator.drill.scenario import Fault
from llm_orchestrator.drill.target import Injected, NotConfirmed, NotPossible

if TYPE_CHECKING:
    from llm_orchestrator.drill.single import SingleTarget

Json = Any
_SHEDS = "nothing is claimed, runs are let go"
_HUNGRY = 50
_GAP_S = 0.12
_TOO_MUCH = 1.1
"""All that the runs want together, as a part of the memory that there is left."""
_SETTLE_S = 3.0


def _group(target: SingleTarget) -> MemoryGroup:
    if target.group is None:
        raise NotPossible("the node has no limit of memory: system.memory_mb")
    if target.group.pids != {target.node.pid}:
        raise NotConfirmed(f"the group holds {target.group.pids}, the node is {target.node.pid}")
    return target.group


async def memory_at_once(target: SingleTarget, fault: Fault) -> Injected:
    """A step takes memory until the kernel kills its node, `kills` times (once).

    Confirmed: it died by SIGKILL, and the kernel has counted as many kills for want of memory.
    """
    group, kills = _group(target), int(fault.options.get("kills", 1))
    lives, before = len(target.node.codes), group.kills
    flag = target.folder / "flag-memory" if kills == 1 else ""
    url = f"{target.endpoints[0]}/api/v1/workflows/drill_misbehave/execute"
    inputs = {"key": "memory", "how": "memory", "flag": str(flag)}
    with contextlib.suppress(ChildError):  # it dies before it has answered
        await target.post(url, {"inputs": inputs})
    codes = [await target.node.ended(lives + number) for number in range(kills)]
    counted = group.kills - before
    if set(codes) != {-signal.SIGKILL} or counted != kills:
        raise NotConfirmed(f"exit codes {codes}, and the kernel has killed {counted} times")
    size = f"{group.limit >> 20} MiB"
    return Injected(target.node.ended_at_s, f"oom_kill rose by {counted} in a group of {size}")


async def memory_step_by_step(target: SingleTarget, fault: Fault) -> Injected:
    """50 runs take a part of the memory each, more than there is, and keep it until it is undone.

    Confirmed: the node says that it lets runs go, or the kernel has killed it all the same.
    """
    group = _group(target)
    before, told = group.kills, target.node.said().count(_SHEDS)
    (target.folder / "keep").touch()
    part = math.ceil((group.limit - group.used) * _TOO_MUCH / _HUNGRY)
    url = f"{target.endpoints[0]}/api/v1/workflows/drill_hungry/execute"
    inputs: Mapping[str, Json] = {"size": part, "while_there": str(target.folder / "keep")}
    for number in range(_HUNGRY):
        with contextlib.suppress(ChildError):  # the kernel may have killed it
            await target.post(url, {"inputs": {**inputs, "key": f"hungry {number}"}})
        await target.clock.sleep(_GAP_S)
    await target.clock.sleep(_SETTLE_S)
    share, killed = group.used / group.limit, group.kills - before
    if not killed and target.node.said().count(_SHEDS) == told:
        raise NotConfirmed(f"{share:.0%} of the memory is in use, and nothing is let go")
    evidence = f"{_HUNGRY} runs of {part >> 20} MiB in a group of {group.limit >> 20} MiB"
    evidence += f": {share:.0%} in use, the kernel has killed {killed} times"
    return Injected(target.clock.monotonic(), evidence)
