"""A real server on each kind of store: loop of the test, real socket and store."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx

from llm_orchestrator.clock import RealClock
from llm_orchestrator.config import Config
from llm_orchestrator.model import Json
from llm_orchestrator.wire.serving import ServeOptions, Serving

TOKEN = "correct-horse"
ECHO = """
name: echo
inputs:
  topic: {type: string, required: true}
  tail: {type: string, default: "!"}
steps:
  - id: say
    type: transform
    function: template
    template: "{{ inputs.topic }}{{ inputs.tail }}"
    output: [said]
outputs:
  said: "{{ steps.say.said }}"
"""
WAITS = """
name: waits
inputs: {}
steps:
  - {id: first, type: transform, function: template, template: one, output: [one]}
  - {id: gate, depends_on: [first], type: approval, message: may it go on?}
  - {id: last, depends_on: [gate], type: transform, expression: "1 + 1", output: [two]}
outputs:
  two: "{{ steps.last.two }}"
  approved: "{{ steps.gate.approved }}"
"""
LISTENS = """
name: listens
inputs: {}
steps:
  - {id: ear, type: wait, signal: word, output: [heard]}
outputs:
  heard: "{{ steps.ear.heard }}"
"""
FAILS = """
name: fails
inputs: {}
steps:
  - {id: good, type: transform, function: template, template: one, output: [one]}
  - {id: bad, type: transform, expression: "1 // 0", retry: {max_attempts: 1}}
"""
YAML = {"content-type": "application/yaml"}


class Site:
    """A serving process and a client of it."""

    def __init__(self, serving: Serving, http: httpx.AsyncClient) -> None:
        self.serving = serving
        self.http = http

    async def get(self, path: str, **parameters: Any) -> httpx.Response:
        return await self.http.get(_full(path), params=parameters)

    async def post(self, path: str, body: Json = None, **options: Any) -> httpx.Response:
        return await self.http.post(_full(path), json=body, **options)

    async def register(self, text: str) -> httpx.Response:
        """The answer, whatever it is."""
        return await self.http.post("/api/v1/workflows", content=text, headers=YAML)

    async def execute(
        self, name: str, inputs: Json = None, *, wait: float = 20, **body: Any
    ) -> dict[str, Any]:
        """A run of a registered workflow; fails the test if it could not be started."""
        answer = await self.post(
            f"/workflows/{name}/execute", {"inputs": inputs or {}, **body}, params={"wait": wait}
        )
        assert answer.status_code in (200, 202), answer.text
        found: dict[str, Any] = answer.json()
        return found

    async def until(self, run_id: str, *states: str) -> dict[str, Any]:
        """The run once it is in one of these states."""
        clock = RealClock()
        while True:
            found: dict[str, Any] = (await self.get(f"/runs/{run_id}")).json()
            if found["state"] in states:
                return found
            await clock.sleep(0.01)


def _full(path: str) -> str:
    return path if path.startswith(("/api", "/health", "/openapi")) else f"/api/v1{path}"


def make_config(store: str, folder: Path, **settings: Any) -> Config:
    """Port 0, one token."""
    return Config(data_dir=folder, store=store, port=0, token=TOKEN, **settings)


@contextlib.asynccontextmanager
async def serve(config: Config, *, parts: str = "api,worker") -> AsyncIterator[Site]:
    """The server of `llmo serve` on this loop, and a client with its token."""
    options = ServeOptions(parts=frozenset(parts.split(",")))
    async with Serving(config, RealClock(), options) as serving:
        headers = {"authorization": f"Bearer {TOKEN}"}
        async with httpx.AsyncClient(
            base_url=serving.url, headers=headers, timeout=60, trust_env=False
        ) as http:
            yield Site(serving, http)
