"""Every guard in the production statements, taken out: some order must show what it is for."""

from __future__ import annotations

import pytest

from tests.store.interleavings import due, fence, mail
from tests.store.interleavings.planted import Plant, edited, together
from tests.store.interleavings.stepper import Broken
from tests.store.interleavings.world import Scenario, World

pytestmark = pytest.mark.asyncio(loop_scope="module")

VIA = "AND ({0}.via IS NULL OR {0}.via IN (SELECT run_id FROM head))"
UNSEEN = "CASE WHEN r.inbox_seq > c.inbox_seen THEN 0 ELSE c.wake_at END"
AWAKE = "CASE WHEN r.state = 'waiting' THEN 0 ELSE r.wake_at END"
STATE_BEFORE = "(SELECT before.state FROM runs AS before WHERE before.run_id = r.run_id)"
QUEUE_LOCK = "pg_advisory_xact_lock(hashtextextended('llm_orchestrator.queue.' || :queue::text, 0))"
NO_LOCK = edited("lock_queue", (QUEUE_LOCK, ":queue::text"))
COUNT = "VALUES (:lane, :number, :entries, :batch)"
COUNT_NOTHING = "SELECT :lane, :number::bigint, :entries::bigint, :batch::bytea WHERE false"
SKIP = "FOR UPDATE SKIP LOCKED"
GUARDS: dict[str, tuple[Scenario, Plant, str]] = {
    # the journal
    "an append names its incarnation": (
        fence.restored,
        edited("append", ("= :incarnation", "|| :incarnation <> ''")),
        "nobody of before may write",
    ),
    "a state changes with its entry": (
        fence.stale_in_batch,
        together(
            edited("changed", ("AND c.run_id IN (SELECT run_id FROM head)", "")),
            edited("changed_check", ("(SELECT count(*) FROM changed)", "1 = 1 OR 1")),
        ),
        "the row is the winner's",
    ),
    "what goes with an entry falls with it: a message": (
        fence.resend,
        edited("mailed", ("(m.via IS NULL OR m.via IN (SELECT run_id FROM head))", "true")),
        "so is what went with it",
    ),
    "what goes with an entry falls with it: a message taken": (
        mail.stale_consume,
        edited("consumed", (VIA.format("t"), "")),
        "it is in the inbox just if nobody has it",
    ),
    # outcomes that nobody heard
    "a barrier meets the commit that hangs": (
        fence.cut(hangs=True),
        edited("barrier", ("''::bytea)", "''::bytea) ON CONFLICT DO NOTHING")),
        "it was delivered once",
    ),
    "a commit takes its number": (
        fence.cut(is_locked=True),
        edited("append", (COUNT, COUNT_NOTHING)),
        "it was delivered once",
    ),
    # sleeping and waking
    "a park looks at the inbox": (
        mail.park_and_post(),
        edited("changed", (UNSEEN, "c.wake_at")),
        "a run does not sleep over a message",
    ),
    "a message wakes": (
        mail.park_and_post(),
        edited("mailed", (AWAKE, "r.wake_at")),
        "a run does not sleep over a message",
    ),
    "a message wakes by the row as it is, not as it was": (
        mail.park_and_post(),
        edited("mailed", ("r.state = 'waiting'", f"{STATE_BEFORE} = 'waiting'")),
        "a run does not sleep over a message",
    ),
    # records and rows
    "a record moves from the version that its writer knows": (
        mail.records(0, 1, 2),
        edited("recorded", ("AND r.version = p.version AND p.value IS NOT NULL", "")),
        "one is refused",
    ),
    "a record that did not move refuses": (
        mail.records(0, 1, 2),
        edited("recorded_check", ("(SELECT count(*) FROM fresh)", "1 = 1 OR 1")),
        "one is refused",
    ),
    "a row is rebuilt under its lock": (
        mail.mend_and_claim,
        edited("lock_row", ("FOR UPDATE", "")),
        "the row names its owner",
    ),
    "a row is rebuilt in place": (
        mail.mend_and_post,
        edited("lock_row", ("SELECT 1 FROM", "DELETE FROM"), ("FOR UPDATE", "")),
        "what was acknowledged is there",
    ),
    # runs that wait for somebody
    "a pick looks at who has it": (
        due.pick_and_claim,
        edited("pick", ("state IN ('pending', 'waiting') AND owner IS NULL", "true")),
        "what is being claimed is offered to nobody",
    ),
    "a pick locks": (
        due.picks("ab"),
        edited("pick", (SKIP, "")),
        "no run is offered twice",
    ),
    "a pick skips what is locked": (
        due.picks("ab"),
        edited("pick", (SKIP, "FOR UPDATE")),
        "nobody waits for another one's pick",
    ),
    "an adoption locks": (due.adopts, edited("adopt", (SKIP, "")), "each has its own"),
    "an adoption skips what is locked": (
        due.adopts,
        edited("adopt", (SKIP, "FOR UPDATE")),
        "nobody waits for another one's look",
    ),
    "a queue is counted by one at a time": (
        due.narrow_queue,
        NO_LOCK,
        "one run is offered",
    ),
    "a queue is counted after the wait": (
        due.narrow_queue,
        together(
            NO_LOCK,
            edited(
                "in_flight", ("FROM runs", "FROM runs, (SELECT pg_advisory_xact_lock(1)) AS held")
            ),
        ),
        "one run is offered",
    ),
    "a burial names the beat": (
        due.bury_and_beat,
        edited("bury", ("beat = :beat", ":beat::bigint >= 0")),
        "nobody is buried who has beaten meanwhile",
    ),
    "a dead node does not beat": (
        due.bury_and_beat,
        edited("beat", ("AND state IN ('alive', 'leaving')", "")),
        "nobody is buried who has beaten meanwhile",
    ),
    "what ages out has ended": (
        due.expire_and_retry,
        edited("expire_run", ("AND state IN ('completed', 'failed', 'cancelled')", "")),
        "a run that was taken up again stays",
    ),
}


@pytest.mark.parametrize("name", GUARDS)
async def test_a_guard_taken_out_is_missed(world: World, name: str) -> None:
    scenario, plant, expected = GUARDS[name]
    with pytest.raises(Broken, match=expected):
        await world.explore(scenario, plant)


async def test_a_senders_key_is_unique(world: World) -> None:
    """Two that come at once do not see each other: only the index tells."""
    name = "inbox_run_id_sender_key_key"
    await world.monitor.execute(f"ALTER TABLE inbox DROP CONSTRAINT {name}")
    try:
        with pytest.raises(Broken, match="each comes once"):
            await world.explore(mail.signals(keys=("same", "same")))
    finally:
        await world.monitor.execute(
            f"TRUNCATE inbox; ALTER TABLE inbox ADD CONSTRAINT {name} UNIQUE (run_id, sender_key)"
        )
