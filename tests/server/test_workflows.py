"""Definitions over HTTP, and starting runs of them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from llm_orchestrator.language.load import load_text
from llm_orchestrator.server import known
from tests.server.support import ECHO, WAITS, YAML, Site, make_config, serve


async def test_a_workflow_is_new_once_and_the_same_the_second_time(site: Site) -> None:
    first, second = await site.register(ECHO), await site.register(ECHO)
    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json()["is_new"] is True
    assert second.json() == first.json() | {"is_new": False}
    assert first.json()["digest"] == load_text(ECHO).digest


async def test_the_same_workflow_as_json_has_the_same_digest(site: Site) -> None:
    definition = json.loads(load_text(ECHO).canonical())
    as_json = await site.post("/workflows", definition)
    assert (as_json.status_code, (await site.register(ECHO)).status_code) == (201, 200)


async def test_another_content_under_the_same_version_is_refused_but_put_takes_it(
    site: Site,
) -> None:
    await site.register(ECHO)
    other = ECHO.replace('"!"', '"?"')
    refused = await site.register(other)
    assert (refused.status_code, refused.json()["code"]) == (409, "refused")
    put = await site.http.put("/api/v1/workflows/echo", content=other, headers=YAML)
    assert put.status_code == 201
    assert "another content" in put.json()["warnings"][-1]
    assert (await site.execute("echo", {"topic": "x"}))["output"] == {"said": "x?"}


async def test_put_needs_the_name_and_a_workflow_that_is_there(site: Site) -> None:
    absent = await site.http.put("/api/v1/workflows/echo", content=ECHO, headers=YAML)
    await site.register(ECHO)
    misnamed = await site.http.put("/api/v1/workflows/other", content=ECHO, headers=YAML)
    assert (absent.status_code, misnamed.status_code) == (404, 422)


async def test_every_problem_of_a_file_is_told_with_line_and_column(site: Site) -> None:
    text = "name: bad\nsteps:\n  - {id: a, type: nonsense}\n  - {id: a, type: transform}\n"
    refused = await site.register(text)
    assert refused.status_code == 422
    places = [(each["line"], each["message"]) for each in refused.json()["problems"]]
    checked = await site.http.post("/api/v1/workflows/validate", content=text, headers=YAML)
    assert checked.status_code == 200
    assert checked.json()["is_valid"] is False
    assert [(each["line"], each["message"]) for each in checked.json()["problems"]] == places
    assert {line for line, _ in places} >= {3}


async def test_validating_saves_nothing(site: Site) -> None:
    checked = await site.http.post("/api/v1/workflows/validate", content=ECHO, headers=YAML)
    assert checked.json()["is_valid"] is True
    assert (await site.get("/workflows")).json() == {"items": [], "next": None}


async def test_workflows_are_listed_page_by_page_with_their_newest_version(site: Site) -> None:
    for name, version in (("b", "1"), ("a", "1"), ("b", "2"), ("c", "1")):
        await site.register(f"name: {name}\nversion: '{version}'\n" + ECHO.partition("echo\n")[2])
    first = (await site.get("/workflows", limit=2)).json()
    assert [(each["name"], each["version"], each["versions"]) for each in first["items"]] == [
        ("a", "1", 1),
        ("b", "2", 2),
    ]
    second = (await site.get("/workflows", limit=2, cursor=first["next"])).json()
    assert [each["name"] for each in second["items"]] == ["c"]
    assert second["next"] is None


async def test_one_workflow_shows_its_definition_and_its_versions(site: Site) -> None:
    await site.register(ECHO)
    found = (await site.get("/workflows/echo")).json()
    assert found["definition"]["steps"][0]["id"] == "say"
    assert [each["version"] for each in found["versions"]] == ["1.0"]
    assert (await site.get("/workflows/echo", version="9")).status_code == 404


async def test_a_run_answers_with_its_result_when_it_ends_within_wait(site: Site) -> None:
    await site.register(ECHO)
    answer = await site.post(
        "/workflows/echo/execute", {"inputs": {"topic": "terns"}}, params={"wait": 20}
    )
    assert answer.status_code == 200
    found = answer.json()
    assert (found["state"], found["output"]) == ("completed", {"said": "terns!"})
    assert answer.headers["location"] == f"/api/v1/runs/{found['run_id']}"


async def test_a_run_that_does_not_end_within_wait_is_accepted(site: Site) -> None:
    await site.register(WAITS)
    answer = await site.post("/workflows/waits/execute", params={"wait": 0.05})
    assert answer.status_code == 202
    assert answer.json()["is_ended"] is False


async def test_inputs_that_do_not_fit_are_refused(site: Site) -> None:
    await site.register(ECHO)
    answer = await site.post("/workflows/echo/execute", {"inputs": {"topic": 5}})
    assert (answer.status_code, answer.json()["code"]) == (422, "input")


async def test_what_a_request_says_of_its_run_wins_over_the_workflow(site: Site) -> None:
    await site.register(ECHO)
    found = await site.execute(
        "echo", {"topic": "x"}, labels={"team": "a"}, priority=7, queue="slow"
    )
    run = (await site.get(f"/runs/{found['run_id']}")).json()
    assert (run["labels"], run["priority"], run["queue"]) == ({"team": "a"}, 7, "slow")


async def test_the_same_key_with_the_same_request_is_the_same_run(site: Site) -> None:
    await site.register(ECHO)
    headers = {"idempotency-key": "k1"}
    body = {"inputs": {"topic": "x"}, "labels": {"a": "b"}}
    answers = await asyncio.gather(
        *(
            site.post("/workflows/echo/execute", body, headers=headers, params={"wait": 20})
            for _ in range(5)
        )
    )
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["run_id"] for answer in answers}) == 1
    assert sorted(answer.json()["is_repeat"] for answer in answers) == [False, *[True] * 4]
    assert len((await site.get("/runs")).json()["items"]) == 1


async def test_a_key_that_comes_back_with_another_request_is_refused(site: Site) -> None:
    await site.register(ECHO)
    body = {"inputs": {"topic": "x"}, "labels": {"a": "b"}, "priority": 1}
    headers = {"idempotency-key": "k1"}
    first = await site.post("/workflows/echo/execute", body, headers=headers)
    others = [
        body | {"inputs": {"topic": "y"}},
        body | {"labels": {"a": "c"}},
        body | {"priority": 2},
        body | {"queue": "other"},
        body | {"delay_s": 9},
    ]
    for other in others:
        answer = await site.post("/workflows/echo/execute", other, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (422, "key_reused"), other
        assert answer.json()["run_id"] == first.json()["run_id"]
    versioned = await site.post(
        "/workflows/echo/execute", body, headers=headers, params={"version": "1.0"}
    )
    assert versioned.status_code == 422


async def test_a_repeat_is_answered_though_the_run_could_not_begin_any_more(site: Site) -> None:
    await site.register(ECHO)
    headers, body = {"idempotency-key": "k1"}, {"inputs": {"topic": "x"}}
    first = await site.post("/workflows/echo/execute", body, headers=headers)
    stricter = ECHO.replace('default: "!"', "required: true").replace(
        "name: echo", "name: echo\nversion: '2'"
    )
    assert (await site.register(stricter)).status_code == 201
    assert (await site.post("/workflows/echo/execute", body)).status_code == 422
    again = await site.post("/workflows/echo/execute", body, headers=headers)
    assert again.json()["is_repeat"] is True
    assert again.json()["run_id"] == first.json()["run_id"]


async def test_a_key_is_known_after_a_restart(store_url: str, tmp_path: Path) -> None:
    config = make_config(store_url, tmp_path)
    headers, body = {"idempotency-key": "k1"}, {"inputs": {"topic": "x"}}
    async with serve(config) as site:
        await site.register(ECHO)
        first = await site.post("/workflows/echo/execute", body, headers=headers)
    async with serve(config) as site:
        again = await site.post("/workflows/echo/execute", body, headers=headers)
        other = await site.post("/workflows/echo/execute", {}, headers=headers)
    assert again.json()["run_id"] == first.json()["run_id"]
    assert (other.status_code, other.json()["code"]) == (422, "key_reused")


async def test_a_newer_version_is_taken_whichever_process_registered_it(
    store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known, "KEPT_S", 3_600.0)  # so that only news can tell
    parts = "api" if store_url.startswith("sqlite") else "api,worker"
    second = serve(make_config(store_url, tmp_path / "other"), parts=parts)
    async with serve(make_config(store_url, tmp_path)) as one, second as two:
        await one.register(ECHO)
        assert (await one.execute("echo", {"topic": "x"}))["output"] == {"said": "x!"}
        for tail in "?.;":
            other = ECHO.replace('"!"', f'"{tail}"')
            await two.http.put("/api/v1/workflows/echo", content=other, headers=YAML)
            assert (await two.execute("echo", {"topic": "x"}))["output"] == {"said": f"x{tail}"}
            while (await one.execute("echo", {"topic": "x"}))["output"] != {"said": f"x{tail}"}:
                pass
