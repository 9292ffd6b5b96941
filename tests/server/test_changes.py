"""Changing runs over HTTP: each request reaches the engine, and what does not fit is refused."""

from __future__ import annotations

import json
from typing import Any

from tests.server.support import ECHO, FAILS, LISTENS, WAITS, YAML, Site


async def waiting(site: Site) -> str:
    """A run that waits for an approval."""
    await site.register(WAITS)
    run_id = (await site.execute("waits", wait=0))["run_id"]
    await site.until(run_id, "waiting")
    return str(run_id)


async def ended(site: Site, run_id: str) -> dict[str, Any]:
    answer = await site.get(f"/runs/{run_id}/result", wait=20)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def test_an_approval_lets_a_run_go_on(site: Site) -> None:
    run_id = await waiting(site)
    answer = await site.post(f"/runs/{run_id}/approve")
    assert answer.status_code == 200, answer.text
    assert (await ended(site, run_id))["output"] == {"two": 2, "approved": True}


async def test_a_rejection_is_an_answer_too(site: Site) -> None:
    run_id = await waiting(site)
    assert (await site.post(f"/runs/{run_id}/reject", {"step": "gate"})).status_code == 200
    assert (await ended(site, run_id))["output"] == {"two": 2, "approved": False}
    again = await site.post(f"/runs/{run_id}/approve")
    assert again.status_code == 404


async def test_a_paused_run_is_held_until_it_is_resumed(site: Site) -> None:
    run_id = await waiting(site)
    assert (await site.post(f"/runs/{run_id}/pause")).json()["state"] == "paused"
    found = await ended(site, run_id)
    assert (found["state"], found["is_ended"]) == ("paused", True)
    assert (await site.post(f"/runs/{run_id}/resume")).status_code == 200
    await site.until(run_id, "waiting")
    wrong = await site.post(f"/runs/{run_id}/resume")
    assert (wrong.status_code, wrong.json()["code"]) == (409, "refused")


async def test_a_signal_with_the_same_key_is_delivered_once(site: Site) -> None:
    await site.register(LISTENS)
    run_id = (await site.execute("listens", wait=0))["run_id"]
    await site.until(run_id, "waiting")
    await site.post(f"/runs/{run_id}/pause")
    for payload in ("first", "second"):
        answer = await site.post(
            f"/runs/{run_id}/signal",
            {"name": "word", "payload": payload},
            headers={"idempotency-key": "k"},
        )
        assert answer.status_code == 200, answer.text
    await site.post(f"/runs/{run_id}/resume")
    assert (await ended(site, run_id))["output"] == {"heard": "first"}


async def test_a_failed_run_is_retried_from_the_step_that_failed(site: Site) -> None:
    await site.register(FAILS)
    run_id = (await site.execute("fails"))["run_id"]
    before = (await site.get(f"/runs/{run_id}")).json()
    assert (await site.post(f"/runs/{run_id}/retry")).status_code == 200
    assert (await ended(site, run_id))["state"] == "failed"
    after = (await site.get(f"/runs/{run_id}")).json()
    assert after["attempts"] == before["attempts"] + 1


async def test_a_run_goes_back_to_a_checkpoint(site: Site) -> None:
    run_id = await waiting(site)
    await site.post(f"/runs/{run_id}/approve")
    await ended(site, run_id)
    points = (await site.get(f"/runs/{run_id}/checkpoints")).json()["items"]
    assert [point["step"] for point in points] == ["", "first", "last"]
    newest = await site.post(f"/runs/{run_id}/checkpoints")
    assert newest.json() == points[-1]
    back = await site.post(f"/runs/{run_id}/restore", {"checkpoint": points[1]["checkpoint"]})
    assert back.status_code == 200, back.text
    assert (await ended(site, run_id))["state"] == "completed"
    assert (await site.get(f"/runs/{run_id}")).json()["rewinds"] == 1
    hidden = (await site.get(f"/runs/{run_id}/checkpoints")).json()["items"]
    assert [point["is_hidden"] for point in hidden] == [False, False, True, False]


async def test_a_checkpoint_of_another_run_or_none_is_refused(site: Site) -> None:
    run_id = await waiting(site)
    other = "00000000-0000-7000-8000-000000000000"
    assert (
        await site.post(f"/runs/{run_id}/restore", {"checkpoint": f"{other}:1"})
    ).status_code == 404
    assert (
        await site.post(f"/runs/{run_id}/restore", {"checkpoint": f"{run_id}:99"})
    ).status_code == 404


async def test_a_dry_fork_says_what_is_done_again_and_what_it_cost(site: Site) -> None:
    run_id = await waiting(site)
    plan = await site.post(f"/runs/{run_id}/fork", {"step": "gate", "dry_run": True})
    assert plan.status_code == 200, plan.text
    found = plan.json()
    assert (found["run_id"], found["kept"]) == (None, ["first"])
    assert [step["step"] for step in found["redone"]] == ["gate"]
    assert found["never_done"] == ["last"]
    assert len((await site.get("/runs")).json()["items"]) == 1


async def test_a_fork_takes_edited_inputs_and_another_version(site: Site) -> None:
    await site.register(ECHO)
    run_id = (await site.execute("echo", {"topic": "x"}))["run_id"]
    newer = "version: '2'" + ECHO.replace('"!"', '"?"')
    assert (await site.register(newer)).status_code == 201
    body = {"step": "say", "inputs": {"topic": "y"}}
    same = await site.post(f"/runs/{run_id}/fork", body)
    assert same.status_code == 201, same.text
    assert (await ended(site, same.json()["run_id"]))["output"] == {"said": "y!"}
    other = await site.post(
        f"/runs/{run_id}/fork", {"step": "say", "version": "2", "inputs": {"tail": "?"}}
    )
    detail = (await site.get(f"/runs/{other.json()['run_id']}")).json()
    assert (detail["version"], detail["origin"]["fork"]) == ("2", run_id)
    assert (await ended(site, detail["run_id"]))["output"] == {"said": "x?"}


