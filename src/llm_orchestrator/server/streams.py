"""What one reader of a run is told next: journal entries, and the text of steps as it comes.

The law: what a reader holds of a step after applying resets is the beginning of the step's text,
and is the recorded output in the end; no entry comes twice or is missing; whichever node it asks.

A `Reader` is the pure half of a stream. It mirrors what its reader holds of each unfinished step
and is fed from three sides, in any order and with any delay:

- `told`: the engine's own words, when the run is driven here: each chunk at once;
- `kept`: a step's text as it was last kept in the store, when it is driven elsewhere, when the
  reader came in the middle, or when there is doubt whose text the reader holds;
- `journal`: the entries. A finished step's recorded text settles all doubt: just before that entry
  the reader gets what it lacks, so that whoever has read an entry holds all texts that it settles.

Doubt: a text that follows a takeover may differ from what the dead node had shown. A reader that
comes back brings only a position; nothing of it is believed that its proof does not show.

Streamed is the `text` of `llm` steps, which is JSON text for a step with `response_schema`; a step
without `stream` gives it as one piece. Child runs are runs of their own and have their own streams.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum

from llm_orchestrator.engine.attempt import GENERATIONS
from llm_orchestrator.model import Entry, Json, Kind, RunState
from llm_orchestrator.server.feed import Told
from llm_orchestrator.server.streams_entries import Ends, Event, shown, text_of
from llm_orchestrator.server.streams_text import Held, Position, common, is_of, proved
from llm_orchestrator.store.base import Progress
from llm_orchestrator.store.journal import decode

PIECE_CHARS_MAX = 16 * 1024
HELD_CHARS_MAX = 4 * 1024 * 1024
"""Mirrored per stream; a step beyond it comes whole when it is finished."""
LOOKS_MAX = 12
"""How often a text that is kept is asked for a position that it does not reach yet."""


class Doubt(Enum):
    """Whether the mirror is what the reader holds, and of which text."""

    NONE = "none"
    OTHERS = "others"
    """The mirror is right, but it may be another life's text: compare it."""
    UNKNOWN = "unknown"
    """The reader came back: what it holds is not known."""


@dataclass(slots=True)
class _Text:
    """One step's text on its way to the reader."""

    held: Held
    doubt: Doubt
    attempt: int = 1
    row: int = 0
    is_told: bool = False
    """The row is what the engine said; what the store has may be older."""
    epoch: int = 0
    pending: list[tuple[int, str]] = field(default_factory=list)
    """Pieces that came live behind a gap, in order."""
    looks: int = 0
    is_gone: bool = False
    """The store has nothing of it: it is void, or its step is finished, as an entry will say."""
    is_given_up: bool = False
    """Too large to mirror: the rest comes with the result."""

    def pend(self, offset: int, piece: str) -> None:
        """Keep a piece until the gap before it is closed."""
        if self.pending:
            start, text = self.pending[-1]
            if start + len(text) == offset:
                self.pending[-1] = (start, text + piece)
                return
        self.pending.append((offset, piece))

    def void(self, offset: int) -> None:
        """Pieces from `offset` on will come again."""
        kept = [(start, text) for start, text in self.pending if start < offset]
        self.pending = [(start, text[: offset - start]) for start, text in kept]


