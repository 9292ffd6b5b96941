"""A run behind a model's face: started by a request, followed until its answer is there."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import NamedTuple

from llm_orchestrator.engine.control import read_journal
from llm_orchestrator.engine.replay import Fold, fold
from llm_orchestrator.errors import OperatorError, RunFailed, RunPaused
from llm_orchestrator.model import Json, Kind, RunState
from llm_orchestrator.server import acts
from llm_orchestrator.server.model_inputs import Asked, streamed_step, to_run
from llm_orchestrator.server.model_shapes import error_message
from llm_orchestrator.server.streams import Reader
from llm_orchestrator.server.streams_entries import Event
from llm_orchestrator.server.streams_sse import SILENCE_S
from llm_orchestrator.server.streams_watch import Crowd, Watch
from llm_orchestrator.server.surface import Surface

WAIT_S = 600.0
"""How long a request that is not streamed waits; the run goes on afterwards."""


class StillRunning(OperatorError):
    """The run takes longer than a request may wait; it goes on."""

    kind = "still_running"
    retryable = True


class Begun(NamedTuple):
    """A run that a request has started, or had started before."""

    run_id: str
    step: str | None
    """Whose tokens are the answer's."""


def model_name(model: str) -> tuple[str, str | None]:
    """`name` or `name@version`."""
    name, at, version = model.rpartition("@")
    return (name, version) if at and name else (model, None)


async def begin(
    surface: Surface, model: str, asked: Asked, *, key: str | None, origin: Mapping[str, Json]
) -> Begun:
    """Start it. Raises NotFound, InputError, KeyReused, Maintenance, Draining, StoreError."""
    name, version = model_name(model)
    stored = await surface.known.find(name, version)
    given = to_run(stored, asked)
    wish = acts.Wish(
        name, version, given.inputs, labels=given.labels or None, key=key, origin=origin
    )
    started = await acts.start(surface, wish)
    if started.version != stored.version:
        stored = await surface.known.find(name, started.version)
    return Begun(started.run_id, streamed_step(stored))


async def step_of(surface: Surface, state: Fold) -> str | None:
    """Whose tokens are the answer of a run that is there already."""
    accepted = state.accepted
    stored = await surface.store.shelf.workflow(accepted["workflow"], digest=accepted["digest"])
    return streamed_step(stored) if stored is not None else None


async def state_of(surface: Surface, run_id: str) -> Fold:
    """What the run's journal says. Raises NotFound, StoreDamaged."""
    return fold(run_id, (await read_journal(surface.store, run_id)).entries)


async def completed(surface: Surface, run_id: str) -> Fold:
    """Wait for its end. Raises RunFailed, RunPaused, StillRunning."""
    left_s = WAIT_S
    while left_s > 0 and not surface.is_stopping():
        wait_s = min(left_s, 300.0)
        if await acts.wait_end(surface, run_id, wait_s) is not None:
            state = await state_of(surface, run_id)
            check_completed(state)
            return state
        left_s -= wait_s
    raise StillRunning(
        f"run {run_id} goes on; nobody waits for it here any more",
        hint="repeat the request with the same Idempotency-Key, or stream it",
    )


def check_completed(state: Fold) -> None:
    """Raises RunFailed or RunPaused for a run that is at rest without an answer."""
    if state.state is RunState.PAUSED:
        hint = f"llmo runs explain {state.run_id}"
        raise RunPaused(error_message(state), reason=state.reason, hint=hint)
    if state.state is not RunState.COMPLETED:
        raise RunFailed(error_message(state), state=state.state.value, error=state.error)


async def voids(surface: Surface, run_id: str, step: str) -> bool:
    """Whether text of a step that somebody may have read was taken back, ever."""
    kept = await surface.store.look.progress(run_id, step)
    if kept is not None and isinstance(kept.handle, dict) and kept.handle.get("voids"):
        return True
    state = await state_of(surface, run_id)
    done = state.finished.get(step)
    is_again = state.ends > int(state.state.is_final)
    return bool(state.rewinds or is_again or (done and done.data.get("voids")))


class Text:
    """The answer as it stands, and what of it has left and cannot be taken back."""

    def __init__(self) -> None:
        self.now = ""
        self.sent = ""

    def apply(self, event: Event) -> None:
        """A chunk or a reset."""
        offset = int(event.data["offset"])
        self.now = self.now[:offset] + str(event.data.get("text", ""))

    @property
    def is_void(self) -> bool:
        """What was sent is not the beginning of the answer any more."""
        return not (self.now.startswith(self.sent) or self.sent.startswith(self.now))

    def take(self) -> str:
        """What can be sent now. A text that is told again is silent until it is new."""
        new = self.now[len(self.sent) :]
        self.sent += new
        return new


def watch_of(surface: Surface, begun: Begun, *, crowd: Crowd, is_live: bool) -> Watch:
    """The run's events, with the text of the step that speaks. It listens from now on."""
    reader = Reader(text_step=begun.step, has_text=begun.step is not None)
    return Watch(surface, begun.run_id, reader, crowd=crowd, is_live=is_live)


async def follow(watch: Watch) -> AsyncIterator[Event | None]:
    """What happens; None while nothing does."""
    await watch.open()
    async for event in watch.events(silence_s=SILENCE_S):
        yield event


def is_paused(event: Event) -> bool:
    """Whether an entry says that the run waits for a person."""
    return event.name == Kind.STATE and event.data["payload"].get("state") == RunState.PAUSED
