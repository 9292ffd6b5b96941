"""Scenarios around the journal's key: who may append, and who is told what.

Each returns who came first, so that a test can ask whether every case was met.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from llm_orchestrator.engine.control import Operator
from llm_orchestrator.errors import Refused, StoreError
from llm_orchestrator.model import Entry, RunState
from llm_orchestrator.store.base import Append, Batch, Outcome, Post, Store
from tests.store.interleavings.stepper import expect
from tests.store.interleavings.world import Node, Scenario, Trial
from tests.store.support import (
    HandClock,
    Writer,
    accepted,
    accepting,
    claim,
    draft,
    land,
    moved,
    new_run,
    outcome,
    state,
)

TakeOver = Callable[[Node, str], Awaitable[Sequence[Entry]]]
"""Takes a run over from whoever drives it; the journal as the new owner then knows it."""
Step = Callable[[Node, Append], Awaitable[Outcome]]
LATE = "late"


# -- what nodes do ---------------------------------------------------------------------------------


def claimed(writer: Writer, owner: str) -> Append:
    """A claim from where `writer` stands, under the next epoch."""
    writer.epoch += 1
    entry, change = claim(owner)
    return writer.append(entry, change=change)


async def driven(trial: Trial, owner: str) -> Writer:
    """A run that `owner` drives."""
    writer = await accepted(trial.store)
    assert await outcome(trial.store, claimed(writer, owner)) is Outcome.LANDED
    return writer


async def entries_of(store: Store, run_id: str) -> list[Entry]:
    return list((await store.look.load([run_id]))[run_id].entries)


async def claim_over(node: Node, run_id: str) -> Sequence[Entry]:
    """As nodes take runs over: look, claim; whoever was not quick enough looks again."""
    while True:
        known = await entries_of(node, run_id)
        writer = Writer(run_id, epoch=known[-1].epoch)
        writer.seq, writer.digest = known[-1].seq, known[-1].digest
        append = claimed(writer, node.node_id)
        if await outcome(node, append) is Outcome.LANDED:
            return [*known, *append.entries]


async def expect_whole(trial: Trial, run_id: str) -> list[Entry]:
    """What is stored of a run, in one chain whose epochs do not fall."""
    journal = (await trial.store.look.load([run_id]))[run_id]
    flaws = "; ".join(f"{flaw.what} ({flaw.seq})" for flaw in journal.flaws)
    expect(not flaws, f"the journal is one chain: {flaws}")
    epochs = [entry.epoch for entry in journal.entries]
    expect(epochs == sorted(epochs), "no entry stands behind one of a later epoch")
    return list(journal.entries)


# -- accepting -------------------------------------------------------------------------------------


async def accept_one_id(trial: Trial) -> object:
    """Two runs of one id: one of them exists, whole."""
    a, b = await trial.node("a"), await trial.node("b")
    _, one = accepting(new_run(1, workflow="one"))
    _, two = accepting(new_run(1, workflow="two"))
    got = await trial.run(a=lambda: outcome(a, one), b=lambda: outcome(b, two))
    expect(set(got.values()) == {Outcome.LANDED, Outcome.CONFLICT}, f"one is accepted: {got}")
    first = "a" if got["a"] is Outcome.LANDED else "b"
    row = await trial.store.look.run(one.run_id)
    expect(row is not None and row.workflow == {"a": "one", "b": "two"}[first], "it is the row's")
    await expect_whole(trial, one.run_id)
    return first


def accept_one_key(*, hangs: bool = False, is_same: bool = True) -> Scenario:
    """Two requests with one idempotency key: one run, and both are told of it."""

    async def scenario(trial: Trial) -> object:
        nodes = {name: await trial.node(name, hangs=hangs) for name in "ab"}
        runs = {name: new_run(idempotency_key="same", input={"n": 1}) for name in "ab"}
        if not is_same:
            runs["b"] = new_run(idempotency_key="same", input={"n": 2})
        if hangs:
            await trial.hold()

        async def ask(name: str) -> str:
            try:
                told = await Operator(nodes[name], HandClock()).accept(runs[name])
            except Refused as refused:
                return refused.message
            expect(not trial.is_held, "nobody is told of what is not durable everywhere")
            return told

        got = await trial.run(a=lambda: ask("a"), b=lambda: ask("b"))
        there = await trial.store.look.run_ids()
        expect(len(there) == 1, f"there is one run, not {len(there)}")
        told = [answer for answer in got.values() if answer == there[0]]
        expect(len(told) == (2 if is_same else 1), f"who asked for the same is told of it: {got}")
        return "a" if there[0] == runs["a"].run_id else "b"

    return scenario


# -- claiming, stepping, cancelling ----------------------------------------------------------------


def claims(*, hangs: bool = False) -> Scenario:
    """Two nodes claim one run from the same place."""

    async def scenario(trial: Trial) -> object:
        first = await accepted(trial.store)
        appends = {name: claimed(first.copy(), name) for name in "ab"}
        a, b = [await trial.node(name, hangs=hangs) for name in "ab"]
        if hangs:
            await trial.hold()

        async def take(node: Node) -> Outcome:
            found = await outcome(node, appends[node.node_id])
            is_safe = found is not Outcome.LANDED or not trial.is_held
            expect(is_safe, "nobody drives a run whose claim is not durable everywhere")
            return found

        got = await trial.run(a=lambda: take(a), b=lambda: take(b))
        return await _one_owner(trial, first.run_id, got)

    return scenario


async def claims_and_step(trial: Trial) -> object:
    """Two nodes claim a run that a third one still drives."""
    writer = await driven(trial, "a")
    step = writer.copy().append(draft(step=LATE))
    appends = {"a": step, **{name: claimed(writer.copy(), name) for name in "bc"}}
    a, b, c = await trial.nodes("abc")
    got = await trial.run(
        a=lambda: outcome(a, appends["a"]),
        b=lambda: outcome(b, appends["b"]),
        c=lambda: outcome(c, appends["c"]),
    )
    return await _one_owner(trial, writer.run_id, got)


async def _one_owner(trial: Trial, run_id: str, got: dict[str, Outcome]) -> str:
    landed = [name for name, one in got.items() if one is Outcome.LANDED]
    fenced = [name for name, one in got.items() if one is Outcome.FENCED]
    expect(len(landed) == 1 and len(landed + fenced) == len(got), f"one has landed: {got}")
    run = await trial.store.look.run(run_id)
    expect(run is not None and run.owner == landed[0], "the row names the one that landed")
    await expect_whole(trial, run_id)
    return landed[0]


def stale_step(
    *,
    take_over: TakeOver = claim_over,
    step: Step = outcome,
    hangs: bool = False,
    count: int = 1,
    is_final: bool = False,
) -> Scenario:
    """An owner finishes `count` steps while another node takes the run over.

    What was acknowledged is known to the new owner, and nothing is stored that it does not know.
    `hangs`: the old owner's commit waits for the standby. `is_final`: it ends the run, too.
    """

    async def scenario(trial: Trial) -> object:
        writer = await driven(trial, "a")
        await trial.join("a", "b")
        old, new = await trial.node("a", hangs=hangs), await trial.node("b")
        drafts = [draft(step=f"{LATE}-{number}") for number in range(count)]
        entry, change = state(RunState.COMPLETED)
        if is_final:
            append = writer.append(*drafts, entry, change=change)
        else:
            append = writer.append(*drafts)
        if hangs:
            await trial.hold()
        got = await trial.run(a=lambda: step(old, append), b=lambda: take_over(new, writer.run_id))
        known, is_done = list(got["b"]), got["a"] is Outcome.LANDED
        stored = await expect_whole(trial, writer.run_id)
        expect(known == stored[: len(known)], "what the new owner was told is there")
        unknown = [entry for entry in stored if entry not in known]
        was_done = trial.position("a: commit") < trial.last("b")
        expect(not (unknown and was_done), "the new owner knows what was done before")
        expect(not unknown, "nothing lands behind the new owner's back")
        seen = [entry for entry in known if entry.step.startswith(LATE)]
        expect(
            len(seen) == (count if is_done else 0), "what is there was acknowledged, and only it"
        )
        return "old" if is_done else "new"

    return scenario


async def stale_in_batch(trial: Trial) -> object:
    """The rest of a node's batch lands, whatever becomes of the one run that it lost."""
    lost, kept = await driven(trial, "a"), await driven(trial, "a")
    old, new = await trial.node("a"), await trial.node("b")
    entry, change = state(RunState.COMPLETED)
    ended, step = lost.copy().append(entry, change=change), kept.append(draft())
    taken = claimed(lost, "b")

    async def send() -> dict[str, Outcome]:
        return dict((await land(old, ended, step)).refused)

    got = await trial.run(a=send, b=lambda: outcome(new, taken))
    is_new = got["b"] is Outcome.LANDED
    expect(got["a"] == ({lost.run_id: Outcome.FENCED} if is_new else {}), f"one is refused: {got}")
    expect(len(await expect_whole(trial, kept.run_id)) == 3, "the other run's step is there")
    run = await trial.store.look.run(lost.run_id)
    assert run is not None
    owner = ("b", RunState.RUNNING) if is_new else (None, RunState.COMPLETED)
    expect((run.owner, run.state) == owner, "the row is the winner's")
    await expect_whole(trial, lost.run_id)
    return "new" if is_new else "old"


