"""What a leaf step sees of the engine, and what of its work goes into the journal.

A streamed answer is kept while it comes: every CHECKPOINT_S the new text goes to the `progress`
table (outside the chain: losing it costs money, never truth). An attempt that follows an
interrupted one gets what was kept as `partial`; readers are told from where the answer goes on.
Neither they nor the table see a secret that this process knows, whole or cut by two pieces: what
may be the beginning of one is held back until the next piece tells.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from llm_orchestrator.clock import Clock
from llm_orchestrator.engine.execution import Execution, Extras
from llm_orchestrator.model import Json, Usage
from llm_orchestrator.providers.base import Partial, Providers, Resume
from llm_orchestrator.store.base import Batch, Change, DropProgress, PutProgress, PutRecord
from llm_orchestrator.telemetry.redact import Veil, redact_data

CHECKPOINT_S = 1.0
GENERATIONS = 1_000
"""Streams of one attempt that were begun anew are told apart by the last digits of its number."""
OUTBOX = "outbox"


class Attempt(Extras):
    """One step's StepContext over all attempts that this process makes of it."""

    def __init__(
        self,
        execution: Execution,
        step: str,
        providers: Providers,
        *,
        check_budget: Callable[[], None] | None = None,
        spend: Callable[[Usage], None] | None = None,
        ask: Callable[[], Awaitable[dict[str, Json] | None]] | None = None,
    ) -> None:
        self.run_id = execution.run_id
        self.step = step
        self.attempt = 0
        self.idempotency_key = execution.idempotency_key(step)
        self.clock: Clock = execution.services.clock
        self.providers = providers
        self.partial: Partial | None = None
        self._execution = execution
        self._check_budget = check_budget
        self._spend = spend
        self._ask = ask
        self._usage = Usage()
        self._notes: dict[str, Json] = {}
        self._started = 0.0
        self._stream = _Stream()
        self._voids = 0
        """How often a text was taken back that somebody may have read."""
        self._is_fresh = True
        self.asked: tuple[str, ...] = ("", "")
        """Which provider and model the step names; a fallback may have answered."""

    async def begin(self, attempt: int) -> None:
        """Before each attempt: forget the last one's facts, keep its half answer."""
        self.attempt = attempt
        self._usage, self._notes = Usage(), {}
        self._started = self.clock.monotonic()
        if self._is_fresh:
            self._is_fresh = False
            await self._recover()
        self.partial = self._stream.partial()
        if self.partial is not None:
            self._tell("reset", {"offset": len(self.partial.text)})

    async def _recover(self) -> None:
        fold = self._execution.fold
        if self.step not in fold.intents and self.step not in fold.failures:
            if self.step in fold.redone:  # pieces of an answer that a rewind took back
                self._append((DropProgress(self.run_id, self.step),))
            return
        kept = await self._execution.services.look.progress(self.run_id, self.step)
        if kept is not None:
            facts = kept.handle if isinstance(kept.handle, dict) else {}
            # Its rows get a number of their own: an earlier life may have kept more than was read.
            own = max(0, kept.attempt - self.attempt * GENERATIONS + 1)
            handle, tokens = facts.get("handle") or {}, facts.get("tokens", 0)
            self._voids = int(facts.get("voids", 0))
            self._stream = _Stream(kept.text, handle, tokens, generation=own)
            self._stream.parts = 1  # something is there to drop

    # -- StepContext ---------------------------------------------------------------------------

    async def emit(self, text: str) -> None:
        """Show a piece to readers; keep it with the next checkpoint."""
        stream = self._stream
        stream.tokens += 1
        self._show(stream.veil.push(text))
        now = self.clock.monotonic()
        if now - stream.checkpoint_at >= CHECKPOINT_S:
            stream.checkpoint_at = now
            self._checkpoint()

    def _show(self, text: str) -> None:
        if text:
            self._tell("chunk", {"text": text, "offset": self._stream.add(text)})

    async def reset_stream(self) -> None:
        """Void what was shown and kept."""
        had_parts = self._stream.parts
        self._voids += bool(self._stream.text)
        self._stream = _Stream(generation=self._stream.generation + 1)
        self.partial = None
        if had_parts:
            self._append((DropProgress(self.run_id, self.step),))
        self._tell("reset", {"offset": 0})

    def keep_handle(self, handle: Mapping[str, Json]) -> None:
        """Kept at once: without it a crash before the first checkpoint could not attach.

        One that differs only in how far the answer has come waits for the next checkpoint.
        """
        is_news = not self._stream.parts or _lasting(handle) != _lasting(self._stream.handle)
        self._stream.handle = dict(handle)
        if is_news:
            self._checkpoint()

    def add_usage(self, usage: Usage) -> None:
        self._usage = self._usage + usage
        if self._spend is not None:
            self._spend(usage)
        told = self._execution.services.spent
        if told is not None:
            queue = str(self._execution.fold.accepted["queue"])
            told(queue, usage.input_tokens + usage.output_tokens)

    def note(self, key: str, value: Json) -> None:
        self._notes[key] = value

    async def post_outbox(self, name: str, payload: Json) -> None:
        """Once per step and name: an entry that is there already stays as it is."""
        clean = redact_data(payload)
        record = PutRecord(OUTBOX, f"{self.idempotency_key}/{name}", clean, 0)
        await self._execution.services.commit(Batch(changes=(record,)))

    # -- Extras --------------------------------------------------------------------------------

    def data(self) -> dict[str, Json]:
        facts: dict[str, Json] = {"ms": round((self.clock.monotonic() - self._started) * 1000)}
        if self._usage != Usage():
            facts["usage"] = self._usage.to_json()
        if self._notes:
            facts["notes"] = dict(self._notes)
        if self._voids:
            facts["voids"] = self._voids
        return facts

    def changes(self) -> Sequence[Change]:
        self._show(self._stream.veil.rest())
        return (DropProgress(self.run_id, self.step),) if self._stream.parts else ()

    async def probe(self) -> dict[str, Json] | None:
        return await self._ask() if self._ask is not None else None

    def interrupted(self) -> None:
        if self._stream.saved < len(self._stream.text):
            self._checkpoint()

    def respent(self) -> None:
        used, resume = self._usage, self._notes.get("resume")
        if resume == Resume.ATTACH:
            return  # the first answer itself was fetched
        tokens, cost_usd = used.input_tokens + used.output_tokens, used.cost_usd
        if resume in (Resume.PREFILL, Resume.CONTINUE_TURN):  # the rest of it is new
            # By tokens: output is dearer than input, so this is not less than what it was.
            cost_usd *= used.input_tokens / max(1, tokens)
            tokens = used.input_tokens
        handle = self._stream.handle
        provider, model = handle.get("provider", self.asked[0]), handle.get("model", self.asked[1])
        self._execution.services.metrics.respent(
            str(provider), str(model), tokens=tokens, cost_usd=cost_usd
        )

    def before(self) -> None:
        if self._check_budget is not None:
            self._check_budget()

    # -- how -----------------------------------------------------------------------------------

    @property
    def _row(self) -> int:
        """The number under which this text is kept."""
        return self.attempt * GENERATIONS + self._stream.generation

    def _tell(self, what: str, data: dict[str, Json]) -> None:
        """To readers: what came, and of which text: two lives may give different ones."""
        execution = self._execution
        if execution.services.publish is not None:
            data["row"], data["epoch"] = self._row, execution.head.epoch
            execution.publish(what, self.step, data, attempt=self.attempt)

    def _checkpoint(self) -> None:
        stream = self._stream
        facts: dict[str, Json] = {"tokens": stream.tokens, "handle": stream.handle}
        if self._voids:
            facts["voids"] = self._voids
        part = PutProgress(
            self.run_id,
            self.step,
            self._row,
            stream.parts,
            stream.take_new(),
            redact_data(facts),
        )
        stream.parts += 1
        self._append((part,))

    def _append(self, changes: Sequence[Change]) -> None:
        execution = self._execution
        execution.services.writer.append(execution.head, (), changes=changes)


