"""Following a run that another process drives: its journal, read again and again until it ends.

Entries are checked each time; a damaged journal ends the following with exit code 8.
"""

from __future__ import annotations

from collections.abc import Callable

from llm_orchestrator.cli.progress import Progress
from llm_orchestrator.clock import Clock
from llm_orchestrator.engine.driver import End
from llm_orchestrator.engine.replay import Fold, fold
from llm_orchestrator.engine.steps_view import StepsView
from llm_orchestrator.errors import NotFound, StoreDamaged
from llm_orchestrator.model import Entry, Journal, Kind, RunState
from llm_orchestrator.store.base import Store
from llm_orchestrator.store.journal import decode

POLL_S = 0.2
_WORDS = {
    Kind.INTENT: "intent",
    Kind.ATTEMPT_FAILED: "failed",
    Kind.STEP_FINISHED: "finished",
    Kind.STEP_SKIPPED: "skipped",
    Kind.WAITING: "waiting",
    Kind.SIGNAL: "signal",
}


async def read_journal(store: Store, run_id: str) -> Journal:
    """A run's journal, whole. Raises NotFound, or StoreDamaged with the command that mends it."""
    journal = (await store.look.load([run_id])).get(run_id)
    if journal is None:
        raise NotFound(f"there is no run {run_id}", hint="llmo runs list")
    if journal.flaws:
        flaw = journal.flaws[0]
        raise StoreDamaged(
            f"run {run_id} is damaged at entry {flaw.seq}: {flaw.what}",
            run_id=run_id,
            hint=f"llmo journal repair {run_id} --dry-run",
        )
    return journal


async def read_fold(store: Store, run_id: str) -> Fold:
    """What a run's journal says. Raises as `read_journal`."""
    return fold(run_id, (await read_journal(store, run_id)).entries)


def end_of(state: Fold) -> End:
    """How a run ended, from its journal."""
    return End(state.run_id, state.state, state.reason, state.output, state.error)


class Follower:
    """Reads a run until it ends or pauses, and tells `progress` (or `on_entry`) what is new."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        *,
        progress: Progress | None = None,
        on_entry: Callable[[Entry], None] | None = None,
        is_streaming: bool = False,
    ) -> None:
        self._store = store
        self._clock = clock
        self._progress = progress
        self._on_entry = on_entry
        self._is_streaming = is_streaming
        self._view = StepsView()
        self._seen = 0
        self._shown: dict[str, tuple[int, int]] = {}

    async def follow(self, run_id: str) -> Fold:
        """Until the run is final or paused; its fold."""
        while True:
            state = await self._look(run_id)
            if state.state.is_final or state.state is RunState.PAUSED:
                return state
            await self._clock.sleep(POLL_S)

    async def _look(self, run_id: str) -> Fold:
        journal = await read_journal(self._store, run_id)
        for entry in journal.entries:
            if entry.seq > self._seen:
                self._seen = entry.seq
                self._tell(entry)
        state = fold(run_id, journal.entries)
        if self._is_streaming and self._progress is not None:
            for step in state.intents:
                await self._stream(run_id, step)
        return state

    def _tell(self, entry: Entry) -> None:
        if self._on_entry is not None:
            self._on_entry(entry)
        row = self._view.add(entry)
        word = _WORDS.get(Kind(entry.kind))
        if self._progress is not None and row is not None and word is not None:
            self._progress.changed(row, word, decode(entry.payload))

    async def _stream(self, run_id: str, step: str) -> None:
        """What came since the last look, of an answer whose pieces are kept."""
        assert self._progress is not None
        kept = await self._store.look.progress(run_id, step)
        if kept is None:
            return
        attempt, offset = self._shown.get(step, (kept.attempt, 0))
        if attempt != kept.attempt or len(kept.text) < offset:
            self._progress.reset(step, 0)
            offset = 0
        if len(kept.text) > offset:
            self._progress.chunk(step, kept.text[offset:])
        self._shown[step] = (kept.attempt, len(kept.text))