async def cancel_and_claim(trial: Trial) -> object:
    """A run that nobody drives is cancelled, or whoever claimed it is told."""
    writer = await accepted(trial.store)
    append = claimed(writer.copy(), "b")
    a, b = await trial.node("a"), await trial.node("b")
    operator = Operator(a, HandClock())
    got = await trial.run(a=lambda: operator.cancel(writer.run_id), b=lambda: outcome(b, append))
    run = await trial.store.look.run(writer.run_id)
    assert run is not None
    await expect_whole(trial, writer.run_id)
    if got["b"] is not Outcome.LANDED:
        expect(got["a"].is_done and run.state is RunState.CANCELLED, "it is cancelled")
        return "cancelled"
    mail = [message.kind for message in await trial.store.look.inbox(writer.run_id)]
    expect(run.state is RunState.RUNNING and mail == ["cancel"], "its driver is told")
    expect(not got["a"].is_done, "the caller knows that it was only asked for")
    return "asked"


# -- a run that moved, a store that was put back ---------------------------------------------------


async def zombie(trial: Trial) -> object:
    """A run waited, moved to another node and ended there; its first node lives, and is late."""
    writer = await driven(trial, "a")
    await trial.join("a", "b")
    late = writer.copy().append(draft(step=LATE))
    await moved(trial.store, writer, RunState.WAITING)
    a, b = await trial.nodes("ab")

    async def drive() -> list[Outcome]:
        entry, change = state(RunState.COMPLETED)
        appends = [claimed(writer, "b"), writer.append(entry, change=change)]
        return [await outcome(b, append) for append in appends]

    got = await trial.run(a=lambda: outcome(a, late), b=drive)
    expect(got["b"] == [Outcome.LANDED] * 2, "whoever holds the run is not disturbed")
    expect(got["a"] is Outcome.FENCED, "an old coroutine is refused, though its node lives")
    stored = await expect_whole(trial, writer.run_id)
    expect(LATE not in [entry.step for entry in stored], "it has left nothing")
    return "refused"


