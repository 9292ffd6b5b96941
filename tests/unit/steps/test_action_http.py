"""Against a real server on a port that the system chose."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web

from llm_orchestrator.errors import (
    AuthorError,
    ProviderInvalidRequest,
    ProviderRateLimited,
    ProviderTimeout,
    ProviderTransient,
    ProviderUnknownOutcome,
)
from llm_orchestrator.model import Effect, Json
from llm_orchestrator.steps.action import Action, Actions
from llm_orchestrator.steps.action_http import sign
from tests.unit.steps.support import Room, config

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]
HERE = Action(Actions(outgoing_allow=["127.0.0.0/8", "::1"]))
MUTE = ["POST", "PUT", "DELETE", "PATCH"]


class Server:
    """Remembers each request; answers as `answer` says."""

    def __init__(self) -> None:
        self.seen: list[tuple[web.BaseRequest, bytes]] = []
        self.answer: Answer = self.say_ok
        self.url = ""
        self.released = asyncio.Event()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.seen.append((request, await request.read()))
        return await self.answer(request)  # type: ignore[arg-type]

    async def say_ok(self, request: web.BaseRequest) -> web.StreamResponse:
        return web.json_response({"ok": True})

    async def hang_up(self, request: web.BaseRequest) -> web.StreamResponse:
        """Read the whole request, do it perhaps, and close the socket without a word."""
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    async def be_silent(self, request: web.BaseRequest) -> web.StreamResponse:
        await self.released.wait()
        return web.Response()

    def always(self, status: int, **headers: str) -> None:
        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            return web.Response(status=status, headers=headers)

        self.answer = answer


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    here = Server()
    runner = web.ServerRunner(web.Server(here.handle), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
    here.url = f"http://127.0.0.1:{port}"
    yield here
    here.released.set()
    await runner.cleanup()


async def call(action: str, room: Room | None = None, **parameters: Json) -> Json:
    step = config("action", action=action, **parameters)
    return await HERE.execute(room or Room(), step)


async def test_a_get_gives_parsed_body_status_and_headers_in_that_order(server: Server) -> None:
    outputs = await call("http", url=f"{server.url}/a?b=c", headers={"X-Own": "1"})
    assert list(outputs) == ["body", "status", "headers"]
    assert outputs["body"] == {"ok": True}
    assert outputs["status"] == 200
    assert outputs["headers"]["content-type"].startswith("application/json")
    request = server.seen[0][0]
    assert (request.method, str(request.rel_url)) == ("GET", "/a?b=c")
    assert request.headers["X-Own"] == "1"
    assert "idempotency-key" not in request.headers


async def test_a_post_sends_json_once_with_the_idempotency_key(server: Server) -> None:
    await call("http", method="post", url=server.url, json={"ä": [1]})
    [(request, body)] = server.seen
    assert json.loads(body) == {"ä": [1]}
    assert request.headers["content-type"] == "application/json"
    assert request.headers["idempotency-key"] == "key-1"


async def test_an_own_idempotency_key_and_content_type_stay(server: Server) -> None:
    headers = {"Idempotency-Key": "mine", "Content-Type": "text/csv"}
    await call("http", method="PUT", url=server.url, body="a;b", headers=headers)
    [(request, body)] = server.seen
    assert body == b"a;b"
    assert request.headers.getall("idempotency-key") == ["mine"]
    assert request.headers["content-type"] == "text/csv"


async def test_a_key_that_no_header_may_hold_is_escaped(server: Server) -> None:
    await call("http", Room(idempotency_key="run/ü\r\nX: 1"), method="POST", url=server.url)
    assert server.seen[0][0].headers["idempotency-key"] == "run/%C3%BC%0D%0AX:%201"


@pytest.mark.parametrize("method", MUTE)
async def test_an_answer_that_never_came_is_an_unknown_outcome_and_is_sent_once(
    server: Server, method: str
) -> None:
    server.answer = server.hang_up
    with pytest.raises(ProviderUnknownOutcome, match=f"{method} 127.0.0.1 was sent"):
        await call("http", method=method, url=server.url, json={"pay": 1})
    assert len(server.seen) == 1


async def test_silence_is_an_unknown_outcome_too(server: Server) -> None:
    server.answer = server.be_silent
    with pytest.raises(ProviderUnknownOutcome, match=r"no answer within 0\.1 s"):
        await call("http", method="POST", url=server.url, timeout=0.1)


async def test_half_an_answer_is_an_unknown_outcome(server: Server) -> None:
    async def cut_off(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-length": "100"})
        await response.prepare(request)
        await response.write(b"half")
        assert request.transport is not None
        request.transport.close()
        return response

    server.answer = cut_off
    with pytest.raises(ProviderUnknownOutcome):
        await call("http", method="POST", url=server.url)


async def test_a_repeatable_request_without_an_answer_is_transient_and_sent_once(
    server: Server,
) -> None:
    server.answer = server.hang_up
    with pytest.raises(ProviderTransient, match="the answer was lost"):
        await call("http", url=server.url)
    with pytest.raises(ProviderTransient, match="the answer was lost"):
        await call("http", method="POST", url=server.url, effect="repeatable")
    with pytest.raises(ProviderUnknownOutcome):
        await call("http", url=server.url, effect="once")
    assert len(server.seen) == 3
    server.answer = server.be_silent
    with pytest.raises(ProviderTimeout):
        await call("http", url=server.url, timeout=0.1)


async def test_a_connection_that_was_refused_sent_nothing() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(ProviderTransient, match="nothing was sent") as caught:
            await call("http", method="POST", url=f"http://127.0.0.1:{port}/?key=hidden")
        assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (500, ProviderTransient),
        (503, ProviderTransient),
        (408, ProviderTransient),
        (400, ProviderInvalidRequest),
        (401, ProviderInvalidRequest),
        (404, ProviderInvalidRequest),
        (302, ProviderInvalidRequest),
    ],
)
async def test_a_bad_status_is_an_answer_and_is_noted(
    server: Server, status: int, kind: type[Exception]
) -> None:
    server.always(status)
    room = Room()
    with pytest.raises(kind, match=f"POST 127.0.0.1 answered {status}"):
        await call("http", room, method="POST", url=f"{server.url}/?key=hidden")
    assert room.notes == {"http_status": status}
    assert len(server.seen) == 1


async def test_too_many_requests_says_when_to_come_back(server: Server) -> None:
    server.always(429, **{"Retry-After": "7"})
    with pytest.raises(ProviderRateLimited) as caught:
        await call("http", url=server.url)
    assert caught.value.retry_after_s == 7
    server.always(429, **{"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"})
    with pytest.raises(ProviderRateLimited) as caught:
        await call("http", url=server.url)
    assert caught.value.retry_after_s == 0


async def test_an_expected_status_is_no_error(server: Server) -> None:
    server.always(404)
    assert (await call("http", url=server.url, expect_status=404))["status"] == 404
    assert (await call("http", url=server.url, expect_status=[200, 404]))["body"] is None
    with pytest.raises(ProviderInvalidRequest, match="answered 404"):
        await call("http", url=server.url, expect_status=200)


async def test_redirects_are_followed_so_far_and_by_get_only(server: Server) -> None:
    async def once(request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/old":
            return web.Response(status=301, headers={"location": "/new"})
        return web.Response(text=request.path)

    server.answer = once
    assert (await call("http", url=f"{server.url}/old"))["body"] == "/new"
    with pytest.raises(ProviderInvalidRequest) as caught:
        await call("http", method="POST", url=f"{server.url}/old", effect="repeatable")
    assert "final url" in str(caught.value.hint)
    server.always(301, location="/again")
    with pytest.raises(ProviderInvalidRequest, match="TooManyRedirects"):
        await call("http", url=server.url)


@pytest.mark.parametrize(
    ("content", "kind", "body"),
    [
        (b"plain", "text/plain", "plain"),
        (b'{"a": NaN}', "application/json", '{"a": NaN}'),
        (b'{"a": 1}', "application/problem+json", {"a": 1}),
        (b'{"a": 1}', "text/plain", '{"a": 1}'),
        (b"\xff\x00", "image/png", {"base64": base64.b64encode(b"\xff\x00").decode()}),
        ("ü".encode("latin-1"), "text/plain; charset=latin-1", "ü"),
    ],
)
async def test_no_answer_is_lost_whatever_it_holds(
    server: Server, content: bytes, kind: str, body: Json
) -> None:
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=content, headers={"content-type": kind, "set-cookie": "s=1"})

    server.answer = answer
    outputs = await call("http", url=server.url)
    assert outputs["body"] == body
    assert "set-cookie" not in outputs["headers"]


async def test_a_larger_answer_than_a_step_may_have_is_refused(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_orchestrator.steps.action_http.ANSWER_BYTES_MAX", 5)
    with pytest.raises(ProviderInvalidRequest, match="larger than"):
        await call("http", url=server.url)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "needs the parameter 'url'"),
        ({"url": "http://127.0.0.1", "uri": 1}, "no parameter 'uri'"),
        ({"url": "ftp://127.0.0.1"}, "must begin with http"),
        ({"url": "file:///etc/passwd"}, "must begin with http"),
        ({"url": [1]}, "is a list of 1"),
        ({"url": "http://127.0.0.1", "method": "BREW"}, "no method 'BREW'"),
        ({"url": "http://127.0.0.1", "json": 1, "body": "x"}, "not both"),
        ({"url": "http://127.0.0.1", "body": {"a": 1}}, "use 'json'"),
        ({"url": "http://127.0.0.1", "timeout": 0}, "timeout is a number"),
        ({"url": "http://127.0.0.1", "expect_status": "ok"}, "expect_status"),
        ({"url": "http://127.0.0.1", "headers": {"x": "a\r\nb: c"}}, "the header 'x' holds"),
        ({"url": "http://127.0.0.1", "headers": {"x y": "a"}}, "the header 'x y' holds"),
    ],
)
async def test_what_cannot_be_sent_is_the_authors_mistake(
    parameters: dict[str, Json], message: str
) -> None:
    with pytest.raises(AuthorError, match=message):
        await call("http", **parameters)


async def test_a_webhook_is_signed_as_the_standard_says(server: Server) -> None:
    key = b"0123456789abcdef01234567"
    secret = f"whsec_{base64.b64encode(key).decode()}"
    outputs = await call("webhook", url=server.url, payload={"n": 1}, secret=secret)
    assert outputs["status"] == 200
    [(request, body)] = server.seen
    assert (request.method, body) == ("POST", b'{"n":1}')
    message_id, timestamp = request.headers["webhook-id"], request.headers["webhook-timestamp"]
    assert message_id == "key-1"
    assert timestamp.isdecimal()
    signed = f"{message_id}.{timestamp}.".encode() + body
    expected = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    assert request.headers["webhook-signature"] == f"v1,{expected}"


async def test_a_webhook_without_a_secret_is_not_signed(server: Server) -> None:
    await call("webhook", url=server.url)
    [(request, body)] = server.seen
    assert body == b"{}"
    assert "webhook-signature" not in request.headers


def test_the_signature_matches_the_standards_own_example() -> None:
    # From the test vectors of the Standard Webhooks reference libraries.
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    message = b'msg_p5jXN8AQM9LWM0D4loKWxJek.1614265330.{"test": 2432232314}'
    assert sign(secret, message) == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


async def test_a_webhook_without_an_answer_is_an_unknown_outcome(server: Server) -> None:
    server.answer = server.hang_up
    with pytest.raises(ProviderUnknownOutcome):
        await call("webhook", url=server.url, payload={})
    assert len(server.seen) == 1


def test_get_and_head_are_repeatable_everything_else_happens_once() -> None:
    def effect(action: str, **parameters: Json) -> Effect:
        return Action().effect(config("action", action=action, **parameters))

    assert effect("http", url="u") is Effect.REPEATABLE
    assert effect("http", url="u", method="head") is Effect.REPEATABLE
    for method in (*MUTE, "OPTIONS"):
        assert effect("http", url="u", method=method) is Effect.ONCE
    assert effect("webhook", url="u") is Effect.ONCE
