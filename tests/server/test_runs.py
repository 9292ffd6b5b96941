"""Runs over HTTP: lists, results, requests."""

from __future__ import annotations

import datetime

from tests.server.support import ECHO, WAITS, Site


async def test_runs_are_listed_newest_first_page_by_page(site: Site) -> None:
    await site.register(ECHO)
    ids = [(await site.execute("echo", {"topic": str(n)}))["run_id"] for n in range(5)]
    pages: list[list[str]] = []
    cursor = None
    while True:
        more: dict[str, str] = {"cursor": cursor} if cursor else {}
        page = (await site.get("/runs", limit=2, **more)).json()
        pages.append([run["run_id"] for run in page["items"]])
        cursor = page["next"]
        if cursor is None:
            break
    assert [len(page) for page in pages] == [2, 2, 1]
    assert [run_id for page in pages for run_id in page] == sorted(ids, reverse=True)


async def test_runs_are_found_by_state_workflow_label_and_time(site: Site) -> None:
    await site.register(ECHO)
    await site.register(WAITS)
    done = await site.execute("echo", {"topic": "x"}, labels={"team": "a"})
    open_ = await site.execute("waits", wait=0)
    await site.until(open_["run_id"], "waiting")
    created = (await site.get(f"/runs/{done['run_id']}")).json()["created_at"]
    moment = datetime.datetime.fromisoformat(created)
    earlier = (moment - datetime.timedelta(seconds=1)).isoformat()
    later = (moment + datetime.timedelta(hours=1)).isoformat()

    async def found(**wanted: object) -> set[str]:
        answer = await site.get("/runs", **wanted)
        assert answer.status_code == 200, answer.text
        return {run["run_id"] for run in answer.json()["items"]}

    both = {done["run_id"], open_["run_id"]}
    assert await found(state="completed") == {done["run_id"]}
    assert await found(state=["completed", "waiting"]) == both
    assert await found(workflow="waits") == {open_["run_id"]}
    assert await found(label="team=a") == {done["run_id"]}
    assert await found(since=earlier, until=later) == both
    assert await found(since=later) == set()
    assert await found(until=earlier) == set()


async def test_a_result_waits_for_the_end(site: Site) -> None:
    await site.register(WAITS)
    run_id = (await site.execute("waits", wait=0))["run_id"]
    early = await site.get(f"/runs/{run_id}/result")
    assert (early.status_code, early.json()["is_ended"]) == (202, False)
    await site.until(run_id, "waiting")
    cancelled = await site.post(f"/runs/{run_id}/cancel")
    assert cancelled.status_code == 200, cancelled.text
    late = await site.get(f"/runs/{run_id}/result", wait=20)
    assert (late.status_code, late.json()["state"]) == (200, "cancelled")
    again = await site.post(f"/runs/{run_id}/cancel")
    assert (again.status_code, again.json()["code"]) == (409, "refused")


async def test_an_unknown_run_is_not_found(site: Site) -> None:
    unknown = "00000000-0000-7000-8000-000000000000"
    for path in ("", "/result"):
        answer = await site.get(f"/runs/{unknown}{path}")
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