async def put_back(trial: Trial) -> object:
    """Somebody has put an older copy of the database in its place and told nobody."""
    writer = await driven(trial, "a")
    back = writer.copy()
    for _ in range(3):
        assert await outcome(trial.store, writer.append(draft())) is Outcome.LANDED
    late = writer.append(draft(step=LATE))
    await trial.database.execute("DELETE FROM journal WHERE seq > $1", back.seq)
    a, b = await trial.nodes("ab")
    got = await trial.run(a=lambda: outcome(a, late), b=lambda: claim_over(b, writer.run_id))
    expect(got["a"] is Outcome.DAMAGED, "a writer whose past is gone is refused")
    stored = await expect_whole(trial, writer.run_id)
    expect(stored == list(got["b"]), "nothing stands behind a gap")
    return "refused"


async def restored(trial: Trial) -> object:
    """The store was restored, to the very head that a node of before still holds."""
    writer = await driven(trial, "a")
    step = writer.append(draft(step=LATE))
    a = await trial.node("a")

    async def send() -> str:
        try:
            return await outcome(a, step)
        except StoreError as error:
            return error.message

    await trial.database.execute("UPDATE store SET incarnation = 'another'")
    try:
        got = await trial.run(a=send)
    finally:
        again = "UPDATE store SET incarnation = $1"
        await trial.database.execute(again, trial.store.incarnation)
    expect("replaced or restored" in got["a"], f"nobody of before may write: {got}")
    expect(len(await expect_whole(trial, writer.run_id)) == 2, "nothing was written")
    return "refused"


