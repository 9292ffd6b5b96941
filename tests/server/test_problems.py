"""A problem document says back what was sent, and never a secret that the process knows."""

from __future__ import annotations

import base64
import json
from urllib.parse import quote

import pytest

from llm_orchestrator.telemetry import redact
from tests.server.support import ECHO, YAML, Site

SECRET = "planted+problem.G7&answer"
BASIC = base64.b64encode(f"me:{SECRET}".encode()).decode()
PATHS = (
    f"/api/v1/runs/{quote(SECRET, safe='')}",
    f"/api/v1/workflows/{quote(SECRET, safe='')}",
    f"/api/v1/runs?{quote(SECRET)}=1",
    f"/api/v1/runs?state={quote(SECRET, safe='')}",
    f"/api/v1/runs?cursor={quote(BASIC)}",
)
FILES = (
    f"name: w\n{SECRET}: 1\nsteps: [{{id: a, type: wait, seconds: 1}}]\n",
    f"name: w\nsteps: [{{id: a, type: {SECRET}}}]\n",
    f"name: w\nsteps: [{{id: a, type: wait, seconds: 1, depends_on: ['{BASIC}']}}]\n",
    f"name: w\nsteps: [{{id: a, type: llm, provider: {SECRET}, model: m, prompt: x}}]\n",
)


@pytest.fixture(autouse=True)
def known() -> None:
    """The process has resolved it."""
    redact.remember(SECRET)


def check(text: str, kind: str) -> None:
    assert kind == "application/problem+json"
    assert json.loads(text)["detail"]
    for form in (SECRET, quote(SECRET, safe=""), BASIC, BASIC[4:20]):
        assert form not in text, text


async def test_what_a_path_or_a_query_says_comes_back_without_it(site: Site) -> None:
    texts = []
    for path in PATHS:
        answer = await site.http.get(path)
        assert 400 <= answer.status_code < 500
        check(answer.text, answer.headers["content-type"])
        texts.append(answer.text)
    assert sum("***" in text for text in texts) >= 2, texts


async def test_what_a_body_says_comes_back_without_it(site: Site) -> None:
    for text in FILES:
        answer = await site.http.post("/api/v1/workflows", content=text, headers=YAML)
        assert answer.status_code == 422
        check(answer.text, answer.headers["content-type"])
        assert "***" in answer.text, text
    assert (await site.register(ECHO)).status_code == 201
    for body in ({SECRET: 1}, {"inputs": {SECRET: 1}}, {"inputs": {"topic": [SECRET]}}):
        answer = await site.post("/workflows/echo/execute", body)
        assert answer.status_code == 422
        check(answer.text, answer.headers["content-type"])


async def test_an_input_that_is_a_known_secret_is_neither_kept_nor_shown(site: Site) -> None:
    assert (await site.register(ECHO)).status_code == 201
    run = await site.execute("echo", {"topic": f"x {SECRET}", "tail": BASIC})
    for part in ("", "/result", "/journal", "/steps", "/events"):
        answer = await site.get(f"/runs/{run['run_id']}{part}")
        assert answer.status_code == 200
        assert "x ***" in answer.text or part in ("/steps", "/events"), answer.text
        assert SECRET not in answer.text
        assert BASIC not in answer.text
