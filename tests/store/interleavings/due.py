"""Scenarios around runs that wait for somebody: picked, adopted, claimed, aged out."""

from __future__ import annotations

from functools import partial

from llm_orchestrator.engine.control import Operator
from llm_orchestrator.errors import NotFound, Refused
from llm_orchestrator.model import Run, RunState
from llm_orchestrator.store.base import (
    Batch,
    Expire,
    Member,
    NodeState,
    Outcome,
    Post,
    Wanted,
    lives,
)
from tests.store.interleavings.fence import claim_over, claimed, driven, expect_whole
from tests.store.interleavings.stepper import expect
from tests.store.interleavings.world import Node, Scenario, Trial
from tests.store.support import (
    START_US,
    HandClock,
    Writer,
    accepted,
    draft,
    moved,
    new_run,
    outcome,
    state,
)


async def pick(node: Node, limit: int, *, concurrency: int = 0) -> list[str]:
    queue = "narrow" if concurrency else None
    wanted = Wanted(limit, START_US, queue=queue, concurrency=concurrency)
    return [run.run_id for run in await node.pick(node.node_id, wanted)]


# -- picking ---------------------------------------------------------------------------------------


def picks(names: str, *, hangs: bool = False) -> Scenario:
    """Nodes pick at once: other runs each, and nobody waits for anybody."""

    async def scenario(trial: Trial) -> object:
        for _ in range(len(names) + 1):
            await accepted(trial.store)
        await trial.join(*names)
        nodes = [
            await trial.node(name, hangs=hangs, is_whole=place > 1)
            for place, name in enumerate(names)
        ]
        if hangs:
            await trial.hold()
        got = await trial.run(
            **{name: partial(pick, node, 1) for name, node in zip(names, nodes, strict=True)}
        )
        found = [run_id for runs in got.values() for run_id in runs]
        expect(len(found) == len(names), "there is one for each")
        expect(len(set(found)) == len(found), "no run is offered twice")
        expect(not trial.waited, "nobody waits for another one's pick")
        return trial.first_commit()

    return scenario


async def pick_and_claim(trial: Trial) -> object:
    """A run is claimed while another node picks, and claims what it was offered."""
    writer = await accepted(trial.store)
    await trial.join("a", "b")
    a, b = await trial.nodes("ab")
    append = claimed(writer.copy(), "a")

    async def take() -> tuple[list[str], list[Outcome]]:
        offered = await pick(b, 1)
        return offered, [await outcome(b, claimed(writer.copy(), "b")) for _ in offered]

    got = await trial.run(a=lambda: outcome(a, append), b=take)
    offered, outcomes = got["b"]
    if trial.position("a: append") < trial.position("b: pick"):
        expect(not offered, "what is being claimed is offered to nobody")
    landed = [got["a"], *outcomes].count(Outcome.LANDED)
    expect(landed == 1, f"one has it, not {landed}")
    await expect_whole(trial, writer.run_id)
    return "not offered" if not offered else "a" if got["a"] is Outcome.LANDED else "b"


async def narrow_queue(trial: Trial) -> object:
    """A queue that allows one run at a time, and two nodes that ask for one."""
    for _ in range(2):
        await accepted(trial.store, new_run(queue="narrow"))
    await trial.join("a", "b")
    a, b = await trial.nodes("ab")
    got = await trial.run(a=lambda: pick(a, 2, concurrency=1), b=lambda: pick(b, 2, concurrency=1))
    expect(len(got["a"] + got["b"]) == 1, f"one run is offered, not {got}")
    return "a" if got["a"] else "b"


# -- nodes that die, or seem to --------------------------------------------------------------------


async def adopts(trial: Trial) -> object:
    """Two nodes look for what a dead one left: other runs each, and nobody waits."""
    await driven(trial, "dead")
    await driven(trial, "dead")
    await trial.join("a", "b")
    a, b = await trial.nodes("ab")
    got = await trial.run(a=lambda: a.adopt("a", 1), b=lambda: b.adopt("b", 1))
    expect(len(set(got["a"] + got["b"])) == 2, f"each has its own: {got}")
    expect(not trial.waited, "nobody waits for another one's look")
    return trial.first_commit()


