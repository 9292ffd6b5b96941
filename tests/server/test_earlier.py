"""The earlier system's paths: its own requests, as its documents wrote them, and what they mean."""

from __future__ import annotations

from typing import Any

from tests.server.support import ECHO, FAILS, Site

WAITS = """
name: waits
inputs: {}
steps:
  - {id: first, type: transform, function: template, template: one, output: [one]}
  - {id: gate, type: approval, message: may it go on?, depends_on: [first]}
  - {id: last, type: transform, function: template, template: two, depends_on: [gate]}
"""


async def waiting(site: Site) -> str:
    """A run that waits for an approval; its first step is finished."""
    await site.register(WAITS)
    run_id = str((await site.execute("waits", wait=0))["run_id"])
    await site.until(run_id, "waiting")
    return run_id


async def test_a_name_a_run_and_a_name_with_execution_id_mean_the_same(site: Site) -> None:
    run_id = await waiting(site)
    answers = [
        await site.get("/workflows/waits/status"),
        await site.get(f"/workflows/{run_id}/status"),
        await site.get("/workflows/waits/status", executionId=run_id),
    ]
    assert [answer.json()["execution_id"] for answer in answers] == [run_id] * 3
    found = answers[0].json()
    assert (found["status"], found["workflow_name"], found["error"]) == ("waiting", "waits", None)


async def test_a_name_alone_is_refused_while_it_could_mean_several_runs(site: Site) -> None:
    first, second = await waiting(site), await waiting(site)
    answer = await site.post("/workflows/waits/cancel")
    assert answer.status_code == 409
    assert first in answer.text
    assert second in answer.text
    answer = await site.post("/workflows/waits/cancel", params={"executionId": first})
    assert answer.status_code == 200
    await site.until(first, "cancelled")
    assert (await site.post("/workflows/waits/cancel")).json()["run_id"] == second


async def test_what_is_not_there_is_404(site: Site) -> None:
    run_id = await waiting(site)
    other = run_id[:-1] + ("0" if run_id[-1] != "0" else "1")
    for path, parameters in (
        ("/workflows/nobody/status", {}),
        (f"/state/{other}", {}),
        ("/state/waits", {"executionId": other}),
        ("/state/other", {"executionId": run_id}),
        ("/state/waits", {"executionId": "nonsense"}),
    ):
        assert (await site.get(path, **parameters)).status_code == 404, path


async def test_pause_and_resume(site: Site) -> None:
    run_id = await waiting(site)
    assert (await site.post(f"/workflows/{run_id}/pause")).status_code == 200
    assert (await site.until(run_id, "paused"))["reason"] == "operator"
    assert (await site.get(f"/workflows/{run_id}/status")).json()["status"] == "paused"
    assert (await site.post("/workflows/waits/resume")).status_code == 200
    await site.until(run_id, "waiting")


async def test_state_tells_steps_and_context(site: Site) -> None:
    await site.register(ECHO)
    run_id = (await site.execute("echo", {"topic": "whales"}))["run_id"]
    found = (await site.get(f"/state/{run_id}")).json()
    assert found["context"] == {
        "inputs": {"topic": "whales", "tail": "!"},
        "outputs": {"say": {"result": "whales!"}},
    }
    [step] = found["steps"]
    assert (step["step_id"], step["status"], step["retry_count"]) == ("say", "completed", 0)
    assert step["outputs"] == {"result": "whales!"}
    assert found["completed_at"]
    assert found["output"] == {"said": "whales!"}


async def test_retry_goes_again_from_the_step_that_failed(site: Site) -> None:
    await site.register(FAILS)
    run_id = (await site.execute("fails"))["run_id"]
    assert (await site.get("/workflows/fails/status")).json()["error"]
    before = (await site.get(f"/runs/{run_id}")).json()["entries"]
    assert (await site.post("/workflows/fails/retry")).status_code == 200
    after = await site.until(run_id, "failed")
    while after["entries"] == before:
        after = await site.until(run_id, "failed")


async def checkpoints(site: Site, name: str) -> list[dict[str, Any]]:
    found = (await site.get(f"/state/{name}/checkpoints")).json()
    assert found["total"] == len(found["items"])
    items: list[dict[str, Any]] = found["items"]
    return items


async def test_checkpoints_are_listed_asked_for_and_gone_back_to(site: Site) -> None:
    run_id = await waiting(site)
    [point] = await checkpoints(site, "waits")
    assert (point["step_id"], point["workflow_state_id"]) == ("first", run_id)
    asked = await site.post("/state/waits/checkpoints", {"executionId": run_id, "stepId": "first"})
    assert asked.json() == point
    assert (await site.post("/state/waits/checkpoints")).json() == point
    assert (await site.post("/state/waits/checkpoints", {"stepId": "gate"})).status_code == 409

    await site.serving.surface.operator.approve(run_id, "gate", approved=True, by="test")
    await site.until(run_id, "completed")
    assert [each["step_id"] for each in await checkpoints(site, run_id)][-1] == "first"
    body = {"checkpointId": point["id"]}
    assert (await site.post(f"/state/{run_id}/restore", body)).status_code == 200
    while not (found := await site.until(run_id, "completed"))["rewinds"]:
        assert found["state"] == "completed"
    after = await checkpoints(site, run_id)  # the answer was given once and is heard again
    assert after[1:] == [point]
    assert after[0]["step_id"] == "last"


async def test_restoring_to_what_is_no_checkpoint_is_refused(site: Site) -> None:
    run_id = await waiting(site)
    for wrong in ("1x", f"{run_id}:999", "other:2"):
        answer = await site.post("/workflows/waits/restore", {"checkpointId": wrong})
        assert answer.status_code == 404, wrong
    assert (await site.get("/workflows/waits/status")).json()["status"] == "waiting"


async def test_runs_are_listed_by_status_page_by_page(site: Site) -> None:
    ids = [await waiting(site) for _ in range(3)]
    found = (await site.get("/workflows", status="running", limit=2)).json()
    assert [item["id"] for item in found["items"]] == ids[:0:-1]
    assert (found["total"], found["limit"], found["offset"]) == (3, 2, 0)
    rest = (await site.get("/workflows", status="running", limit=2, offset=2)).json()
    assert [item["id"] for item in rest["items"]] == ids[:1]
    assert (await site.get("/workflows", status="failed")).json()["items"] == []
    assert (await site.get("/workflows", status="nonsense")).status_code == 422
    assert "next" in (await site.get("/workflows")).json()


async def test_execute_knows_async(site: Site) -> None:
    await site.register(ECHO)
    body = {"inputs": {"topic": "a"}, "async": False, "timeout_override": 30}
    answer = await site.post("/workflows/echo/execute", body)
    assert (answer.status_code, answer.json()["output"]) == (200, {"said": "a!"})
    answer = await site.post("/workflows/echo/execute", {"inputs": {"topic": "a"}, "async": True})
    assert answer.status_code == 202
