"""Scenarios around inboxes and records: nobody sleeps over a message, nothing comes twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from llm_orchestrator.engine.mend import Mender
from llm_orchestrator.model import Draft, Json, Kind, Run, RunState
from llm_orchestrator.store.base import Batch, Consume, Outcome, Post, PutRecord
from llm_orchestrator.store.journal import encode
from tests.store.interleavings.fence import (
    claim_over,
    claimed,
    driven,
    entries_of,
    expect_whole,
)
from tests.store.interleavings.stepper import expect
from tests.store.interleavings.world import Node, Scenario, Trial
from tests.store.support import START_US, Writer, accepted, draft, land, moved, outcome, state

FAR = START_US + 10**12


async def post(node: Node, run_id: str, *, name: str = "go", key: str | None = None) -> None:
    message = Post(run_id, "signal", name, sender_key=key)
    refused = (await node.commit(Batch(changes=[message]))).is_refused
    expect(not refused, "a message is taken")


async def row_of(trial: Trial, run_id: str) -> Run:
    run = await trial.store.look.run(run_id)
    assert run is not None
    return run


async def numbers(trial: Trial, run_id: str) -> list[int]:
    return [message.number for message in await trial.store.look.inbox(run_id)]


# -- sleeping and waking ---------------------------------------------------------------------------


def park_and_post(who_hangs: Literal["", "a", "b"] = "") -> Scenario:
    """A run looks into its inbox, finds nothing, and parks; meanwhile it is sent a message."""

    async def scenario(trial: Trial) -> object:
        writer = await driven(trial, "a")
        a, b = [await trial.node(name, hangs=name == who_hangs) for name in "ab"]
        if who_hangs:
            await trial.hold()

        async def park() -> bool:
            seen = (await a.look.inbox_seqs([writer.run_id]))[writer.run_id]
            if seen:
                return False
            entry, change = state(RunState.WAITING, wake_at=FAR, inbox_seen=seen)
            append = writer.append(entry, change=change)
            expect(await outcome(a, append) is Outcome.LANDED, "its owner may park it")
            return True

        got = await trial.run(a=park, b=lambda: post(b, writer.run_id))
        expect(await numbers(trial, writer.run_id) == [1], "the message is there")
        if not got["a"]:
            return "seen"
        run = await row_of(trial, writer.run_id)
        expect(run.wake_at == 0, "a run does not sleep over a message that it has not seen")
        return (
            "kept awake" if trial.position("b: commit") < trial.position("a: commit") else "woken"
        )

    return scenario


async def change_and_post(trial: Trial) -> object:
    """A message to a run that ends: it is kept, the end is the end."""
    writer = await driven(trial, "a")
    a, b = await trial.nodes("ab")
    entry, change = state(RunState.COMPLETED)
    append = writer.append(entry, change=change)
    got = await trial.run(a=lambda: outcome(a, append), b=lambda: post(b, writer.run_id))
    run = await row_of(trial, writer.run_id)
    expect(got["a"] is Outcome.LANDED and run.state is RunState.COMPLETED, "it has ended")
    expect((await numbers(trial, writer.run_id), run.inbox_seq) == ([1], 1), "it is there")
    return trial.first_commit()


async def claim_and_post(trial: Trial) -> object:
    """A message to a waiting run while a node claims it for its timer."""
    writer = await accepted(trial.store)
    await moved(trial.store, writer, RunState.WAITING, wake_at=FAR)
    a, b = await trial.nodes("ab")
    append = claimed(writer, "a")

    async def drive() -> list[int]:
        expect(await outcome(a, append) is Outcome.LANDED, "a message is in nobody's way")
        return [message.number for message in await a.look.inbox(writer.run_id)]

    got = await trial.run(a=drive, b=lambda: post(b, writer.run_id))
    run = await row_of(trial, writer.run_id)
    expect((run.state, run.owner, run.inbox_seq) == (RunState.RUNNING, "a", 1), "it is driven")
    if trial.position("b: commit") < trial.position("a: inbox"):
        expect(got["a"] == [1], "its driver sees what came before it looked")
    return trial.first_commit()


async def child_and_parent(trial: Trial) -> object:
    """A child ends and tells its parent, which parks to wait for just that."""
    parent, child = await driven(trial, "a"), await driven(trial, "b")
    a, b = await trial.nodes("ab")
    entry, change = state(RunState.WAITING, wake_at=FAR)
    park = parent.append(entry, change=change)
    entry, change = state(RunState.COMPLETED)
    end = child.append(entry, change=change, changes=[Post(parent.run_id, "child", "ended")])
    got = await trial.run(a=lambda: outcome(a, park), b=lambda: outcome(b, end))
    expect(set(got.values()) == {Outcome.LANDED}, "both land")
    run = await row_of(trial, parent.run_id)
    expect(run.wake_at == 0 and run.inbox_seq == 1, "the parent does not sleep over it")
    return trial.first_commit()


async def cross(trial: Trial) -> object:
    """Two runs end and tell each other, while somebody has one of their rows locked: a deadlock."""
    writers = {name: await driven(trial, name) for name in "ab"}
    a, b, c = await trial.nodes("abc")
    appends = {}
    for name, other in ("ab", "ba"):
        entry, change = state(RunState.COMPLETED)
        news = Post(writers[other].run_id, "signal", f"from {name}")
        appends[name] = writers[name].append(entry, change=change, changes=[news])

    async def lock() -> None:
        async with c.session.transaction():
            sql = "SELECT FROM runs WHERE run_id = $1 FOR UPDATE"
            await c.session.execute(sql, writers["b"].run_id)

    got = await trial.run(
        a=lambda: outcome(a, appends["a"]), b=lambda: outcome(b, appends["b"]), c=lock
    )
    expect((got["a"], got["b"]) == (Outcome.LANDED, Outcome.LANDED), f"both land: {got}")
    for writer in writers.values():
        expect(await numbers(trial, writer.run_id) == [1], "each has the other's message, once")
        run = await row_of(trial, writer.run_id)
        expect(run.state is RunState.COMPLETED, "both have ended")
    is_again = sum(line.endswith(": append") for line in trial.log) > 2
    return "again" if is_again else "at once"


# -- numbers, keys, consumption --------------------------------------------------------------------


def signals(*, keys: Sequence[str | None], hangs: bool = False) -> Scenario:
    """Two messages to one run, and somebody who reads its inbox meanwhile."""

    async def scenario(trial: Trial) -> object:
        writer = await accepted(trial.store)
        run_id = writer.run_id
        a, b = [await trial.node(name, hangs=hangs) for name in "ab"]
        reader = await trial.node("reader")
        if hangs:
            await trial.hold()

        async def read() -> list[int]:
            return [message.number for message in await reader.look.inbox(run_id)]

        got = await trial.run(
            a=lambda: post(a, run_id, name="a", key=keys[0]),
            b=lambda: post(b, run_id, name="b", key=keys[1]),
            reader=read,
        )
        is_same = keys[0] is not None and keys[0] == keys[1]
        there = await trial.store.look.inbox(run_id)
        count = 1 if is_same else 2
        expect([m.number for m in there] == list(range(1, count + 1)), "each comes once, in order")
        expect((await row_of(trial, run_id)).inbox_seq == count, "the row counts them")
        seen = got["reader"]
        expect(seen == list(range(1, len(seen) + 1)), "no number is seen before the one below it")
        return there[0].name, len(seen)

    return scenario


async def consume_and_post(trial: Trial) -> object:
    """A message is taken while another one comes, and the first one comes again."""
    writer = await driven(trial, "a")
    first = Post(writer.run_id, "signal", "first", sender_key="first")
    await land(trial.store, changes=[first])
    a, b, c = await trial.nodes("abc")
    taken = Draft(Kind.SIGNAL, "wait", 0, encode({"number": 1}))
    append = writer.append(taken, changes=[Consume(writer.run_id, (1,))])
    got = await trial.run(
        a=lambda: outcome(a, append),
        b=lambda: post(b, writer.run_id, name="second"),
        c=lambda: post(c, writer.run_id, name="first", key="first"),
    )
    expect(got["a"] is Outcome.LANDED, "it is taken")
    expect(await numbers(trial, writer.run_id) == [2], "the other one is there, the first one not")
    return trial.first_commit()


async def stale_consume(trial: Trial) -> object:
    """An old owner takes a message while the run is taken over: one of them has it."""
    writer = await driven(trial, "a")
    await land(trial.store, changes=[Post(writer.run_id, "signal", "go")])
    a, b = await trial.nodes("ab")
    taken = Draft(Kind.SIGNAL, "wait", 0, encode({"number": 1}))
    append = writer.append(taken, changes=[Consume(writer.run_id, (1,))])

    async def take_over() -> tuple[list[str], list[int]]:
        known = await claim_over(b, writer.run_id)
        mail = [message.number for message in await b.look.inbox(writer.run_id)]
        return [entry.kind for entry in known], mail

    got = await trial.run(a=lambda: outcome(a, append), b=take_over)
    kinds, mail = got["b"]
    is_taken = got["a"] is Outcome.LANDED
    expect((Kind.SIGNAL in kinds) == is_taken, "the journal says who has it")
    expect(mail == ([] if is_taken else [1]), "it is in the inbox just if nobody has it")
    return "old" if is_taken else "new"


# -- records ---------------------------------------------------------------------------------------


def records(before: Json, one: Json, two: Json) -> Scenario:
    """Two writers of one record that know the same version: one is refused."""

    async def scenario(trial: Trial) -> object:
        version = 0
        if before is not None:
            await land(trial.store, changes=[PutRecord("kind", "key", before, 0)])
            version = 1
        a, b = await trial.nodes("ab")

        async def put(node: Node, value: Json) -> bool:
            batch = Batch(changes=[PutRecord("kind", "key", value, version)])
            return not (await node.commit(batch)).is_refused

        got = await trial.run(a=lambda: put(a, one), b=lambda: put(b, two))
        expect(sorted(got.values()) == [False, True], f"one is refused: {got}")
        value = one if got["a"] else two
        found = await trial.store.shelf.record("kind", "key")
        expect(found == ((None, 0) if value is None else (value, version + 1)), "the other stands")
        return "a" if got["a"] else "b"

    return scenario


async def record_and_append(trial: Trial) -> object:
    """Two runs write one record with their entries: the one that is refused has written nothing."""
    writers = {name: await driven(trial, name) for name in "ab"}
    a, b = await trial.nodes("ab")
    appends = {
        name: writer.append(draft(), changes=[PutRecord("kind", "key", name, 0, writer.run_id)])
        for name, writer in writers.items()
    }
    got = await trial.run(a=lambda: outcome(a, appends["a"]), b=lambda: outcome(b, appends["b"]))
    expect(set(got.values()) == {Outcome.LANDED, Outcome.CONFLICT}, f"one is refused: {got}")
    winner = "a" if got["a"] is Outcome.LANDED else "b"
    for name, writer in writers.items():
        length = 3 if name == winner else 2
        expect(len(await expect_whole(trial, writer.run_id)) == length, "its entry goes with it")
    expect(await trial.store.shelf.record("kind", "key") == (winner, 1), "it is the winner's")
    return winner


# -- a row that is rebuilt -------------------------------------------------------------------------


def mender(node: Node) -> Mender:
    return Mender(node, None)  # type: ignore[arg-type]


async def damaged(trial: Trial) -> Writer:
    """A waiting run whose row contradicts its journal."""
    writer = await accepted(trial.store)
    await moved(trial.store, writer, RunState.WAITING, wake_at=FAR)
    await trial.database.execute("UPDATE runs SET reason = 'damaged'")
    return writer


async def mend_and_post(trial: Trial) -> object:
    """A row is rebuilt while its run is sent a message."""
    writer = await damaged(trial)
    a, b = await trial.nodes("ab")
    await trial.run(a=lambda: mender(a).set_row(writer.run_id), b=lambda: post(b, writer.run_id))
    run = await row_of(trial, writer.run_id)
    expect(await numbers(trial, writer.run_id) == [1], "what was acknowledged is there")
    expect((run.reason, run.wake_at, run.inbox_seq) == ("", 0, 1), "the row is whole, and awake")
    return trial.first_commit()


async def mend_and_claim(trial: Trial) -> object:
    """A row is rebuilt while a node claims the run."""
    writer = await damaged(trial)
    a, b = await trial.nodes("ab")
    append = claimed(writer, "b")
    got = await trial.run(a=lambda: mender(a).set_row(writer.run_id), b=lambda: outcome(b, append))
    expect(got["b"] is Outcome.LANDED, "a repair is in nobody's way")
    run = await row_of(trial, writer.run_id)
    expect((run.state, run.owner) == (RunState.RUNNING, "b"), "the row names its owner")
    expect(len(await entries_of(trial.store, writer.run_id)) == 3, "the claim is there")
    return trial.first_commit()