def _lasting(handle: Mapping[str, Json]) -> dict[str, Json]:
    """A handle without what grows with each piece (providers say it with every one)."""
    own = handle.get("handle")
    inner = {key: own[key] for key in own if key != "output_tokens"} if own else {}
    return {**handle, "handle": inner}


class _Stream:
    """One answer as far as it has come."""

    __slots__ = (
        "checkpoint_at",
        "generation",
        "handle",
        "parts",
        "pieces",
        "saved",
        "text",
        "tokens",
        "veil",
    )

    def __init__(
        self,
        text: str = "",
        handle: Mapping[str, Any] | None = None,
        tokens: int = 0,
        *,
        generation: int = 0,
    ) -> None:
        self.text = text
        self.pieces: list[str] = []
        self.handle: Mapping[str, Any] = handle or {}
        self.tokens = tokens
        self.parts = 0
        self.generation = generation
        self.saved = 0
        self.checkpoint_at = 0.0
        self.veil = Veil()

    def add(self, piece: str) -> int:
        offset = len(self.text)
        self.text += piece
        return offset

    def take_new(self) -> str:
        """The text since the last checkpoint; all of it at the first one of an attempt."""
        new, self.saved = self.text[self.saved :], len(self.text)
        return new

    def partial(self) -> Partial | None:
        """For the next attempt, whose own rows begin with all that is kept."""
        self.saved = 0
        self.veil.drop()
        if not self.text and not self.handle:
            return None
        return Partial(self.text, self.tokens, dict(self.handle))
