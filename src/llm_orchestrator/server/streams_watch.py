"""Feeds a `Reader`: from the engine's words here, from the store where another node drives.

Words come at once and wait for nothing. The store is read beside them: when a word says that there
is something new, and again and again while the run is driven by another node (nothing tells this
process of each entry there). Listening begins before the first look, so nothing falls between.
What waits for a reader is bounded; one that does not keep up is told to come back, and loses
nothing by that.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import NamedTuple

from llm_orchestrator.engine.control import read_journal
from llm_orchestrator.errors import OrchestratorError, StoreUnavailable
from llm_orchestrator.model import Entry, Json, Kind, RunState
from llm_orchestrator.server.feed import Told
from llm_orchestrator.server.streams import Reader
from llm_orchestrator.server.streams_entries import Event
from llm_orchestrator.server.surface import Surface
from llm_orchestrator.store.base import Progress
from llm_orchestrator.store.journal import decode

POLL_S = 0.25
"""How often a run that another node drives is looked at."""
REST_S = 1.0
"""How often one that nobody drives is, and how late a stream notices that the process stops."""
SURE_S = 5.0
"""How often one that is driven here is, though nothing was said."""
POLLS_PER_S = 400
"""All streams of a process together look about so often."""
SHARE = 4
"""After a look that took long there is a pause of so many times that."""
LOOKS_AT_ONCE = 16
WAITING_MAX = 4_096
WAITING_CHARS_MAX = 256 * 1024


class _Look(NamedTuple):
    """What the store says: first the texts, then the entries."""

    kept: Sequence[tuple[str, Progress | None]]
    entries: Sequence[Entry]


class Crowd:
    """How many streams a process has: what they may ask of the store is shared."""

    def __init__(self) -> None:
        self.count = 0

    def pause_s(self, wanted_s: float) -> float:
        """How long to wait between two looks."""
        return max(wanted_s, self.count / POLLS_PER_S)


class Watch:
    """One run for one reader: `await open()`, then `events()` once. Close it in any case.

    `is_live` False: only what is kept in the store is told, never a word that a crash could void.
    """

    def __init__(
        self,
        surface: Surface,
        run_id: str,
        reader: Reader,
        *,
        crowd: Crowd | None = None,
        is_live: bool = True,
    ) -> None:
        self._surface = surface
        self._run_id = run_id
        self._reader = reader
        self._crowd = crowd or Crowd()
        self._is_live = is_live
        self._waiting: deque[Told | _Look] = deque()
        self._chars = 0
        self._is_full = False
        self._trouble: OrchestratorError | None = None
        self._bell = asyncio.Event()
        self._news = asyncio.Event()
        self._turn = 0
        self._end_seq = 0
        self._looking: asyncio.Task[None] | None = None
        self._stop_listening = surface.feed.listen(self._hear, run_id)

    async def open(self) -> None:
        """The first look. Raises NotFound, StoreError's subclasses."""
        first = await self._look()
        self._waiting.appendleft(first)
        if is_final(first.entries):
            self._end_seq = first.entries[-1].seq
        self._looking = asyncio.create_task(self._go_on_looking())

    def is_at_end(self, seq: int) -> bool:
        """After `open`: the run is final, and whoever has read `seq` knows it."""
        return self._end_seq == seq

    def close(self) -> None:
        """Stop listening and looking."""
        self._stop_listening()
        self._stop_listening = _nothing
        if self._looking is not None:
            self._looking.cancel()

    async def events(self, *, silence_s: float = 15.0) -> AsyncIterator[Event | None]:
        """Everything, until the end; None after each `silence_s` without anything.

        The last event is `end`, or `reconnect` with the reason why it comes before the end.
        """
        while True:
            while self._waiting and not self._is_full:
                for event in self._take(self._waiting.popleft()):
                    yield event
                if self._reader.has_ended:
                    return
            last = self._last()
            if last is not None:
                yield last
                return
            self._bell.clear()
            try:
                async with asyncio.timeout(silence_s):
                    await self._bell.wait()
            except TimeoutError:
                yield None

    def _take(self, item: Told | _Look) -> Iterator[Event]:
        if isinstance(item, Told):
            self._chars -= len(item.data.get("text", ""))
            yield from self._reader.told(item)
            return
        for step, progress in item.kept:
            yield from self._reader.kept(step, progress)
        yield from self._reader.journal(item.entries)

    def _last(self) -> Event | None:
        """Why the stream cannot go on here."""
        if self._is_full:
            return _reconnect("slow", "what came was not taken in time")
        if self._surface.is_stopping():
            return _reconnect("stopping", "this server stops; another one goes on")
        if self._trouble is not None:
            facts: dict[str, Json] = {"code": self._trouble.kind, "message": self._trouble.message}
            return Event("error", "", facts | {"hint": self._trouble.hint})
        return None

    # -- the engine's words --------------------------------------------------------------------

    def _hear(self, told: Told) -> None:
        if told.what not in ("chunk", "reset"):
            self._news.set()
            return
        if not self._is_live or self._is_full:
            return
        if told.step not in self._reader.in_flight:
            self._news.set()
        self._chars += len(told.data.get("text", ""))
        self._waiting.append(told)
        if self._chars > WAITING_CHARS_MAX or len(self._waiting) > WAITING_MAX:
            self._is_full = True
            self._waiting.clear()
        self._bell.set()

    # -- the store -----------------------------------------------------------------------------

    @property
    def _is_here(self) -> bool:
        """True while this process drives the run, so that every word of it comes."""
        node = self._surface.node
        return node is not None and self._run_id in node.driver.driven

    async def _look(self) -> _Look:
        """Texts first: an entry that finishes a step comes after all that was kept of it."""
        look = self._surface.store.look
        wanted = self._reader.wants(is_live=self._is_live and self._is_here)
        if len(wanted) > LOOKS_AT_ONCE:
            self._turn = (self._turn + LOOKS_AT_ONCE) % len(wanted)
            turned = itertools.islice(itertools.cycle(wanted), self._turn, None)
            wanted = list(itertools.islice(turned, LOOKS_AT_ONCE))
        kept = [(step, await look.progress(self._run_id, step)) for step in wanted]
        journal = await read_journal(self._surface.store, self._run_id)
        return _Look(kept, journal.entries)

    async def _go_on_looking(self) -> None:
        cost_s = 0.0
        while True:
            await self._pause(cost_s)
            self._news.clear()
            began = self._surface.clock.monotonic()
            try:
                found = await self._look()
            except StoreUnavailable:
                self._news.clear()  # it will answer again; readers see a quiet stream
                cost_s = REST_S / SHARE
                continue
            except OrchestratorError as error:
                self._trouble = error
                self._bell.set()
                return
            cost_s = self._surface.clock.monotonic() - began
            older = (each for each in self._waiting if isinstance(each, Told) or each.kept)
            self._waiting = deque(older)
            self._waiting.append(found)
            self._bell.set()

    async def _pause(self, cost_s: float) -> None:
        """Until there may be something new, but not so soon that looking is all that is done."""
        await self._surface.clock.sleep(max(cost_s * SHARE, 0.01))
        left_s = self._crowd.pause_s(self._wanted_pause_s())
        while left_s > 0 and not self._news.is_set():
            if self._surface.is_stopping():
                self._bell.set()
            try:
                async with asyncio.timeout(min(left_s, REST_S)):
                    await self._news.wait()
            except TimeoutError:
                left_s -= REST_S

    def _wanted_pause_s(self) -> float:
        if self._is_live and self._is_here:
            return POLL_S if self._reader.wants(is_live=True) else SURE_S
        is_moving = self._reader.state in (RunState.RUNNING, RunState.PENDING)
        return POLL_S if is_moving else REST_S


def is_final(entries: Sequence[Entry]) -> bool:
    """True when a journal's last word is that the run has ended for good."""
    last = entries[-1]
    return last.kind == Kind.STATE and RunState(decode(last.payload)["state"]).is_final


def _reconnect(reason: str, message: str) -> Event:
    """The position stays: the reader comes back with it, here or elsewhere."""
    return Event("reconnect", "", {"reason": reason, "message": message})


def _nothing() -> None:
    """Called in place of what was done already."""