async def bury_and_beat(trial: Trial) -> object:
    """A node that was silent beats again while it is declared dead, and its runs are looked for."""
    run_id = (await driven(trial, "a")).run_id
    await trial.join("a", "b")
    a, b = await trial.nodes("ab")

    async def judge() -> tuple[bool, list[str]]:
        is_buried = await b.heart.bury("a", 0)
        return is_buried, await b.adopt("b", 10)

    async def beat() -> Member:
        pulse = await a.heart.beat("a", None)
        return next(member for member in pulse.members if member.node_id == "a")

    got = await trial.run(a=beat, b=judge)
    is_buried, adopted = got["b"]
    now = next(node for node in await trial.store.shelf.nodes() if node.node_id == "a")
    expect(adopted == ([run_id] if is_buried else []), "just a dead node's runs are offered")
    expect(lives(now) != is_buried, "dead is dead")
    expect(now.beat == (0 if is_buried else 1), "nobody is buried who has beaten meanwhile")
    expect(lives(got["a"]) or is_buried, "a node that lives sees that it does")
    if trial.position("b: commit") < trial.position("a: beat") and is_buried:
        expect(got["a"].state == NodeState.DEAD, "a node that was buried sees it in its next beat")
    return "buried" if is_buried else "alive"


async def bury_and_step(trial: Trial) -> object:
    """A node is declared dead, its run adopted and claimed, while its last step is under way."""
    writer = await driven(trial, "a")
    await trial.join("a", "b")
    append = writer.append(draft(step="late"))
    a, b = await trial.nodes("ab")
    b.driver.quiet |= {"anchors", "journals"}

    async def judge() -> list[str]:
        expect(await b.heart.bury("a", 0), "it was silent")
        [adopted] = await b.adopt("b", 10)
        return [entry.step for entry in await claim_over(b, adopted)]

    got = await trial.run(a=lambda: outcome(a, append), b=judge)
    is_done = got["a"] is Outcome.LANDED
    expect(("late" in got["b"]) == is_done, "the new owner knows what was acknowledged")
    await expect_whole(trial, writer.run_id)
    return "old" if is_done else "new"


async def adopt_and_park(trial: Trial) -> object:
    """A node that counts as dead parks its run while others look for it."""
    writer = await driven(trial, "a")
    await trial.join("b")
    a, b = await trial.nodes("ab")
    entry, change = state(RunState.WAITING)
    append = writer.copy().append(entry, change=change)

    async def take() -> bool:
        for run_id in await b.adopt("b", 10):
            return await outcome(b, claimed(writer.copy(), "b")) is Outcome.LANDED and bool(run_id)
        return False

    got = await trial.run(a=lambda: outcome(a, append), b=take)
    run = await trial.store.look.run(writer.run_id)
    assert run is not None
    expect((got["a"] is Outcome.LANDED) != got["b"], "one of them has it")
    expect(run.owner == ("b" if got["b"] else None), "the row names the one that landed")
    await expect_whole(trial, writer.run_id)
    return "taken" if got["b"] else "parked"


# -- ageing out ------------------------------------------------------------------------------------

_SWEEP = frozenset({"append", "expire_inbox", "expire_blobs", "expire_progress"})
"""What ageing out does besides; the row and the journal are what others meet."""


async def failed(trial: Trial) -> Writer:
    writer = await driven(trial, "a")
    await moved(trial.store, writer, RunState.FAILED)
    return writer


async def sweep(node: Node, run_id: str) -> None:
    node.driver.quiet |= _SWEEP
    await node.commit(Batch(changes=[Expire((run_id,))]))


async def remains(trial: Trial, run_id: str) -> list[str]:
    """The tables that still know of a run."""
    tables = ("runs", "journal", "inbox", "progress", "blobs")
    sql = "SELECT count(*) FROM {} WHERE run_id = $1"
    return [t for t in tables if await trial.database.fetchval(sql.format(t), run_id)]


async def expire_and_retry(trial: Trial) -> object:
    """A failed run ages out while somebody takes it up again: it goes whole, or stays whole."""
    writer = await failed(trial)
    a, b = await trial.nodes("ab")

    async def retry() -> bool:
        try:
            return (await Operator(b, HandClock()).retry(writer.run_id)).is_done
        except (NotFound, Refused):
            return False

    got = await trial.run(a=lambda: sweep(a, writer.run_id), b=retry)
    left = await remains(trial, writer.run_id)
    if not got["b"]:
        expect(left == [], f"what ages out goes whole, not but {left}")
        return "gone"
    run: Run | None = await trial.store.look.run(writer.run_id)
    expect(run is not None and run.state is RunState.PENDING, "a run that was taken up again stays")
    expect(len(await expect_whole(trial, writer.run_id)) == 4, "with all of its journal")
    return "kept"


async def expire_and_post(trial: Trial) -> object:
    """A run ages out while it is sent a message: nothing of it is left."""
    writer = await failed(trial)
    a, b = await trial.nodes("ab")
    message = Batch(changes=[Post(writer.run_id, "signal", "late")])
    a.driver.quiet |= {"expire_journal"}
    await trial.run(a=lambda: sweep(a, writer.run_id), b=lambda: b.commit(message))
    expect(await remains(trial, writer.run_id) == [], "no message is left behind")
    return trial.first_commit()