# -- outcomes that nobody heard --------------------------------------------------------------------


async def resend(trial: Trial) -> object:
    """The same bytes again while the first ones still hang in their commit."""
    writer = await driven(trial, "a")
    append = writer.append(draft(step=LATE), changes=[Post(writer.run_id, "signal", "once")])
    a, again = await trial.node("a", hangs=True), await trial.node("again", hangs=True)
    await trial.hold()

    async def send(node: Node) -> Outcome:
        found = await outcome(node, append)
        expect(not trial.is_held, "what is acknowledged is durable everywhere")
        return found

    got = await trial.run(a=lambda: send(a), again=lambda: send(again))
    expect(set(got.values()) == {Outcome.LANDED}, f"both are told that it is there: {got}")
    expect(len(await expect_whole(trial, writer.run_id)) == 3, "it is there once")
    expect(len(await trial.store.look.inbox(writer.run_id)) == 1, "so is what went with it")
    return "first" if trial.position("a: append") < trial.position("again: append") else "second"


def cut(*, hangs: bool = False, is_whole: bool = True, is_locked: bool = False) -> Scenario:
    """A client is cut off at any moment of a commit, and asks the barrier what became of it.

    It sends a message without a sender's key: nothing but the commit's number keeps that from being
    sent twice. `is_whole`: the server has the commit together with the statement, else the cut
    may fall between them. `is_locked`: somebody else holds the row, so that the statement is late.
    """

    async def scenario(trial: Trial) -> object:
        writer = await driven(trial, "a")
        post = Batch(changes=[Post(writer.run_id, "signal", "once")])
        a = await trial.node("a", hangs=hangs, is_whole=is_whole)
        network, other = await trial.node("network"), await trial.node("other")
        if hangs:
            await trial.hold()

        async def send() -> bool:
            refused = (await a.commit(post)).is_refused
            expect(not trial.is_held, "what is acknowledged is durable everywhere")
            return refused

        async def fail() -> None:
            await network.driver.turns.step("cut")
            a.driver.cut()

        async def lock() -> None:
            async with other.session.transaction():
                await other.session.execute("SELECT FROM runs FOR UPDATE")

        locking = {"other": lock} if is_locked else {}
        got = await trial.run(a=send, network=fail, **locking)
        expect(got["a"] is False, "it is acknowledged")
        mail = await trial.store.look.inbox(writer.run_id)
        expect(len(mail) == 1, f"it was delivered once, not {len(mail)} times")
        return _number(trial)

    return scenario


def _number(trial: Trial) -> str:
    """What the barrier found under the number of the commit that was cut off."""
    if not any("barrier" in line for line in trial.log):
        return "answered"
    return "taken" if any("commit_at" in line for line in trial.log) else "free"
