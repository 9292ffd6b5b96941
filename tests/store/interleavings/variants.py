"""Other ways to fence that look right, each as the bug that it is: what they would have cost.

A variant is the production `append` with its check replaced, and the takeover that belongs to it.
Those of `SOUND` are the right forms of the same ideas: they show that a scenario goes red for the
flaw, not for the form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llm_orchestrator.model import Entry
from llm_orchestrator.store.base import Append, Outcome
from llm_orchestrator.store.postgres_write import state
from llm_orchestrator.store.queries import load_queries
from tests.store.interleavings.fence import driven
from tests.store.interleavings.planted import Plant, edit, edited, together
from tests.store.interleavings.stepper import expect
from tests.store.interleavings.world import Node, Trial
from tests.store.support import START_US, draft, outcome

PREDECESSOR = """
(h.seq = 0 OR (SELECT j.digest FROM journal AS j
               WHERE j.run_id = h.run_id AND j.seq = h.seq) = h.digest)"""
CHECKS = f"""{PREDECESSOR}
AND (SELECT j.seq FROM journal AS j WHERE j.run_id = h.run_id AND j.seq = h.seq + 1) IS NULL"""
EPOCH = """
(SELECT r.epoch FROM runs AS r WHERE r.run_id = h.run_id)
    = (SELECT max(own.epoch) FROM unnest(:epoch::bigint[]) AS own (epoch))"""
HEAD = "WITH head AS MATERIALIZED ("
LOCK = "SELECT pg_advisory_xact_lock(hashtext($1::text))"
LOCK_NODE = "SELECT node_id FROM nodes WHERE node_id = 'a' FOR UPDATE"
MOVE = "UPDATE runs SET epoch = epoch + 1, owner = $2 WHERE run_id = $1"


def by_node(strength: str) -> Plant:
    """The fence is a lock on the row of the node that writes, held until its commit."""
    node = f"""WITH node AS MATERIALIZED (
        SELECT n.node_id FROM nodes AS n
        WHERE n.node_id = split_part(:lane, '/', 1) AND n.state = 'alive' FOR {strength}
    ), head AS MATERIALIZED ("""
    return edited("append", (HEAD, node), (CHECKS, "EXISTS (SELECT 1 FROM node)"))


BY_EPOCH = edited("append", (CHECKS, EPOCH))
BY_LOCK = edited(
    "append",
    (
        HEAD,
        """WITH locked AS MATERIALIZED (
        SELECT pg_advisory_xact_lock(hashtext(l.run_id::text))
        FROM unnest(:head_run::uuid[]) AS l (run_id)
    ), head AS MATERIALIZED (""",
    ),
    (CHECKS, f"(SELECT count(*) FROM locked) > 0 AND {EPOCH}"),
)
SKIPPING = edited(
    "append",
    ("ORDER BY e.run_id, e.seq", "ORDER BY e.run_id, e.seq ON CONFLICT DO NOTHING"),
)
BY_KEY = edited("append", (PREDECESSOR, "true"))


BY_NODE_ALONE = together(
    by_node("KEY SHARE"),
    edited(
        "append",
        (
            "SELECT e.*",
            """SELECT e.run_id,
                (SELECT max(j.seq) FROM journal AS j WHERE j.run_id = e.run_id)
                    + row_number() OVER (PARTITION BY e.run_id ORDER BY e.seq),
                e.epoch, e.kind, e.step, e.attempt, e.payload, e.digest, e.recorded_at""",
        ),
    ),
)
"""Nothing but the node's row decides; the store gives the numbers."""


# -- takeovers -------------------------------------------------------------------------------------


async def move(node: Node, run_id: str) -> Sequence[Entry]:
    """The epoch in the run's row moves on."""
    await node.session.execute(MOVE, run_id, node.node_id)
    return await node.look.stored(run_id)


async def lock_and_move(node: Node, run_id: str) -> Sequence[Entry]:
    """The same under an advisory lock, taken first."""
    async with node.session.transaction():
        await node.session.execute(LOCK, run_id)
        await node.session.execute(MOVE, run_id, node.node_id)
    return await node.look.stored(run_id)


async def bury(node: Node, run_id: str) -> Sequence[Entry]:
    """The old node is declared dead by a plain UPDATE."""
    await node.heart.bury("a", 0)
    return await node.look.stored(run_id)


async def lock_and_bury(node: Node, run_id: str) -> Sequence[Entry]:
    """Its row is locked first, so that whoever writes under it has ended."""
    async with node.session.transaction():
        await node.session.execute(LOCK_NODE)
        await _run(node, "bury", node_id="a", beat=0)
    return await node.look.stored(run_id)


async def lock_and_look_in_one_snapshot(node: Node, run_id: str) -> Sequence[Entry]:
    """In REPEATABLE READ everything is seen as it was before the wait for the lock."""
    async with node.session.transaction(isolation="repeatable_read"):
        await node.session.execute(LOCK_NODE)
        known = await _run(node, "journals", runs=[run_id])
        await _run(node, "bury", node_id="a", beat=0)
    return [Entry(str(row[0]), *row[1:]) for row in known]


async def lock_and_look_in_one_statement(node: Node, run_id: str) -> Sequence[Entry]:
    """So it is within one statement."""
    sql = load_queries("postgres")["journals"].sql
    old, new = "WHERE", "WHERE EXISTS (SELECT 1 FROM node) AND"
    sql = f"WITH node AS MATERIALIZED ({LOCK_NODE}) {edit(sql, (old, new))}"
    async with node.session.transaction():
        known = await node.session.fetch(sql, [run_id])
        await _run(node, "bury", node_id="a", beat=0)
    return [Entry(str(row[0]), *row[1:]) for row in known]


async def _run(node: Node, name: str, /, **values: object) -> list[Any]:
    """A named statement on the scenario's own connection."""
    query = load_queries("postgres")[name]
    rows: list[Any] = await node.session.fetch(query.sql, *query.bind(**values))
    return rows


# -- what the old owner does -----------------------------------------------------------------------


async def lock_then_append(node: Node, append: Append) -> Outcome:
    """The lock in a statement of its own, before the one that checks."""
    statement = state([append], (), START_US)
    values = statement.bind(f"{node.node_id}/journal", 1, node.incarnation)
    async with node.session.transaction():
        await node.session.execute(LOCK, append.run_id)
        row = await node.session.fetchrow(statement.query.sql, *values)
    return Outcome.LANDED if row[0] else Outcome.FENCED


async def step_and_beat(trial: Trial) -> object:
    """A node beats while its commit waits for the standby."""
    writer = await driven(trial, "a")
    await trial.join("a")
    a, heart = await trial.node("a", hangs=True), await trial.node("heart")
    append = writer.append(draft())
    heart.driver.quiet |= {"members"}
    await trial.hold()

    async def beat() -> None:
        await heart.heart.beat("a", None)

    got = await trial.run(a=lambda: outcome(a, append), heart=beat)
    expect(got["a"] is Outcome.LANDED, "the step lands")
    expect(not trial.waited, "a beat and a commit do not wait for each other")
    return "both"
