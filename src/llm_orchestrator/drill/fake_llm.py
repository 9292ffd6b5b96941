"""A fake LLM server for tests and drills: real HTTP, real wire formats, a ledger on disk.

    python -m llm_orchestrator.drill.fake_llm --port 0 --ledger calls.jsonl

prints one JSON line with its port once it listens. It speaks OpenAI (chat, embeddings, models, and
llama.cpp's replay of a stream by conversation id), Anthropic (messages) and Cohere (embed). Every
request is in the ledger, fsynced, before the first byte of its answer leaves; what was sent until
the end or the disconnect follows. So the ledger is the witness of what was really asked and paid:
it must never lose a line that a client could have seen the effect of.

Steering: markers in the prompt or a header `X-Fake` (see fake_script), or
POST /control {"script": [{...}, ...], "default": {...}, "reset": true}: each entry of the script is
used up by one request (with "match": {"api", "model", "contains"} by the first that fits), the
default stays. GET /control/ledger returns the lines, GET /control/idle answers when no request is
under way. A key that contains "bad" is refused with 401.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import resource
import signal
from collections import Counter
from pathlib import Path
from typing import Any

from aiohttp import web

from llm_orchestrator.clock import RealClock
from llm_orchestrator.drill.fake_ledger import Ledger
from llm_orchestrator.drill.fake_script import Behaviour, answer, behaviour
from llm_orchestrator.drill.fake_wire import (
    AnthropicWire,
    Ask,
    Call,
    OpenAIWire,
    Wire,
    cohere_embeddings,
    embedding_texts,
    openai_embeddings,
)
from llm_orchestrator.providers.echo import unit_vector

Json = Any
_BODY_MAX = 64 << 20
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError)
_ABORTED = (ConnectionError, asyncio.CancelledError)


class Replay:
    """The bytes of one stream, kept for who comes back (llama.cpp's X-Conversation-Id)."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.is_done = False
        self._changed = asyncio.Event()

    def feed(self, data: bytes, *, is_done: bool = False) -> None:
        """Add bytes and wake every reader."""
        self.data += data
        self.is_done = is_done
        self._changed.set()
        self._changed = asyncio.Event()

    async def copy(self, response: web.StreamResponse, start: int) -> None:
        """Write everything from byte `start` on, until the stream is done."""
        while True:
            changed, is_done = self._changed, self.is_done
            data = bytes(self.data[start:])
            if data:
                await response.write(data)
            start += len(data)
            if is_done:
                return
            await changed.wait()


class FakeLLM:
    """The server's state: the ledger, the script, how often each prompt has come."""

    def __init__(self, ledger: Ledger, clock: RealClock) -> None:
        self._ledger = ledger
        self._clock = clock
        self._start = f"{clock.now_us():x}"
        self._requests = 0
        self._under_way = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._seen: Counter[str] = Counter()
        self._script: list[dict[str, Json]] = []
        self._default: dict[str, Json] = {}
        self._replays: dict[str, Replay] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def app(self) -> web.Application:
        """Routes of every wire format."""
        app = web.Application(client_max_size=_BODY_MAX)
        app.router.add_post("/v1/chat/completions", lambda r: self._chat(r, OpenAIWire()))
        app.router.add_post("/v1/messages", lambda r: self._chat(r, AnthropicWire()))
        azure = "/openai/deployments/{model}/chat/completions"
        app.router.add_post(azure, lambda r: self._chat(r, OpenAIWire()))
        app.router.add_post("/v1/embeddings", self._embed)
        app.router.add_post("/v1/embed", self._embed)
        app.router.add_post("/v2/embed", self._embed)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/stream", self._reattach)
        app.router.add_get("/health", self._health)
        app.router.add_post("/control", self._control)
        app.router.add_get("/control/ledger", self._lines)
        app.router.add_get("/control/idle", self._idle)
        return app

    async def close(self) -> None:
        """Stop what still generates, then write the last lines."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._ledger.close()

    # -- control ----------------------------------------------------------------------------------

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok", "requests": self._requests})

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "fake", "object": "model"}]})

    async def _control(self, request: web.Request) -> web.Response:
        order = await request.json()
        if order.get("reset"):
            self._seen.clear()
            self._script, self._default = [], {}
        if "script" in order:
            self._script = list(order["script"])
        if "default" in order:
            self._default = dict(order["default"])
        return web.json_response({"script": len(self._script), "default": self._default})

    async def _lines(self, request: web.Request) -> web.Response:
        return web.json_response(await self._ledger.lines())

    async def _idle(self, request: web.Request) -> web.Response:
        await self._is_idle.wait()
        return web.json_response({"under_way": self._under_way})

    def _rule(self, api: str, model: str, prompt: str) -> dict[str, Json]:
        for place, entry in enumerate(self._script):
            match = entry.get("match", {})
            fits = match.get("api", api) == api and match.get("model", model) == model
            if fits and match.get("contains", "") in prompt:
                return self._script.pop(place)
        return self._default

    # -- the ledger -------------------------------------------------------------------------------

    async def _arrive(self, request: web.Request, api: str, ask: Ask) -> tuple[str, Behaviour]:
        rule = self._rule(api, ask.model, ask.prompt)
        act = behaviour(rule, ask.prompt, request.headers.get("X-Fake", ""))
        self._requests += 1
        self._under_way += 1
        self._is_idle.clear()
        self._seen[ask.sha] += 1
        ident = f"{self._start}-{self._requests}"
        line = {
            "event": "arrived",
            "id": ident,
            "at": self._clock.now_us(),
            "api": api,
            "model": ask.model,
            "idempotency_key": request.headers.get("Idempotency-Key", ""),
            "traceparent": request.headers.get("traceparent", ""),
            "prompt_sha": ask.sha,
            "prompt": ask.prompt[:300],
            "step": request.headers.get("X-Step", act.step),
            "arrival": self._seen[ask.sha],
            "stream": ask.is_stream,
            "prefix_chars": len(ask.prefix),
            "input_tokens": ask.input_tokens,
            "metadata": dict(ask.metadata),
        }
        await self._ledger.append(line)
        if act.times and self._seen[ask.sha] > act.times:
            act = act.calm()
        return ident, act

    def _end(self, ident: str, outcome: str, tokens: int, *, status: int = 200) -> None:
        self._under_way -= 1
        if not self._under_way:
            self._is_idle.set()
        line = {"event": "ended", "id": ident, "at": self._clock.now_us(), "outcome": outcome}
        self._ledger.put(line | {"tokens": tokens, "status": status})

    # -- embeddings -------------------------------------------------------------------------------

    async def _embed(self, request: web.Request) -> web.StreamResponse:
        is_openai = request.path.endswith("/embeddings")
        api = "openai.embeddings" if is_openai else "cohere.embed"
        try:
            body = await request.json()
            texts = embedding_texts(body)
            size = int(body.get("dimensions") or body.get("output_dimension") or 64)
            ask = Ask(str(body["model"]), [("user", text) for text in texts])
        except _MALFORMED as error:
            return web.json_response({"message": f"bad request: {error!r}"}, status=400)
        ident, act = await self._arrive(request, api, ask)
        trouble = await self._trouble(request, OpenAIWire(), ident=ident, act=act)
        if trouble is not None:
            return trouble
        vectors = [unit_vector(text, size) for text in texts]
        self._end(ident, "complete", len(texts))
        shape = openai_embeddings if is_openai else cohere_embeddings
        return web.json_response(shape(body, vectors))

    # -- chat -------------------------------------------------------------------------------------

    async def _chat(self, request: web.Request, wire: Wire) -> web.StreamResponse:
        try:
            body = await request.json()
            ask = wire.ask(body | {"model": request.match_info.get("model", body.get("model"))})
        except _MALFORMED as error:
            return web.json_response(wire.error(400, f"bad request: {error!r}"), status=400)
        ident, act = await self._arrive(request, wire.api, ask)
        trouble = await self._trouble(request, wire, ident=ident, act=act)
        if trouble is not None:
            return trouble
        if refusal := wire.refusal(ask, act):
            self._end(ident, "status", 0, status=400)
            kind = "invalid_request_error"
            return web.json_response(wire.error(400, refusal, kind), status=400)
        said = answer(act, ask.sha, max_tokens=ask.max_tokens, prefix=ask.prefix, schema=ask.schema)
        if act.filter or (act.tool and not ask.has_tool_result):
            said = type(said)([], ask.prefix)
        call = Call(ident, ask, act, said)
        if ask.is_stream:
            return await self._stream(request, wire, call)
        if act.cut_after >= 0:
            self._end(ident, "cut", min(act.cut_after, len(said.tokens)))
            return _cut(request)
        self._end(ident, "complete", len(said.tokens))
        return web.json_response(wire.whole(call))

    async def _trouble(
        self, request: web.Request, wire: Wire, *, ident: str, act: Behaviour
    ) -> web.StreamResponse | None:
        """Whatever goes wrong before the answer begins."""
        key = request.headers.get("x-api-key", request.headers.get("Authorization", ""))
        key = key.removeprefix("Bearer ") or request.headers.get("api-key", "")
        status = 401 if "bad" in key else act.status
        try:
            await asyncio.sleep(act.delay_ms / 1000)
            if act.hang:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self._end(ident, "aborted", 0)
            raise
        if status:
            self._end(ident, "status", 0, status=status)
            reason = f"Incorrect API key provided: {key}" if status == 401 else "steered to fail"
            headers = {"Retry-After": act.retry_after, "retry-after-ms": act.retry_after_ms}
            headers = {name: value for name, value in headers.items() if value}
            body = wire.error(status, reason, act.error)
            return web.json_response(body, status=status, headers=headers)
        if act.garbage:
            self._end(ident, "garbage", 0)
            return web.Response(text='{"choices": [{"mess', content_type="application/json")
        if act.cut_after == 0 and not act.error:
            self._end(ident, "cut", 0)
            return _cut(request)
        return None

    async def _stream(self, request: web.Request, wire: Wire, call: Call) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        conversation = request.headers.get("X-Conversation-Id", "")
        if conversation:
            return await self._stream_kept(request, response, wire=wire, call=call)
        sent, outcome = 0, "aborted"
        try:
            await response.write(wire.head(call))
            for token in call.answer.tokens:
                if sent == call.act.cut_after:
                    break
                if call.act.chunk_delay_ms:
                    await asyncio.sleep(call.act.chunk_delay_ms / 1000)
                await response.write(wire.chunk(call, token))
                sent += 1
            if call.act.error:
                outcome = "error"
                await response.write(wire.stream_error(call.act.error))
            elif call.act.cut_after >= 0:
                outcome = "cut"
                return response if call.act.polite else _cut(request, response)
            else:
                outcome = "complete"
                await response.write(wire.tail(call))
        except _ABORTED:
            outcome = "aborted"
            raise
        finally:
            self._end(call.id, outcome, sent)
        return response

    async def _stream_kept(
        self, request: web.Request, response: web.StreamResponse, *, wire: Wire, call: Call
    ) -> web.StreamResponse:
        """Generate whether or not the client stays; a second POST under the id takes its place."""
        conversation = request.headers["X-Conversation-Id"]
        replay = self._replays[conversation] = Replay()
        task = asyncio.create_task(self._generate(replay, wire, call))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if call.act.cut_after >= 0:
            parts = [wire.chunk(call, token) for token in call.answer.tokens[: call.act.cut_after]]
            await response.write(wire.head(call) + b"".join(parts))
            return _cut(request, response)
        await replay.copy(response, 0)
        return response

    async def _generate(self, replay: Replay, wire: Wire, call: Call) -> None:
        replay.feed(wire.head(call))
        sent, outcome = 0, "aborted"
        try:
            for token in call.answer.tokens:
                await asyncio.sleep(call.act.chunk_delay_ms / 1000)
                replay.feed(wire.chunk(call, token))
                sent += 1
            outcome = "complete"
            replay.feed(wire.tail(call), is_done=True)
        finally:
            self._end(call.id, outcome, sent)

    async def _reattach(self, request: web.Request) -> web.StreamResponse:
        replay = self._replays.get(request.query.get("conv_id", ""))
        start = int(request.query.get("from", "0"))
        if replay is None or start > len(replay.data):
            error = {"error": {"message": "no such stream", "type": "not_found_error"}}
            return web.json_response(error, status=404)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await replay.copy(response, start)
        return response


def _cut(request: web.Request, response: web.StreamResponse | None = None) -> web.StreamResponse:
    """Drop the connection without a goodbye."""
    if request.transport is not None:
        request.transport.abort()
    return response or web.Response()


def raise_file_limit() -> None:
    """Allow as many sockets as the system lets this process have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def serve(port: int, ledger: Path, host: str = "127.0.0.1") -> None:
    """Run until SIGTERM or SIGINT. Port 0 lets the system choose one."""
    raise_file_limit()
    fake = FakeLLM(Ledger(ledger), RealClock())
    runner = web.AppRunner(
        fake.app(), handler_cancellation=True, access_log=None, shutdown_timeout=0.2
    )
    await runner.setup()
    site = web.TCPSite(runner, host, port, backlog=4096)
    await site.start()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    real = runner.addresses[0][1]
    print(json.dumps({"port": real, "url": f"http://{host}:{real}"}), flush=True)
    await stop.wait()
    await runner.cleanup()
    await fake.close()


def main() -> None:
    """Entry point of `python -m llm_orchestrator.drill.fake_llm`."""
    parser = argparse.ArgumentParser(prog="fake_llm", description="A fake LLM server for drills")
    parser.add_argument("--port", type=int, default=0, help="0 chooses one and prints it")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--ledger", type=Path, required=True, help="JSON lines, appended, fsynced")
    chosen = parser.parse_args()
    asyncio.run(serve(chosen.port, chosen.ledger, chosen.host))


if __name__ == "__main__":
    main()
