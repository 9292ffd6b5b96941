"""What operators and other programs ask of a run: one place for command line, API and code.

Who may write what (DESIGN: the journal decides): a run that somebody drives is asked through its
inbox; one that nobody drives is changed directly, by an entry that the writing statement fences.
Both may happen at once; then the entry that lands first wins and the other request is looked at
again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from llm_orchestrator.clock import Clock, new_run_id
from llm_orchestrator.engine.acceptance import (
    KEY_RECORD,
    accepted_draft,
    from_accepted,
    in_trace,
    is_repeat,
    key_of,
    key_record,
    without_secrets,
)
from llm_orchestrator.engine.driver import End, news
from llm_orchestrator.engine.forks import free, kept_before
from llm_orchestrator.engine.machine import TRANSITIONS, Event, Happening, decide
from llm_orchestrator.engine.replay import Fold, checkpoints, fold
from llm_orchestrator.errors import KeyReused, NotFound, Overtaken, Refused, StoreDamaged
from llm_orchestrator.model import (
    MICROSECONDS,
    Draft,
    Entry,
    Journal,
    Json,
    Kind,
    NewRun,
    RunState,
    Workflow,
)
from llm_orchestrator.store.base import (
    Append,
    Batch,
    Change,
    Outcome,
    Post,
    Register,
    RunFilter,
    StateChange,
    Store,
)
from llm_orchestrator.store.journal import encode_clean, link
from llm_orchestrator.store.writer import Head
from llm_orchestrator.telemetry.metrics import Metrics
from llm_orchestrator.telemetry.redact import redact_data

RESTORED = "restored"
"""`kind` of the error with which a restore holds a run."""
_TRIES = 5
_REQUESTS = {Event.CANCEL: "cancel", Event.PAUSE: "pause", Event.REWIND: "rewind"}
Choice = Literal["retry", "finished", "failed"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a request. `is_done` False: it was handed to whoever drives the run."""

    run_id: str
    state: RunState
    is_done: bool
    message: str


async def read_journal(store: Store, run_id: str) -> Journal:
    """A run's journal, whole. Raises NotFound, or StoreDamaged with the command that mends it."""
    journal = (await store.look.load([run_id])).get(run_id)
    if journal is None:
        raise NotFound(f"there is no run {run_id}", hint="llmo runs list")
    damaged = [flaw for flaw in journal.flaws if flaw.seq]  # others are not of the journal
    if damaged:
        flaw = damaged[0]
        raise StoreDamaged(
            f"run {run_id} is damaged at entry {flaw.seq}: {flaw.what}",
            run_id=run_id,
            hint=f"llmo journal repair {run_id} --dry-run",
        )
    return journal


def is_held_by_restore(state: Fold) -> bool:
    """True for a run that was put back to a point before some of its effects (recovery/beyond)."""
    error = state.error if isinstance(state.error, dict) else {}
    return state.state is RunState.PAUSED and error.get("kind") == RESTORED