async def test_a_fork_with_inputs_that_do_not_fit_is_refused(site: Site) -> None:
    await site.register(ECHO)
    run_id = (await site.execute("echo", {"topic": "x"}))["run_id"]
    for body in ({"inputs": {"topic": 1}}, {"inputs": {"unknown": 1}}):
        answer = await site.post(f"/runs/{run_id}/fork", body)
        assert (answer.status_code, answer.json()["code"]) == (422, "input")
    unknown = await site.post(f"/runs/{run_id}/fork", {"step": "nowhere"})
    assert unknown.status_code == 404


async def test_what_became_of_a_step_is_decided_only_where_it_is_unknown(site: Site) -> None:
    run_id = await waiting(site)
    await site.post(f"/runs/{run_id}/pause")
    half = await site.post(f"/runs/{run_id}/resume", {"decide": {"step": "first"}})
    assert half.status_code == 422
    decided = {"step": "first", "outcome": "finished", "result": 1}
    unknown = await site.post(f"/runs/{run_id}/resume", {"decide": decided})
    assert unknown.status_code == 404


async def test_a_bulk_action_is_first_only_a_preview(site: Site) -> None:
    await site.register(WAITS)
    await site.register(ECHO)
    done = (await site.execute("echo", {"topic": "x"}))["run_id"]
    ids = [(await site.execute("waits", wait=0))["run_id"] for _ in range(3)]
    for run_id in ids:
        await site.until(run_id, "waiting")
    body = {"filter": {}, "action": "cancel"}
    preview = (await site.post("/runs/bulk", body)).json()
    assert (preview["preview"], preview["count"]) == (True, 3)
    assert {item["run_id"] for item in preview["items"]} == set(ids)
    assert (await site.get(f"/runs/{ids[0]}")).json()["state"] == "waiting"
    capped = (await site.post("/runs/bulk", {**body, "limit": 2})).json()
    assert (capped["count"], capped["has_more"]) == (2, True)
    named = {"filter": {"state": ["waiting", "completed"]}, "action": "cancel", "preview": False}
    result = (await site.post("/runs/bulk", named)).json()
    by_run = {item["run_id"]: item for item in result["items"]}
    assert by_run[done]["code"] == "refused"
    assert {by_run[run_id]["state"] for run_id in ids} == {"cancelled"}
    for run_id in ids:
        assert (await ended(site, run_id))["state"] == "cancelled"


async def test_a_journal_is_told_entry_by_entry_with_its_digests(site: Site) -> None:
    await site.register(ECHO)
    run_id = (await site.execute("echo", {"topic": "x"}))["run_id"]
    first = (await site.get(f"/runs/{run_id}/journal", limit=2)).json()
    rest = (await site.get(f"/runs/{run_id}/journal", cursor=first["next"])).json()
    entries = first["items"] + rest["items"]
    assert [entry["seq"] for entry in entries] == list(range(1, len(entries) + 1))
    assert entries[0]["payload"]["input"] == {"topic": "x", "tail": "!"}
    assert all(len(entry["digest"]) == 64 for entry in entries)
    assert (first["flaws"], rest["next"]) == ([], None)


async def test_steps_and_explanations_are_told(site: Site) -> None:
    run_id = await waiting(site)
    steps = (await site.get(f"/runs/{run_id}/steps")).json()
    states = {step["step"]: step["state"] for step in steps["items"]}
    assert states == {"first": "completed", "gate": "waiting"}
    assert steps["planned"] == ["last"]
    told = (await site.get(f"/runs/{run_id}/explain")).json()
    assert "approv" in told["sentence"]
    assert told["command"].startswith("llmo ")


async def test_a_workflow_is_deleted_only_while_no_run_refers_to_it(site: Site) -> None:
    run_id = await waiting(site)
    await site.register(ECHO)
    used = await site.http.delete("/api/v1/workflows/waits")
    assert (used.status_code, used.json()["code"]) == (409, "refused")
    assert "1 of them have not ended" in used.json()["detail"]
    gone = await site.http.delete("/api/v1/workflows/echo")
    assert [each["name"] for each in gone.json()["deleted"]] == ["echo"]
    assert (await site.post("/workflows/echo/execute")).status_code == 404
    assert (await site.http.delete("/api/v1/workflows/echo")).status_code == 404
    await site.post(f"/runs/{run_id}/cancel")
    await ended(site, run_id)
    assert (await site.http.delete("/api/v1/workflows/waits")).status_code == 409


async def test_a_deleted_workflow_fires_no_schedule_any_more(site: Site) -> None:
    text = ECHO.replace(
        "name: echo", "name: echo\nschedule: {cron: '0 0 1 1 *', inputs: {topic: x}}"
    )
    registered = await site.http.post("/api/v1/workflows", content=text, headers=YAML)
    assert registered.status_code == 201, registered.text
    store = site.serving.surface.store
    assert json.dumps(await store.shelf.records("schedule")).count("cron") == 1
    assert (await site.http.delete("/api/v1/workflows/echo")).status_code == 200
    assert await store.shelf.records("schedule") == {}
