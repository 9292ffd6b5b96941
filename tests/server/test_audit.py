"""The audit log over HTTP: what every route leaves in it, how it is read and checked."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from llm_orchestrator.clock import RealClock
from llm_orchestrator.errors import StoreUnavailable
from llm_orchestrator.server.auditing import WRITES
from llm_orchestrator.server.principal import Permission, Principal
from llm_orchestrator.store.audit import ForgetAudit
from llm_orchestrator.store.base import Batch, Receipt
from tests.server.support import ECHO, LISTENS, WAITS, YAML, Site


async def entries(site: Site, **wanted: Any) -> list[dict[str, Any]]:
    """Oldest first, without the beginning of the chain."""
    answer = await site.get("/audit/events", **wanted)
    assert answer.status_code == 200, answer.text
    return [row for row in reversed(answer.json()["items"]) if row["action"] != "audit.begin"]


async def told(site: Site, **wanted: Any) -> list[tuple[str, str, str]]:
    return [(row["action"], row["target"], row["result"]) for row in await entries(site, **wanted)]


async def waiting(site: Site) -> str:
    await site.register(WAITS)
    run_id = str((await site.execute("waits", wait=0))["run_id"])
    await site.until(run_id, "waiting")
    return run_id


async def test_each_change_of_a_run_leaves_who_what_and_the_result(site: Site) -> None:
    run_id = await waiting(site)
    for act, status in (("pause", 200), ("resume", 200), ("retry", 409), ("cancel", 200)):
        answer = await site.post(f"/runs/{run_id}/{act}", headers={"x-request-id": f"r-{act}"})
        assert answer.status_code == status, answer.text
    assert await told(site, target=run_id) == [
        ("runs.start", run_id, "success"),
        ("runs.pause", run_id, "success"),
        ("runs.resume", run_id, "success"),
        ("runs.retry", run_id, "refused"),
        ("runs.cancel", run_id, "success"),
    ]
    rows = await entries(site, target=run_id)
    assert {row["actor"] for row in rows} == {"token"}
    assert [row["request_id"] for row in rows[1:]] == ["r-pause", "r-resume", "r-retry", "r-cancel"]
    assert rows[0]["detail"] == {"version": "1.0", "workflow": "waits"}
    assert rows[3]["detail"]["status"] == 409
    assert rows[3]["detail"]["error"].startswith("refused: ")


async def test_what_has_no_journal_is_announced_before_it_is_done(site: Site) -> None:
    await site.register(ECHO)
    await site.post("/admin/maintenance/enable", {"reason": "move"})
    await site.post("/admin/maintenance/disable")
    assert (await site.post("/admin/nodes/none/drain")).status_code == 404
    rows = await entries(site)
    assert [(row["action"], row["result"]) for row in rows] == [
        ("workflows.register", "intended"),
        ("workflows.register", "success"),
        ("maintenance.enable", "intended"),
        ("maintenance.enable", "success"),
        ("maintenance.disable", "intended"),
        ("maintenance.disable", "success"),
        ("nodes.drain", "intended"),
        ("nodes.drain", "refused"),
    ]
    for intended, done in zip(rows[::2], rows[1::2], strict=True):
        chain_id, _, number = intended["id"].rpartition("/")
        assert done["detail"]["intent"] == [chain_id, int(number)]


async def test_looking_previews_repeats_and_strangers_leave_nothing(site: Site) -> None:
    run_id = await waiting(site)
    before = await entries(site)
    await site.get("/runs")
    await site.post("/workflows/validate", {"name": "x"})
    await site.post(f"/runs/{run_id}/fork", {"dry_run": True})
    await site.post("/runs/bulk", {"action": "cancel", "filter": {}, "preview": True})
    stranger = await site.post(f"/runs/{run_id}/cancel", headers={"authorization": "Bearer no"})
    assert stranger.status_code == 401
    assert (await site.post("/nowhere")).status_code == 404
    assert await entries(site) == before


async def test_a_bulk_action_leaves_an_entry_for_each_run(site: Site) -> None:
    run_ids = {await waiting(site), await waiting(site)}
    body = {"action": "cancel", "filter": {"workflow": "waits"}, "preview": False}
    assert (await site.post("/runs/bulk", body)).status_code == 200
    found = [row for row in await told(site) if row[0] in ("runs.cancel", "runs.bulk")]
    assert {row[1] for row in found[:-1]} == run_ids
    assert found[-1] == ("runs.bulk", "", "success")


async def test_a_run_is_told_of_while_its_starter_still_waits_for_the_end(site: Site) -> None:
    await site.register(LISTENS)
    starting = asyncio.create_task(site.execute("listens", wait=20))
    clock = RealClock()
    while not (found := await told(site, action="runs.start")):
        await clock.sleep(0.01)
    assert not starting.done()
    run_id = found[0][1]
    await site.post(f"/runs/{run_id}/signal", {"name": "word", "payload": 1})
    assert (await starting)["run_id"] == run_id
    assert await told(site, action="runs.start") == found


async def test_who_may_not_is_told_of(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    weak = Principal("weak", frozenset({Permission.AUDIT_READ}))
    guard = type(site.serving.surface.guard)
    monkeypatch.setattr(guard, "principal", lambda self, authorization: weak)
    assert (await site.register(ECHO)).status_code == 403
    [row] = await entries(site)
    assert (row["actor"], row["action"], row["result"]) == ("weak", "workflows.register", "refused")


def test_every_permission_that_does_more_than_read_is_audited() -> None:
    assert {each for each in Permission if not each.endswith(":read")} == WRITES


async def test_pages_follow_each_other(site: Site) -> None:
    for _ in range(3):
        await site.register(ECHO)
    whole = (await site.get("/audit/events")).json()["items"]
    assert len(whole) == 7
    found: list[dict[str, Any]] = []
    cursor: dict[str, str] = {}
    while True:
        page = (await site.get("/audit/events", limit=3, **cursor)).json()
        found += page["items"]
        if page["next"] is None:
            break
        cursor = {"cursor": page["next"]}
    assert found == whole
    last = await site.get("/audit/events", since=whole[-1]["at"], until="2999-01-01T00:00:00Z")
    assert last.json()["items"] == whole
    assert (await site.get("/audit/events", until="2001-01-01T00:00:00Z")).json()["items"] == []


async def test_an_entry_is_found_by_its_id(site: Site) -> None:
    await site.register(ECHO)
    for row in (await site.get("/audit/events")).json()["items"]:
        answer = await site.get(f"/audit/events/{row['id']}")
        assert (answer.status_code, answer.json()) == (200, row)
    chain_id = row["id"].partition("/")[0]
    for wrong in (f"{chain_id}/4", f"{chain_id}x/1", f"{chain_id[:-1]}/1"):
        answer = await site.get(f"/audit/events/{wrong}")
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found"), wrong
    for wrong in (f"{chain_id}/0", f"{chain_id}/x", f"{chain_id}/{10**13}"):
        assert (await site.get(f"/audit/events/{wrong}")).status_code == 422, wrong


async def test_a_definition_is_named_with_its_version(site: Site) -> None:
    await site.register(ECHO)
    changed = ECHO.replace('"!"', '"?"')
    assert (await site.register(changed)).status_code == 409
    put = await site.http.put("/api/v1/workflows/echo", content=changed, headers=YAML)
    assert put.status_code == 201, put.text
    assert (await site.register("name: echo")).status_code == 422
    assert await told(site) == [
        ("workflows.register", "echo@1.0", "intended"),
        ("workflows.register", "echo@1.0", "success"),
        ("workflows.register", "echo@1.0", "refused"),
        ("workflows.replace", "echo@1.0", "intended"),
        ("workflows.replace", "echo@1.0", "success"),
        ("workflows.register", "", "refused"),
    ]
    kept = (await site.get("/workflows/echo")).json()["versions"]
    digests = [row["detail"].get("digest") for row in await entries(site)]
    assert {digests[1], digests[4]} == {each["digest"] for each in kept}


async def test_a_check_finds_what_was_removed(site: Site) -> None:
    await site.register(ECHO)
    answer = (await site.get("/audit/verify")).json()
    assert (answer["is_whole"], answer["chains"], answer["entries"]) == (True, 1, 3)
    [head] = answer["heads"]
    await site.serving.surface.store.commit(Batch(changes=(ForgetAudit(head["chain_id"]),)))
    answer = (await site.get("/audit/verify")).json()
    assert not answer["is_whole"]
    assert [flaw["chain_id"] for flaw in answer["flaws"]] == [head["chain_id"]]


async def test_what_cannot_be_announced_is_not_done(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = site.serving.surface.store
    commit = store.commit

    async def refuse(batch: Batch) -> Receipt:
        if any(type(change).__name__ == "Audit" for change in batch.changes):
            raise StoreUnavailable("planted", hint="none")
        return await commit(batch)

    monkeypatch.setattr(store, "commit", refuse)
    assert (await site.register(ECHO)).status_code == 503
    assert (await site.get("/workflows")).json()["items"] == []
    monkeypatch.setattr(store, "commit", commit)
    run_id = await waiting(site)
    monkeypatch.setattr(store, "commit", refuse)
    answer = await site.post(f"/runs/{run_id}/pause")
    assert answer.status_code == 200  # it is done, and its journal says by whom
    monkeypatch.undo()
    assert ("runs.pause", run_id, "success") not in await told(site)


async def test_an_answer_ends_once_its_entry_is_durable(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = await waiting(site)
    store = site.serving.surface.store
    commit, reached, go_on = store.commit, asyncio.Event(), asyncio.Event()

    async def hold(batch: Batch) -> Receipt:
        if any(type(change).__name__ == "Audit" for change in batch.changes):
            reached.set()
            await go_on.wait()
        return await commit(batch)

    monkeypatch.setattr(store, "commit", hold)
    asking = asyncio.create_task(site.post(f"/runs/{run_id}/pause"))
    await reached.wait()
    for _ in range(3):
        assert (await site.get(f"/runs/{run_id}")).status_code == 200
    assert not asking.done()
    go_on.set()
    assert (await asking).status_code == 200


async def test_nothing_that_users_have_written_gets_into_the_log(site: Site) -> None:
    await site.register(LISTENS)
    run_id = str((await site.execute("listens", wait=0))["run_id"])
    await site.until(run_id, "waiting")
    await site.post(f"/runs/{run_id}/signal", {"name": "word", "payload": "planted-secret"})
    await site.register("name: [planted-secret")
    answer = await site.get("/audit/events")
    assert "planted-secret" not in answer.text