class Operator:
    """Requests, each fenced by the journal."""

    def __init__(self, store: Store, clock: Clock, *, metrics: Metrics | None = None) -> None:
        self._store = store
        self._clock = clock
        self._metrics = metrics or Metrics()

    async def accept(self, new: NewRun, *, register: Workflow | None = None) -> str:
        """Make a run durable without driving it; whoever serves the store claims it. Its id.

        With an idempotency key that was used before, the first run's id. Raises Refused when that
        one had another input.
        """
        new = in_trace(new)
        changes: list[Change] = [] if register is None else [Register(register)]
        if new.idempotency_key is not None:
            changes.append(key_record(new))
        new = without_secrets(new)
        drafts = [accepted_draft(new)]
        fresh = Head(new.run_id, self._store.generation << 40)
        append = self._chain(fresh, drafts, accept=new)._replace(changes=tuple(changes))
        receipt = await self._store.commit(Batch(appends=(append,)))
        if new.run_id not in receipt.refused:
            return new.run_id
        earlier = await self.earlier(new)
        if earlier is None:
            raise Refused(f"run {new.run_id} conflicts with what is stored")
        return earlier

    async def earlier(self, new: NewRun) -> str | None:
        """The run that a request with this idempotency key has started; None when there is none.

        Raises KeyReused when that was another request.
        """
        if new.idempotency_key is None:
            return None
        found, _ = await self._store.shelf.record(KEY_RECORD, key_of(new))
        if found is None:
            return None
        if not is_repeat(found, new):
            raise KeyReused(new.idempotency_key, str(found["run_id"]))
        return str(found["run_id"])

    async def cancel(self, run_id: str, *, by: str = "operator") -> Answer:
        """End it for good; its children too."""
        answer = await self._ask(run_id, Happening(Event.CANCEL, "requested", data={"by": by}))
        if answer.is_done:
            wanted = RunFilter(parent_run_id=run_id, limit=100_000)
            for child in await self._store.look.runs(wanted):
                if not child.state.is_final:
                    await self.cancel(child.run_id, by=f"parent {run_id}")
        return answer

    async def pause(self, run_id: str, *, by: str = "operator") -> Answer:
        """Let steps in flight end, then hold it until `resume`."""
        return await self._ask(run_id, Happening(Event.PAUSE, "operator", data={"by": by}))

    async def resume(self, run_id: str, *, by: str = "operator") -> Answer:
        """Let a paused run go on."""
        state = await self.state(run_id)
        if is_held_by_restore(state):
            raise Refused(
                f"run {run_id} is held: what it did after the restored point is for you to judge",
                hint=f"llmo recovery reconcile accept {run_id}, or rerun",
            )
        if state.state is RunState.PAUSED and state.reason == "unknown_outcome":
            open_steps = ", ".join(state.intents)
            raise Refused(
                f"run {run_id} is paused because the outcome of {open_steps} is unknown",
                hint=f"llmo runs resume {run_id} --step STEP --as retry|finished|failed",
            )
        return await self._ask(run_id, Happening(Event.RESUME, data={"by": by}))

    async def decide(
        self, run_id: str, step: str, choose: Choice, *, result: Json = None, by: str = "operator"
    ) -> Answer:
        """Say what became of a step whose outcome is unknown, and let the run go on."""
        state = await self.state(run_id)
        if state.state is not RunState.PAUSED:
            raise Refused(f"run {run_id} is {state.state}, not paused")
        if step not in state.intents:
            raise NotFound(
                f"run {run_id} has no step {step!r} with an unknown outcome; "
                f"there is: {', '.join(state.intents) or 'none'}"
            )
        data: dict[str, Json] = {"choose": choose, "result": result, "by": by}
        drafts = (Draft(Kind.DECISION, step, 0, encode_clean(data)),)
        return await self._append(state, Happening(Event.RESUME, data={"by": by}), drafts)

    async def retry(self, run_id: str, *, by: str = "operator") -> Answer:
        """Run a failed run again from the steps that failed; finished steps stand."""
        return await self._ask(run_id, Happening(Event.RETRY, data={"by": by}))

    async def rewind(self, run_id: str, to_seq: int, *, by: str = "operator") -> Answer:
        """Go back to a checkpoint; what came after is hidden, never deleted."""
        journal = await read_journal(self._store, run_id)
        points = {entry.seq for entry in checkpoints(journal.entries)} | {1}
        if to_seq not in points:
            known = ", ".join(f"{run_id}:{seq}" for seq in sorted(points)[-5:])
            raise NotFound(f"{run_id}:{to_seq} is no checkpoint; the last ones are {known}")
        data: dict[str, Json] = {"to_seq": to_seq, "by": by}
        return await self._ask(run_id, Happening(Event.REWIND, "operator", data=data))

    async def signal(
        self, run_id: str, name: str, payload: Json = None, *, sender_key: str | None = None
    ) -> Answer:
        """Hand a message to a run. The same `sender_key` again changes nothing."""
        state = await self.state(run_id)
        if state.state.is_final:
            raise Refused(f"run {run_id} is {state.state} and takes no signals")
        post = Post(run_id, "signal", name, redact_data(payload), sender_key)
        await self._store.commit(Batch(changes=(post,)))
        return Answer(run_id, state.state, True, f"signal {name} is in the inbox of {run_id}")

    async def approve(
        self, run_id: str, step: str | None, *, approved: bool, form: Json = None, by: str
    ) -> Answer:
        """Answer an approval step; `step` may be left out when the run waits for one only."""
        state = await self.state(run_id)
        waiting = [
            key
            for key, wait in state.waits.items()
            if str(wait.get("name", "")).startswith("approval:") and key not in state.signals
        ]
        if step is None and len(waiting) == 1:
            step = waiting[0]
        if step not in waiting:
            raise NotFound(
                f"run {run_id} does not wait for approval of {step or 'one step'}; "
                f"it waits for: {', '.join(waiting) or 'none'}"
            )
        payload = {"approved": approved, "form": form, "by": by}
        return await self.signal(run_id, f"approval:{step}", payload)

    async def register(self, workflow: Workflow) -> None:
        """Keep a definition, and its schedule if it has one: an older version's is replaced."""
        changes: list[Change] = [Register(workflow)]
        schedule = json.loads(workflow.definition).get("schedule")
        if schedule is not None:
            from llm_orchestrator.engine.schedule import KIND, schedule_record  # noqa: PLC0415

            _, version = await self._store.shelf.record(KIND, workflow.name)
            changes.append(
                schedule_record(
                    (workflow.name, workflow.version, workflow.digest),
                    cron=schedule["cron"],
                    timezone=schedule.get("timezone", "UTC"),
                    backfill=schedule.get("backfill", "none"),
                    inputs=schedule.get("inputs", {}),
                    now_us=self._clock.now_us(),
                    version=version,
                )
            )
        await self._store.commit(Batch(changes=changes))

    async def fork(
        self,
        run_id: str,
        step: str | None,
        *,
        inputs: Mapping[str, Json] | None = None,
        edit: Callable[[NewRun], NewRun] | None = None,
    ) -> str:
        """A new run that shares the results before `step` and may have other inputs; its id.

        `edit` has the last word: it may choose another version, or check the inputs.
        """
        journal = await read_journal(self._store, run_id)
        state = fold(run_id, journal.entries)
        origin = from_accepted(run_id, state.accepted)
        kept = kept_before(journal.entries, state, step)
        value = origin.input
        if inputs:
            if not isinstance(value, dict):
                raise Refused(f"the input of {run_id} is no object; it cannot be edited by name")
            value = {**value, **inputs}
        new = replace(
            origin,
            run_id=new_run_id(self._clock),
            input=value,
            idempotency_key=None,
            parent_run_id=None,
            wake_at=0,
            origin={"fork": run_id, "step": step},
        )
        new = in_trace(new)
        if edit is not None:
            new = edit(new)
        new = without_secrets(new)
        drafts = [accepted_draft(new)]
        drafts += [
            Draft(entry.kind, entry.step, entry.attempt, free(entry.payload)) for entry in kept
        ]
        fresh = Head(new.run_id, self._store.generation << 40)
        append = self._chain(fresh, drafts, accept=new)
        await self._commit(append)
        return new.run_id

    # -- how ----------------------------------------------------------------------------------

    async def state(self, run_id: str) -> Fold:
        """Where a run stands, by its checked journal. Raises NotFound or StoreDamaged."""
        return fold(run_id, (await read_journal(self._store, run_id)).entries)

    async def _ask(self, run_id: str, happening: Happening) -> Answer:
        for _ in range(_TRIES):
            state = await self.state(run_id)
            if happening.event not in TRANSITIONS[state.state]:
                raise Refused(
                    f"run {run_id} is {state.state}; it takes no {happening.event}",
                    hint=f"llmo runs explain {run_id}",
                )
            if state.state is RunState.RUNNING:
                return await self._post(state, happening)
            try:
                return await self._append(state, happening, ())
            except Overtaken:
                continue  # somebody claimed or changed it meanwhile: look again
        raise Overtaken(f"run {run_id} keeps changing hands", run_id=run_id, epoch=state.epoch)

    async def _post(self, state: Fold, happening: Happening) -> Answer:
        kind = _REQUESTS[happening.event]
        post = Post(state.run_id, kind, payload=dict(happening.data))
        await self._store.commit(Batch(changes=(post,)))
        return Answer(
            state.run_id, state.state, False, f"{kind} requested; the engine that runs it will obey"
        )

    async def _append(self, state: Fold, happening: Happening, drafts: tuple[Draft, ...]) -> Answer:
        decision = decide(state.state, state.epoch, happening)
        head = Head(state.run_id, decision.epoch, seq=state.seq, digest=state.digest)
        append = self._chain(head, [*drafts, decision.draft], change=decision.change)
        parent = state.accepted.get("parent_run_id")
        changes: tuple[Change, ...] = ()
        if parent and decision.state.is_final:
            end = End(state.run_id, decision.state, decision.change.reason, error=decision.error)
            changes = (news(parent, end),)
        await self._commit(append._replace(changes=changes) if changes else append)
        if decision.state.is_final:
            took_s = (self._clock.now_us() - state.created_at) / MICROSECONDS
            self._metrics.run_ended(str(state.accepted["workflow"]), decision.state.value, took_s)
        return Answer(state.run_id, decision.state, True, f"run is {decision.state}")

    def _chain(
        self,
        head: Head,
        drafts: Sequence[Draft],
        *,
        accept: NewRun | None = None,
        change: StateChange | None = None,
    ) -> Append:
        """Entries after `head`, with their digests: what a node's writer gives at flush."""
        entries, now, seq, digest = [], self._clock.now_us(), head.seq, head.digest
        for draft in drafts:
            seq += 1
            columns = (seq, head.epoch, *draft)
            digest = link(digest, head.run_id, columns)
            entries.append(Entry(head.run_id, *columns, digest, now))
        return Append(head.run_id, head.seq, head.digest, tuple(entries), accept, change)

    async def _commit(self, append: Append) -> None:
        receipt = await self._store.commit(Batch(appends=(append,)))
        outcome = receipt.refused.get(append.run_id, Outcome.LANDED)
        if outcome is not Outcome.LANDED:
            found = await self._store.look.run(append.run_id)
            raise Overtaken(
                f"run {append.run_id} changed meanwhile ({outcome})",
                run_id=append.run_id,
                epoch=found.epoch if found else 0,
            )
