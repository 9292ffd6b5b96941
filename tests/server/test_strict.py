"""Nothing in a request is ignored, and every refusal is a problem document that says where."""

from __future__ import annotations

from typing import Any

import httpx

from llm_orchestrator.server.bounds import BODY_BYTES_MAX
from tests.server.support import ECHO, Site

UNKNOWN = "00000000-0000-7000-8000-000000000000"


def problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The answer as a problem document; fails the test if it is none."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    found: dict[str, Any] = answer.json()
    assert (found["status"], found["code"]) == (status, code)
    assert found["type"] == f"urn:llm-orchestrator:problem:{code}"
    assert isinstance(found["retryable"], bool)
    return found


PARAMETERS = (
    ("GET", "/api/v1/runs?stat=failed"),
    ("GET", "/api/v1/runs?limit=1&limit=2"),
    ("GET", "/api/v1/runs?limit=1001"),
    ("GET", "/api/v1/runs?since=yesterday"),
    ("GET", "/api/v1/runs?since=2027-01-31"),
    ("GET", "/api/v1/runs?label=team"),
    ("GET", "/api/v1/runs?workflow=%00"),
    ("GET", "/api/v1/runs?cursor=nonsense"),
    ("GET", f"/api/v1/runs/{UNKNOWN}?wait=1"),
    ("GET", f"/api/v1/runs/{UNKNOWN}/result?wait=-1"),
    ("GET", "/api/v1/runs/not-an-id"),
    ("GET", "/api/v1/workflows/%00"),
    ("POST", "/api/v1/workflows/echo/execute?wait=1&wait=2"),
    ("POST", "/api/v1/workflows/echo/execute?wait=nan"),
    ("POST", "/api/v1/workflows/echo/execute?async=true"),
    ("GET", "/health?verbose=1"),
)
BODIES = (
    ("/workflows/echo/execute", b'{"inputs": {}, "prioritty": 1}'),
    ("/workflows/echo/execute", b'{"inputs": []}'),
    ("/workflows/echo/execute", b'{"priority": "1"}'),
    ("/workflows/echo/execute", b'{"inputs": {"topic": NaN}}'),
    ("/workflows/echo/execute", b'{"inputs": {"topic": "\\ud800"}}'),
    ("/workflows/echo/execute", b'{"queue": "a\\u0000b"}'),
    ("/workflows/echo/execute", b"{"),
    ("/workflows/echo/execute", b"[" * 100_000),
    ("/runs/bulk", b'{"filter": {}, "action": "cancel", "preview": 0}'),
    ("/runs/bulk", b'{"action": "cancel"}'),
    (f"/runs/{UNKNOWN}/signal", b"{}"),
    (f"/runs/{UNKNOWN}/cancel", b'{"reason": "why"}'),
)
METHODS = (
    ("PATCH", "/api/v1/workflows", "GET, POST"),
    ("POST", "/api/v1/workflows/echo", "DELETE, GET, PUT"),
    ("GET", "/api/v1/workflows/echo/execute", "POST"),
    ("GET", "/api/v1/runs/bulk", "POST"),
    ("DELETE", f"/api/v1/runs/{UNKNOWN}", "GET"),
    ("PUT", f"/api/v1/runs/{UNKNOWN}/checkpoints", "GET, POST"),
    ("POST", "/health", "GET"),
)


async def test_a_parameter_that_is_not_one_is_refused(site: Site) -> None:
    for method, path in PARAMETERS:
        found = problem(await site.http.request(method, path), 422, "invalid_request")
        assert found["problems"], path


async def test_a_body_that_does_not_fit_is_refused(site: Site) -> None:
    headers = {"content-type": "application/json"}
    for path, body in BODIES:
        answer = await site.http.post(f"/api/v1{path}", content=body, headers=headers)
        assert problem(answer, 422, "invalid_request")["problems"][0]["place"][0] == "body"


async def test_a_word_that_looks_like_no_number_may_stand_in_a_text(site: Site) -> None:
    await site.register(ECHO)
    found = await site.execute("echo", {"topic": "NaN and Infinity"})
    assert found["output"] == {"said": "NaN and Infinity!"}


async def test_a_key_that_cannot_be_kept_is_refused(site: Site) -> None:
    await site.register(ECHO)
    for key in ("", "a b", "a" * 201):
        answer = await site.post("/workflows/echo/execute", headers={"idempotency-key": key})
        problem(answer, 422, "invalid_request")


async def test_another_media_type_is_refused(site: Site) -> None:
    await site.register(ECHO)
    for kind in ("text/plain", "application/yaml", "application/x-www-form-urlencoded"):
        answer = await site.http.post(
            "/api/v1/workflows/echo/execute", content=b"{}", headers={"content-type": kind}
        )
        problem(answer, 415, "unsupported_media_type")
    answer = await site.http.post(
        "/api/v1/workflows", content=ECHO, headers={"content-type": "text/plain"}
    )
    problem(answer, 415, "unsupported_media_type")


async def test_another_method_is_told_which_ones_there_are(site: Site) -> None:
    for method, path, allow in METHODS:
        answer = await site.http.request(method, path)
        problem(answer, 405, "method_not_allowed")
        assert answer.headers["allow"] == allow, path


async def test_without_the_token_nothing_but_health_answers(site: Site) -> None:
    async with httpx.AsyncClient(base_url=site.serving.url, trust_env=False) as http:
        document = (await http.get("/openapi.json")).json()
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                place = path.replace("{run_id}", UNKNOWN).replace("{", "").replace("}", "")
                answer = await http.request(method, place)
                if operation.get("security"):
                    problem(answer, 401, "unauthenticated")
                    assert answer.headers["www-authenticate"].startswith("Bearer")
                else:
                    assert answer.status_code in (200, 503), path
        wrong = await http.get("/api/v1/runs", headers={"authorization": "Bearer wrong-horse"})
        problem(wrong, 401, "unauthenticated")


async def test_bodies_are_bounded_whether_they_say_their_length_or_not(site: Site) -> None:
    async def pieces() -> Any:
        for _ in range(BODY_BYTES_MAX // (1 << 20) + 1):
            yield b" " * (1 << 20)

    headers = {"content-type": "application/json"}
    for content in (b" " * (BODY_BYTES_MAX + 1), pieces()):
        answer = await site.http.post("/api/v1/runs/bulk", content=content, headers=headers)
        problem(answer, 413, "too_large")


async def test_what_is_nowhere_is_a_problem_too(site: Site) -> None:
    problem(await site.http.get("/api/v1/nowhere"), 404, "not_found")
