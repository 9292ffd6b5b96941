"""The engine's words while they are spoken: what this process's node publishes, to who listens.

It holds nothing and promises nothing: the journal and the kept pieces of streams are the truth; a
listener that comes late, or sits on another node, reads those.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from llm_orchestrator.model import Json


class Told(NamedTuple):
    """See engine.execution.Publish."""

    run_id: str
    what: str
    step: str
    attempt: int
    data: dict[str, Json]


Listener = Callable[[Told], None]


class Feed:
    """Fans out by run. Listeners must be quick and never raise."""

    def __init__(self) -> None:
        self._listeners: dict[str, list[Listener]] = {}
        self._all: list[Listener] = []

    def publish(self, *words: Any) -> None:
        """Handed to the node (engine.execution.Publish)."""
        run_id = words[0]
        here = self._listeners.get(run_id)
        if here is None and not self._all:
            return
        told = Told(*words)
        for listener in (*(here or ()), *self._all):
            listener(told)

    def listen(self, listener: Listener, run_id: str | None = None) -> Callable[[], None]:
        """Be told of one run, or of all; call what is returned to stop."""
        place = self._all if run_id is None else self._listeners.setdefault(run_id, [])
        place.append(listener)

        def stop() -> None:
            place.remove(listener)
            if run_id is not None and not place:
                self._listeners.pop(run_id, None)

        return stop
