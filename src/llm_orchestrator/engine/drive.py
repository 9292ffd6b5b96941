"""From a run's first step here to the reason why it leaves."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from llm_orchestrator.clock import Clock
from llm_orchestrator.engine.execution import Execution
from llm_orchestrator.engine.failure import describe
from llm_orchestrator.engine.flows import Flow
from llm_orchestrator.engine.machine import Event, Happening
from llm_orchestrator.errors import Diverged, Fenced, StoreError, Suspended
from llm_orchestrator.model import MICROSECONDS
from llm_orchestrator.telemetry.redact import redact


async def outcome(execution: Execution, flow: Flow, clock: Clock) -> Happening | None:
    """Run the flow's body; what it came to. None when the run is not ours any more."""
    timer = _arm_timeout(execution, flow, clock)
    task = asyncio.current_task()
    try:
        output = await flow.body(execution)
    except (asyncio.CancelledError, Suspended):
        stop = execution.gate.stop
        if stop is None:
            raise
        if task is not None:
            task.uncancel()
        return _bounded(stop, execution, flow)
    except Fenced:
        return None
    except Diverged as error:
        return Happening(Event.PAUSE, reason="nondeterminism", error=_facts(error))
    except StoreError:
        raise
    except Exception as error:  # noqa: BLE001 (the author's code may raise anything)
        stop = execution.gate.stop
        return stop if stop is not None else Happening(Event.FAIL, error=describe(error))
    finally:
        if timer is not None:
            timer.cancel()
    return Happening(Event.COMPLETE, output=output)


def deadline_us(execution: Execution, flow: Flow) -> int | None:
    """When the run as a whole must have ended, or None."""
    if flow.timeout_s is None:
        return None
    return execution.fold.created_at + int(flow.timeout_s * MICROSECONDS)


def _arm_timeout(execution: Execution, flow: Flow, clock: Clock) -> asyncio.TimerHandle | None:
    deadline = deadline_us(execution, flow)
    if deadline is None:
        return None
    error = {"kind": "timeout", "message": f"the run took longer than its {flow.timeout_s:g} s"}

    def expire() -> None:
        stop = Happening(Event.FAIL, reason="timeout", error=error)
        execution.gate.request_stop(stop, at_once=True)

    remaining = max(0.0, (deadline - clock.now_us()) / MICROSECONDS)
    return asyncio.get_running_loop().call_later(remaining, expire)


def _bounded(stop: Happening, execution: Execution, flow: Flow) -> Happening:
    """A parked run wakes for its own time limit, too."""
    deadline = deadline_us(execution, flow)
    if stop.event is not Event.WAIT or deadline is None or stop.wake_at <= deadline:
        return stop
    return replace(stop, wake_at=deadline)


def _facts(error: Diverged) -> dict[str, object]:
    return {"kind": "nondeterminism", "message": redact(str(error))}
