"""The audit log on every store: what is written, what is read, and what a check finds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from llm_orchestrator.model import Json
from llm_orchestrator.security import audit as writing
from llm_orchestrator.security.audit import (
    BEGIN,
    FORGET,
    HEAD,
    AuditLog,
    Head,
    Result,
    digest_of,
    put_head,
)
from llm_orchestrator.security.audit_check import Checked, Flaw, check_audit
from llm_orchestrator.security.audit_retention import forget
from llm_orchestrator.store.audit import Audit, AuditEntry, AuditFilter, ForgetAudit, place
from llm_orchestrator.store.base import Batch, PutRecord, Receipt, Store
from tests.store.support import HandClock, accepted, batches_of

EVERYTHING = AuditFilter(limit=1_000)


async def rows(store: Store) -> list[AuditEntry]:
    """Every entry, in the order of its chain."""
    return await store.shelf.audit_chains(("", 0), 1_000)


async def written(store: Store, clock: HandClock, chain_id: str, *actions: str) -> AuditLog:
    log = AuditLog(store, clock, chain_id)
    for action in actions:
        clock.now += 1
        await log.write(actor="ann", action=action, target="t", detail={"n": 1})
    return log


async def flaws(store: Store) -> list[Flaw]:
    return (await check_audit(store)).flaws


async def test_a_chain_begins_with_its_beginning_and_is_numbered_densely(
    store: Store, clock: HandClock
) -> None:
    log = await written(store, clock, "node-1", "a.b", "c.d")
    found = await rows(store)
    assert [(row.number, row.action) for row in found] == [(1, BEGIN), (2, "a.b"), (3, "c.d")]
    assert [row.recorded_at for row in found] == [clock.now - 1, clock.now - 1, clock.now]
    last = await log.write(actor="bob", action="e.f", result=Result.REFUSED, request_id="r1")
    assert last == (await rows(store))[-1]
    assert (last.actor, last.result, last.request_id, last.detail) == (
        "bob",
        "refused",
        "r1",
        b"{}",
    )
    assert await check_audit(store) == Checked(
        1, 4, [Head("node-1", 4, last.digest, last.recorded_at)], []
    )


async def test_lists_newest_first_with_filters_and_pages(store: Store, clock: HandClock) -> None:
    one, two = AuditLog(store, clock, "one"), AuditLog(store, clock, "two")
    for number in range(6):
        clock.now += number % 2  # some at the same time
        log = (one, two)[number % 2]
        await log.write(actor=f"a{number % 3}", action=f"b.{number % 2}", target=f"t{number}")
    found = await store.shelf.audit(EVERYTHING)
    assert [place(row) for row in found] == sorted(map(place, found), reverse=True)
    assert len(found) == 8
    paged: list[AuditEntry] = []
    while page := await store.shelf.audit(
        AuditFilter(before=place(paged[-1]) if paged else None, limit=3)
    ):
        paged += page
    assert paged == found

    async def listed(**wanted: Any) -> list[str]:
        return [row.target for row in await store.shelf.audit(AuditFilter(**wanted))]

    assert await listed(actor="a1") == ["t4", "t1"]
    assert await listed(action="b.1", actor="a0") == ["t3"]
    assert await listed(target="t2") == ["t2"]
    times = {row.target: row.recorded_at for row in found}
    assert await listed(since=times["t5"]) == ["t5"]
    assert set(await listed(until=times["t1"])) == {"t0", "one"}


async def test_those_who_write_at_once_share_a_commit_and_keep_their_order(
    store: Store, clock: HandClock
) -> None:
    log = AuditLog(store, clock, "node-1")
    batches = batches_of(store)
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(log.write(actor="a", action="b.c", target=str(number)))
            for number in range(20)
        ]
    assert [task.result().number for task in tasks] == list(range(2, 22))
    assert [task.result().target for task in tasks] == [str(number) for number in range(20)]
    assert len(batches) <= 2
    assert await flaws(store) == []


async def test_an_action_leaves_its_intention_and_its_result(
    store: Store, clock: HandClock
) -> None:
    log = AuditLog(store, clock, "n")
    async with log.action(actor="a", action="runs.fork", target="old") as facts:
        assert (await rows(store))[-1].result == "intended"
        facts["target"], facts["from"] = "new", "old"
    intended, done = (await rows(store))[-2:]
    assert (intended.target, done.target, done.result) == ("old", "new", "success")
    assert json.loads(done.detail) == {"from": "old", "intent": ["n", intended.number]}


@pytest.mark.parametrize(
    ("error", "result"),
    [("Refused", "refused"), ("StoreError", "failed"), ("ZeroDivisionError", "failed")],
)
async def test_what_an_action_raises_is_its_result(
    store: Store, clock: HandClock, error: str, result: str
) -> None:
    import builtins

    from llm_orchestrator import errors

    kind = getattr(errors, error, None) or getattr(builtins, error)
    log = AuditLog(store, clock, "n")
    with pytest.raises(kind):
        async with log.action(actor="a", action="b.c"):
            raise kind("no")
    last = (await rows(store))[-1]
    assert last.result == result
    assert json.loads(last.detail)["error"].startswith(
        error if error == "ZeroDivisionError" else kind.kind
    )


async def test_a_process_that_dies_within_an_action_leaves_the_intention(
    store: Store, clock: HandClock
) -> None:
    log = AuditLog(store, clock, "n")
    with pytest.raises(asyncio.CancelledError):
        async with log.action(actor="a", action="b.c"):
            raise asyncio.CancelledError
    assert [row.result for row in await rows(store)] == ["success", "intended"]


async def test_a_chain_goes_on_after_its_head_was_lost_from_memory(
    store: Store, clock: HandClock
) -> None:
    await written(store, clock, "n", "a.b")
    await written(store, clock, "n", "c.d")  # as if the process had forgotten where it was
    assert [row.number for row in await rows(store)] == [1, 2, 3]
    assert await flaws(store) == []


async def test_two_writers_of_one_chain_do_not_fork_it(store: Store, clock: HandClock) -> None:
    one = await written(store, clock, "n", "a.b")
    two = await written(store, clock, "n", "c.d")
    for log in (one, two, one):
        await log.write(actor="a", action="e.f")
    assert [row.number for row in await rows(store)] == [1, 2, 3, 4, 5, 6]
    assert await flaws(store) == []


async def test_a_long_chain_goes_on_as_another_one(
    store: Store, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "CHAIN_ENTRIES_MAX", 3)
    await written(store, clock, "n", *["a.b"] * 5)
    again = await written(store, clock, "n", "c.d")
    parts = [(chain_id, number) for chain_id in ("n", "n.2", "n.3") for number in (1, 2, 3)]
    assert [row[:2] for row in await rows(store)] == parts
    await again.write(actor="a", action="b.c")
    assert (await rows(store))[-1][:2] == ("n.4", 2)
    assert await flaws(store) == []


async def test_nothing_that_a_column_does_not_take_and_no_secret_gets_in(
    store: Store, clock: HandClock
) -> None:
    log = AuditLog(store, clock, "n")
    detail: Mapping[str, Json] = {
        "api_key": "sk-planted",
        "deep": {"token": "sk-planted", "nul": "a\0b", "half": "\ud800"},
        "long": "x" * 5_000,
    }
    odd = "a\0b\n\ud800" + "y" * 500
    row = await log.write(actor=odd, action="b.c", target=odd, detail=detail, request_id=odd)
    assert row == (await rows(store))[-1]
    assert b"planted" not in row.detail
    assert len(row.detail) < 1_000
    assert len(row.actor) < 250
    many: Mapping[str, Json] = {f"k{number}": "z" * 400 for number in range(30)}
    assert len((await log.write(actor="a", action="b.c", detail=many)).detail) < 100
    assert await flaws(store) == []


# -- what a check finds ---------------------------------------------------------------------------


async def replace_rows(store: Store, chain_id: str, kept: list[AuditEntry]) -> None:
    """What somebody with a grip on the tables does, in the words of every store."""
    await store.commit(Batch(changes=(ForgetAudit(chain_id), Audit(tuple(kept)))))


async def set_head(store: Store, chain_id: str, head: Head | None) -> None:
    """Change a head, or remove it."""
    _, version = await store.shelf.record(HEAD, chain_id)
    if head is None:
        change = PutRecord(HEAD, chain_id, None, version)
    else:
        change = put_head(head._replace(version=version + 1))
    assert not (await store.commit(Batch(changes=(change,)))).is_refused


def resealed(row: AuditEntry, **values: Any) -> AuditEntry:
    """A changed row whose own digest was computed again."""
    row = row._replace(**values)
    return row._replace(digest=digest_of(row))


def places(found: list[Flaw]) -> list[tuple[str, int]]:
    return [flaw[:2] for flaw in found]


FIELDS: list[tuple[str, Any]] = [
    ("recorded_at", 5),
    ("actor", "eve"),
    ("action", "x.y"),
    ("target", "u"),
    ("result", "refused"),
    ("detail", b"{}"),
    ("request_id", "r"),
    ("previous", bytes(32)),
    ("digest", bytes(32)),
]


@pytest.mark.parametrize(("field", "value"), FIELDS)
async def test_an_edited_field_shows(
    store: Store, clock: HandClock, field: str, value: Any
) -> None:
    await written(store, clock, "n", "a.b", "c.d", "e.f")
    found = await rows(store)
    assert set(AuditEntry._fields) == {name for name, _ in FIELDS} | {"chain_id", "number"}
    found[2] = found[2]._replace(**{field: value})
    await replace_rows(store, "n", found)
    assert ("n", 3) in places(await flaws(store))


async def test_an_edited_field_with_a_new_digest_shows_at_the_next_entry(
    store: Store, clock: HandClock
) -> None:
    await written(store, clock, "n", "a.b", "c.d", "e.f")
    found = await rows(store)
    found[2] = resealed(found[2], actor="eve")
    await replace_rows(store, "n", found)
    assert places(await flaws(store)) == [("n", 4)]


async def test_an_edited_last_entry_with_a_new_digest_shows_at_the_head(
    store: Store, clock: HandClock
) -> None:
    await written(store, clock, "n", "a.b", "c.d")
    found = await rows(store)
    found[-1] = resealed(found[-1], actor="eve")
    await replace_rows(store, "n", found)
    assert await flaws(store) == [Flaw("n", 3, "its digest is not the one of the head")]


Harm = Callable[[list[AuditEntry]], list[AuditEntry]]
HARM: dict[str, tuple[Harm, int]] = {
    "a removed row": (lambda all_: [*all_[:2], *all_[3:]], 3),
    "a removed first row": (lambda all_: all_[1:], 1),
    "removed rows": (lambda all_: [*all_[:1], *all_[3:]], 2),
    "a removed tail": (lambda all_: all_[:-2], 4),
    "swapped rows": (
        lambda all_: [
            *all_[:2],
            all_[3]._replace(number=3),
            all_[2]._replace(number=4),
            *all_[4:],
        ],
        3,
    ),
    "swapped and sealed rows": (
        lambda all_: [
            *all_[:2],
            (third := resealed(all_[3], number=3, previous=all_[1].digest)),
            resealed(all_[2], number=4, previous=third.digest),
            *all_[4:],
        ],
        5,
    ),
    "an added row": (
        lambda all_: [*all_, resealed(all_[-1], number=6, previous=all_[-1].digest)],
        6,
    ),
    "a row of another chain": (
        lambda all_: [*all_[:2], all_[2]._replace(detail=all_[2].detail + b" "), *all_[3:]],
        3,
    ),
}


@pytest.mark.parametrize("harm", HARM)
async def test_harm_to_a_chain_shows_where_it_is(store: Store, clock: HandClock, harm: str) -> None:
    await written(store, clock, "n", "a.b", "c.d", "e.f", "g.h")
    await written(store, clock, "other", "a.b")
    assert await flaws(store) == []
    change, number = HARM[harm]
    own = [row for row in await rows(store) if row.chain_id == "n"]
    await replace_rows(store, "n", change(own))
    found = places(await flaws(store))
    assert found[0] == ("n", number)
    assert {chain_id for chain_id, _ in found} == {"n"}


async def test_a_removed_chain_shows(store: Store, clock: HandClock) -> None:
    await written(store, clock, "n", "a.b", "c.d")
    await store.commit(Batch(changes=(ForgetAudit("n"),)))
    assert await flaws(store) == [Flaw("n", 0, "the whole chain is missing: entries 1 to 3")]


async def test_a_chain_that_was_removed_with_its_head_shows_in_a_later_beginning(
    store: Store, clock: HandClock
) -> None:
    await written(store, clock, "n", "a.b", "c.d")
    await written(store, clock, "later", "a.b")
    await store.commit(Batch(changes=(ForgetAudit("n"),)))
    await set_head(store, "n", None)
    assert await flaws(store) == [
        Flaw("n", 0, "the whole chain is missing: chain later names its entry 3")
    ]


async def test_a_tail_that_was_removed_with_its_head_shows_in_a_later_beginning(
    store: Store, clock: HandClock
) -> None:
    await written(store, clock, "n", "a.b", "c.d")
    await written(store, clock, "later", "a.b")
    kept = [row for row in await rows(store) if row.chain_id == "n"][:2]
    await replace_rows(store, "n", kept)
    await set_head(store, "n", Head("n", 2, kept[-1].digest))
    assert await flaws(store) == [Flaw("n", 3, "it is missing: chain later names it")]


async def test_a_chain_that_was_written_anew_shows_in_a_later_beginning(
    store: Store, clock: HandClock
) -> None:
    await written(store, clock, "n", "a.b", "c.d")
    await written(store, clock, "later", "a.b")
    kept = [row for row in await rows(store) if row.chain_id == "n"]
    kept[1] = resealed(kept[1], actor="eve")
    kept[2] = resealed(kept[2], previous=kept[1].digest)
    await replace_rows(store, "n", kept)
    await set_head(store, "n", Head("n", 3, kept[-1].digest))
    assert places(await flaws(store)) == [("n", 3)]


async def test_heads_that_were_noted_elsewhere_tell_of_a_log_that_was_rewritten_whole(
    store: Store, clock: HandClock
) -> None:
    await written(store, clock, "n", "a.b", "c.d")
    noted = (await check_audit(store)).heads
    kept = (await rows(store))[:2]
    await replace_rows(store, "n", kept)
    await set_head(store, "n", Head("n", 2, kept[-1].digest))
    assert await flaws(store) == []
    assert places((await check_audit(store, known=noted)).flaws) == [("n", 3)]


async def test_a_head_that_is_gone_shows(store: Store, clock: HandClock) -> None:
    await written(store, clock, "n", "a.b")
    await set_head(store, "n", None)
    assert await flaws(store) == [Flaw("n", 0, "its head is missing")]


async def test_retention_of_runs_leaves_the_log_alone(store: Store, clock: HandClock) -> None:
    from llm_orchestrator.store.base import Expire, TrimCommits

    writer = await accepted(store)
    await written(store, clock, "n", "a.b")
    before = await rows(store)
    await store.commit(Batch(changes=(Expire((writer.run_id,)), TrimCommits(keep=1))))
    assert await rows(store) == before
    assert await flaws(store) == []


async def test_chains_that_are_forgotten_by_policy_are_no_flaw_and_others_still_are(
    store: Store, clock: HandClock
) -> None:
    for chain_id in ("a", "b", "c"):
        await written(store, clock, chain_id, "a.b")
    border = clock.now
    clock.now += 1
    alive = await written(store, clock, "alive", "a.b")
    own = await written(store, clock, "own", "a.b")
    clock.now += 1
    assert await forget(store, own, before_us=border, actor="ann") == 2
    assert {row.chain_id for row in await rows(store)} == {"c", "alive", "own"}
    assert await flaws(store) == []
    assert await forget(store, own, before_us=border, actor="ann") == 0
    await store.commit(Batch(changes=(ForgetAudit("c"),)))  # by nobody's policy
    await set_head(store, "c", None)
    assert places(await flaws(store)) == [("c", 0)]
    await alive.write(actor="a", action="b.c")
    assert places(await flaws(store)) == [("c", 0)]


async def test_a_forgotten_chain_whose_process_lives_begins_anew(
    store: Store, clock: HandClock
) -> None:
    idle = await written(store, clock, "idle", "a.b")
    await written(store, clock, "later", "a.b")
    clock.now += 1
    border = clock.now
    clock.now += 1
    own = await written(store, clock, "own", "a.b")
    assert await forget(store, own, before_us=border, actor="ann") == 2
    clock.now += 1
    await idle.write(actor="a", action="b.c")
    assert [row[:2] for row in await rows(store)][:2] == [("idle", 1), ("idle", 2)]
    assert await flaws(store) == []


async def test_a_chain_that_moves_while_others_are_forgotten_stays(
    store: Store, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle = await written(store, clock, "idle", "a.b")
    clock.now += 1
    border = clock.now
    own = await written(store, clock, "own", "a.b")
    commit = store.commit

    async def move_meanwhile(batch: Batch) -> Receipt:
        receipt = await commit(batch)
        entries = [each for one in batch.changes if isinstance(one, Audit) for each in one.entries]
        if any(each.action == FORGET and each.result == "intended" for each in entries):
            await idle.write(actor="a", action="b.c")
        return receipt

    monkeypatch.setattr(store, "commit", move_meanwhile)
    assert await forget(store, own, before_us=border, actor="ann") == 0
    assert [row.number for row in await rows(store) if row.chain_id == "idle"] == [1, 2, 3]
    assert await flaws(store) == []


async def test_entries_that_stand_with_an_append_fall_with_it(
    store: Store, clock: HandClock
) -> None:
    from tests.store.support import draft, land

    writer = await accepted(store)
    stale = writer.copy()
    await written(store, clock, "n", "a.b")
    [*_, last] = await rows(store)
    first = resealed(last, chain_id="m", number=1)
    second = resealed(last, chain_id="m", number=2)
    assert not (await land(store, writer.append(draft(), changes=[Audit((first,))]))).refused
    assert (await land(store, stale.append(draft(step="b"), changes=[Audit((second,))]))).refused
    assert [row[:2] for row in await rows(store)] == [("m", 1), ("n", 1), ("n", 2)]