class Reader:
    """See the module's docstring.

    `step`: tell of this step only. `text_step`: of all entries, but of this step's text only.
    """

    def __init__(
        self,
        after: Position | None = None,
        *,
        step: str | None = None,
        has_text: bool = True,
        text_step: str | None = None,
    ) -> None:
        self._after = after
        self._step = step
        self._has_text = has_text
        self._text_step = step if text_step is None else text_step
        self._read = 0
        self._texts: dict[str, _Text] = {}
        self._settled: dict[str, tuple[int, int]] = {}
        """Steps whose text the reader holds as recorded, and the seq and epoch of that entry."""
        self.seq = after.seq if after else 0
        self.epoch = 0
        self.state = RunState.PENDING
        self.in_flight: dict[str, int] = {}
        """Steps with an open attempt, and its number."""
        self.has_ended = False
        self._begun: set[str] = set()
        """Steps that have begun and are not finished."""
        self._is_taken_over = False
        """Somebody claimed the run after the position that the reader brought."""
        self._ends = Ends(step)

    # -- what there is to look at --------------------------------------------------------------

    def wants(self, *, is_live: bool) -> list[str]:
        """Steps whose kept text should be read; `is_live`: the engine's words come here, too."""
        if not self._has_text:
            return []
        gaps = [step for step, text in self._texts.items() if text.pending]
        wanted = (step for step in {**self.in_flight, **dict.fromkeys(gaps)})
        return [step for step in wanted if self._is_wanted(step) and self._lacks(step, is_live)]

    def _lacks(self, step: str, is_live: bool) -> bool:
        text = self._texts.get(step)
        if text is None:
            return True
        if text.is_given_up:
            return False
        is_untold = not text.looks and not len(text.held)
        return not is_live or is_untold or bool(text.pending) or text.doubt is not Doubt.NONE

    # -- the three sources ---------------------------------------------------------------------

    def told(self, told: Told) -> Iterator[Event]:
        """The engine's word: a chunk or a reset of a step that is driven here."""
        if not (self._has_text and self._is_wanted(told.step)):
            return
        row, epoch = int(told.data.get("row", 0)), int(told.data.get("epoch", 0))
        if epoch < self.epoch or (
            told.step in self._settled and epoch <= self._settled[told.step][1]
        ):
            return  # the last words of a life that is over
        text = self._text(told.step)
        offset = int(told.data["offset"])
        is_first = epoch != text.epoch
        if is_first:  # the first word of a life says where its text stands
            text.pending.clear()
            if len(text.held) and text.doubt is Doubt.NONE:
                text.doubt = Doubt.OTHERS
        text.attempt, text.row, text.epoch, text.is_told = told.attempt, row, epoch, True
        if told.what == "reset" or (is_first and offset < len(text.held)):
            yield from self._void(text, offset)
        if told.what == "chunk":
            yield from self._piece(text, offset, str(told.data["text"]))

    def kept(self, step: str, progress: Progress | None) -> Iterator[Event]:
        """A step's text as the store has it, read before the entries that follow."""
        if not (self._has_text and self._is_wanted(step)) or step in self._settled:
            return
        text = self._text(step)
        if step not in self.in_flight and not text.pending:
            return  # it was in flight when somebody went to look
        text.looks += 1
        if progress is None:
            is_hopeless = text.doubt is Doubt.UNKNOWN and text.looks > LOOKS_MAX
            text.is_gone = is_hopeless or bool(len(text.held) and not text.is_told)
            return
        if text.is_given_up or (text.is_told and progress.attempt < text.row):
            return
        text.attempt = max(1, progress.attempt // GENERATIONS)
        if text.doubt is Doubt.UNKNOWN:
            if self._must_wait(text, progress.text):
                return
            yield from self._believe(text, progress.text)
        text.is_told = text.is_told and progress.attempt == text.row
        same = common(text.held.text, progress.text)
        if same < len(text.held) and (same < len(progress.text) or not text.is_told):
            yield self._reset(text, same)
        text.row, text.doubt = progress.attempt, Doubt.NONE
        yield from self._chunks(text, progress.text[len(text.held) :])
        yield from self._drain(text)

    def journal(self, entries: Iterable[Entry]) -> Iterator[Event]:
        """Entries in order, from any number on; those that were given before are left out."""
        for entry in entries:
            if entry.seq <= self._read:
                continue
            self._read = entry.seq
            data = decode(entry.payload)
            is_new = entry.seq > self.seq
            yield from self._enter(entry, data, is_new=is_new)
            if is_new:
                self.seq = entry.seq
                if self._step is None or entry.step == self._step:
                    yield Event(entry.kind, str(entry.seq), shown(entry, data))
        self.seq = min(self.seq, self._read)
        yield from self._forget_void()
        last = self._ends.last(self.seq)
        if last is not None:
            self.has_ended = True
            yield last

    # -- entries -------------------------------------------------------------------------------

    def _enter(self, entry: Entry, data: dict[str, Json], *, is_new: bool) -> Iterator[Event]:
        """What an entry means for texts, before it is told itself."""
        step, kind = entry.step, Kind(entry.kind)
        if kind is Kind.CLAIMED:
            self.state = RunState.RUNNING
            self._is_taken_over = self._is_taken_over or is_new
            self._take_over(entry.epoch)
        elif kind is Kind.STATE:
            self.state = RunState(data["state"])
        elif kind is Kind.INTENT:
            self.in_flight[step] = entry.attempt
            self._begun.add(step)
        elif kind is Kind.ATTEMPT_FAILED or (kind is Kind.PROGRESS and "unsent" in data):
            self.in_flight.pop(step, None)
        elif kind is Kind.STEP_FINISHED:
            self.in_flight.pop(step, None)
            self._begun.discard(step)
            yield from self._settle(entry, data, is_new=is_new)
        elif kind is Kind.REWOUND:
            if not data.get("is_repair"):
                self.state = RunState.PENDING
            yield from self._rewind(int(data.get("to_seq", entry.seq)), is_new=is_new)
        self._ends.note(entry, data)

    def _take_over(self, epoch: int) -> None:
        self.epoch = epoch
        for text in self._texts.values():
            if text.epoch < epoch:
                text.is_told = False
                text.pending.clear()
                if text.doubt is Doubt.NONE:
                    text.doubt = Doubt.OTHERS

    def _settle(self, entry: Entry, data: dict[str, Json], *, is_new: bool) -> Iterator[Event]:
        """The reader gets what it lacks of a recorded text."""
        step = entry.step
        recorded = text_of(data.get("result"), is_known=step in self._texts)
        if recorded is None or not (self._has_text and self._is_wanted(step)):
            self._texts.pop(step, None)
            return
        if is_new:
            text = self._text(step)
            text.attempt = entry.attempt
            if text.doubt is Doubt.UNKNOWN:
                yield from self._believe(text, recorded)
            same = common(text.held.text, recorded)
            if same < len(text.held):
                yield self._reset(text, same)
            text.is_given_up = False
            yield from self._chunks(text, recorded[len(text.held) :], is_last=True)
        self._texts.pop(step, None)
        self._settled[step] = (entry.seq, entry.epoch)

    def _rewind(self, to_seq: int, *, is_new: bool) -> Iterator[Event]:
        """Texts behind the point are void, and their steps may come again."""
        for step, (seq, _) in list(self._settled.items()):
            if seq <= to_seq:
                continue
            del self._settled[step]
            if is_new and step not in self._texts:  # else its next life has begun already
                text = self._text(step)
                text.doubt = Doubt.NONE
                yield self._reset(text, 0)
        begun, self._begun = self._begun, set()
        self.in_flight.clear()
        for step in begun if is_new and self._has_text else ():
            if self._is_wanted(step) and (step in self._texts or self._after is not None):
                text = self._text(step)
                if text.epoch <= self.epoch:  # else its next life has begun already
                    yield from self._void(text, 0)

    # -- text ----------------------------------------------------------------------------------

    def _is_wanted(self, step: str) -> bool:
        return self._text_step is None or step == self._text_step

    def _text(self, step: str) -> _Text:
        found = self._texts.get(step)
        if found is None:
            is_sure = self._after is None and step not in self._settled
            doubt = Doubt.NONE if is_sure else Doubt.UNKNOWN
            found = self._texts[step] = _Text(Held(step), doubt, epoch=self.epoch)
        return found

    def _must_wait(self, text: _Text, kept: str) -> bool:
        """The reader may hold more than is kept: in the same life the rest is about to come."""
        after = self._after
        if after is None or not is_of(after, text.held.step) or text.looks > LOOKS_MAX:
            return False
        return len(kept) < after.offset and not self._is_taken_over

    def _believe(self, text: _Text, known: str) -> Iterator[Event]:
        """Take a reader that came back at its word as far as it proves it."""
        after = self._after or Position()
        offset = proved(after, text.held.step, known)
        text.held = Held(text.held.step, known[: max(0, offset)])
        text.doubt = Doubt.NONE
        if offset != after.offset:
            yield self._reset(text, max(0, offset))

    def _forget_void(self) -> Iterator[Event]:
        """Nothing was kept of these, and no entry has said since that they are finished."""
        for text in self._texts.values():
            if text.is_gone:
                text.is_gone, text.doubt = False, Doubt.NONE
                yield self._reset(text, 0)

    def _void(self, text: _Text, offset: int) -> Iterator[Event]:
        """The text ends at `offset` for now."""
        text.void(offset)
        if text.doubt is Doubt.UNKNOWN:
            if offset == 0:
                text.doubt = Doubt.NONE
                yield self._reset(text, 0)
        elif offset < len(text.held):
            yield self._reset(text, offset)
        if offset == 0:
            text.doubt = Doubt.NONE

    def _piece(self, text: _Text, offset: int, piece: str) -> Iterator[Event]:
        """A piece of the living text."""
        if text.is_given_up:
            return
        if text.doubt is Doubt.UNKNOWN and offset == 0:
            yield from self._void(text, 0)
        have = len(text.held)
        if text.doubt is Doubt.UNKNOWN or offset > have:
            text.pend(offset, piece)
            return
        behind = piece[: have - offset]
        if text.held.text[offset : offset + len(behind)] != behind:
            yield self._reset(text, offset)
            behind = ""
        yield from self._chunks(text, piece[len(behind) :])
        yield from self._drain(text)

    def _drain(self, text: _Text) -> Iterator[Event]:
        """Pieces whose gap is closed."""
        while text.pending and text.pending[0][0] <= len(text.held):
            offset, piece = text.pending.pop(0)
            yield from self._piece(text, offset, piece)

    def _chunks(self, text: _Text, piece: str, *, is_last: bool = False) -> Iterator[Event]:
        total = sum(len(other.held) for other in self._texts.values())
        if not is_last and total + len(piece) > HELD_CHARS_MAX:
            text.is_given_up = True
            text.pending.clear()
            return
        for start in range(0, len(piece), PIECE_CHARS_MAX):
            part = piece[start : start + PIECE_CHARS_MAX]
            offset = len(text.held)
            text.held.add(part)
            data = {"step": text.held.step, "attempt": text.attempt, "offset": offset, "text": part}
            yield Event("chunk", self._id(text), data)

    def _reset(self, text: _Text, offset: int) -> Event:
        text.held.cut(offset)
        data = {"step": text.held.step, "attempt": text.attempt, "offset": offset}
        return Event("reset", self._id(text), data)

    def _id(self, text: _Text) -> str:
        return f"{self.seq}.{text.attempt}.{len(text.held)}.{text.held.proof()}"
