"""A stand-in for Pinecone, which cannot be reached here: its documented REST format, a real socket.

`python -m llm_orchestrator.drill.fake_pinecone --port 0 --api-key KEY` prints `{"port": N}` once it
listens. Data plane (`/vectors/upsert`, `/vectors/fetch`, `/query`, `/describe_index_stats`) and
what a client needs of the control plane (`GET /indexes/NAME`). It keeps everything in memory. It
proves that our adapter speaks the wire format as written down, and nothing about Pinecone itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from aiohttp import web

from llm_orchestrator.errors import InputError
from llm_orchestrator.model import Json
from llm_orchestrator.vector_math import matches, pack, top_k

_TOP_K_MAX = 10_000
_UPSERT_MAX = 1000

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class FakePinecone:
    """One index, any number of namespaces. `failures` are answered first, in order."""

    def __init__(self, *, api_key: str, dimension: int, index: str = "test") -> None:
        self.api_key = api_key
        self.dimension = dimension
        self.index = index
        self.host = ""
        self.namespaces: dict[str, dict[str, dict[str, Json]]] = {}
        self.requests: list[tuple[str, Json]] = []
        self.failures: list[tuple[int, dict[str, str]]] = []
        self._runner: web.AppRunner | None = None

    async def start(self, port: int = 0) -> str:
        """Listen on 127.0.0.1; returns the base URL, for data plane and control plane alike."""
        app = web.Application(middlewares=[self._guard])
        app.router.add_post("/vectors/upsert", self._upsert)
        app.router.add_get("/vectors/fetch", self._fetch)
        app.router.add_post("/query", self._query)
        app.router.add_post("/describe_index_stats", self._stats)
        app.router.add_get("/indexes/{name}", self._describe)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port)
        await site.start()
        self.host = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self.host

    async def stop(self) -> None:
        """Stop listening; what was kept is still there."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Authentication, the version header, and failures that a test has ordered."""
        text = await request.text()
        self.requests.append((request.path, json.loads(text) if text else None))
        if self.failures:
            status, headers = self.failures.pop(0)
            return _refuse(status, "a failure that was asked for", headers)
        if request.headers.get("Api-Key") != self.api_key:
            return web.Response(status=401, text="Unauthorized")
        if "X-Pinecone-Api-Version" not in request.headers:
            return _refuse(400, "the header X-Pinecone-Api-Version is missing")
        try:
            return await handler(request)
        except (InputError, KeyError, TypeError) as error:
            return _refuse(400, str(error))

    async def _upsert(self, request: web.Request) -> web.Response:
        body = await request.json()
        vectors = body["vectors"]
        if not 0 < len(vectors) <= _UPSERT_MAX:
            return _refuse(400, f"{len(vectors)} vectors in one request")
        for one in vectors:
            if len(one["values"]) != self.dimension:
                return _refuse(
                    400,
                    f"Vector dimension {len(one['values'])} does not match the dimension of the "
                    f"index {self.dimension}",
                )
            if any(value is None for value in one.get("metadata", {}).values()):
                return _refuse(400, "Metadata value must be a string, number, boolean or list")
        kept = self.namespaces.setdefault(body.get("namespace", ""), {})
        kept.update({one["id"]: one for one in vectors})
        return web.json_response({"upsertedCount": len(vectors)})

    async def _query(self, request: web.Request) -> web.Response:
        body = await request.json()
        namespace = body.get("namespace", "")
        if not 0 < body["topK"] <= _TOP_K_MAX:
            return _refuse(400, f"topK {body['topK']} is not between 1 and {_TOP_K_MAX}")
        if len(body["vector"]) != self.dimension:
            return _refuse(400, f"Query vector dimension is not {self.dimension}")
        kept = [
            one
            for one in self.namespaces.get(namespace, {}).values()
            if matches(body.get("filter"), one.get("metadata", {}))
        ]
        found = []
        blobs = [pack(one["values"]) for one in kept]
        for place, score in top_k(body["vector"], blobs, body["topK"]):
            hit = {"id": kept[place]["id"], "score": score}
            if body.get("includeValues"):
                hit["values"] = kept[place]["values"]
            if body.get("includeMetadata") and kept[place].get("metadata"):
                hit["metadata"] = kept[place]["metadata"]
            found.append(hit)
        return web.json_response(
            {"matches": found, "namespace": namespace, "usage": {"readUnits": 1}}
        )

    async def _fetch(self, request: web.Request) -> web.Response:
        namespace = request.query.get("namespace", "")
        kept = self.namespaces.get(namespace, {})
        found = {key: kept[key] for key in request.query.getall("ids", []) if key in kept}
        return web.json_response({"vectors": found, "namespace": namespace})

    async def _stats(self, request: web.Request) -> web.Response:
        del request
        counts = {name: {"vectorCount": len(kept)} for name, kept in self.namespaces.items()}
        total = sum(len(kept) for kept in self.namespaces.values())
        return web.json_response(
            {"namespaces": counts, "dimension": self.dimension, "totalVectorCount": total}
        )

    async def _describe(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name != self.index:
            return web.json_response(
                {"error": {"code": "NOT_FOUND", "message": f"Resource {name} not found"}},
                status=404,
            )
        return web.json_response(
            {
                "name": name,
                "dimension": self.dimension,
                "metric": "cosine",
                "host": self.host,
                "status": {"ready": True, "state": "Ready"},
            }
        )


def _refuse(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    body: dict[str, Any] = {"code": 3, "message": message, "details": []}
    return web.json_response(body, status=status, headers=headers)


async def _serve(options: argparse.Namespace) -> None:
    fake = FakePinecone(api_key=options.api_key, dimension=options.dimension, index=options.index)
    host = await fake.start(options.port)
    print(json.dumps({"port": int(host.rpartition(":")[2])}), flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        await fake.stop()


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m llm_orchestrator.drill.fake_pinecone")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--api-key", default="fake")
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--index", default="test")
    asyncio.run(_serve(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()
