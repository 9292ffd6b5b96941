"""The load of a drill: runs that are always under way, and small ones that prove it is back.

It is a client like any other: it asks the API and follows what it started. Every acceptance goes
into the ledger, with what the output must be, before the next thing is done with it. It never looks
at the database, and it never gives up a request that is not answered: it asks again with the same
idempotency key.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp

from llm_orchestrator.clock import RealClock

Json = Any
Write = Callable[[dict[str, Json]], Awaitable[None]]
LOAD, PROBE = "drill_load", "drill_probe"
_RETRY_S_FIRST, RETRY_S_MAX = 0.1, 1.0
_WAIT_S = {"load": 8, "probe": 1}
"""How long one question for the end of a run stays open."""
_ANSWER_S = 2
"""Beyond that, no answer is a lost one: the next endpoint is asked."""
_PROBES_MAX = 8
_TIMEOUT = aiohttp.ClientTimeout(total=_ANSWER_S, connect=1)
_VOCABULARY = [
    "amber",
    "basin",
    "cedar",
    "delta",
    "ember",
    "fjord",
    "grove",
    "haven",
    "inlet",
    "jetty",
    "karst",
    "ledge",
]
_GONE = 404
_MODEL = "    model: fake\n"
_WORKFLOWS = (
    """\
name: drill_load
inputs:
  key: {type: string}
  ask_ms: {type: integer}
  word_ms: {type: integer}
  words: {type: string}
  receiver: {type: string}
steps:
  - id: ask
    type: llm
    provider: openai
    model: fake
    stream: false
    timeout_seconds: 10
    prompt: >-
      drill {{ inputs.key }} ask
      [[fake: delay_ms={{ inputs.ask_ms }} reply="asked {{ inputs.key }}"]]
  - id: act
    type: action
    action: webhook
    url: "{{ inputs.receiver }}"
    payload: {key: "{{ inputs.key }}", said: "{{ steps.ask.text }}"}
    effect: once
    on_unknown: retry
  - id: tell
    type: llm
    provider: openai
    model: fake
    stream: true
    timeout_seconds: 60
    depends_on: [act]
    prompt: >-
      drill {{ inputs.key }} tell
      [[fake: chunk_delay_ms={{ inputs.word_ms }} reply="{{ inputs.words }}"]]
outputs:
  said: {value: "{{ steps.ask.text }} | {{ steps.tell.text }}"}
""",
    """\
name: drill_probe
inputs: {key: {type: string}}
steps:
  - id: probe
    type: llm
    provider: openai
    model: fake
    stream: false
    timeout_seconds: 5
    prompt: 'drill {{ inputs.key }} probe [[fake: reply="probed {{ inputs.key }}"]]'
outputs:
  said: {value: "{{ steps.probe.text }}"}
""",
)


@dataclass(frozen=True, slots=True)
class Shape:
    """What the load is made of (scenario.Load), and whose it is: `name` is in every key."""

    name: str
    in_flight: int
    ask_ms: int
    words: int
    word_ms: int
    probe_ms: int
    receiver: str
    model: str = "fake"
    fallback: str = ""

    @property
    def gap_s(self) -> float:
        """Seconds between two starts, so that `in_flight` of them are under way."""
        return (self.ask_ms + self.words * self.word_ms) / 1000 / self.in_flight


def workflows(shape: Shape) -> list[str]:
    """The load's workflows as YAML, with its model, and the fallback if it has one."""
    lines = f"    model: {shape.model}\n"
    if shape.fallback:
        lines += f"    fallback: [{shape.fallback}]\n"
    return [text.replace(_MODEL, lines) for text in _WORKFLOWS]


@dataclass(frozen=True, slots=True)
class Order:
    """One run to start: where, with what, and what must come of it."""

    kind: str
    workflow: str
    key: str
    inputs: Mapping[str, Json]
    expects: Json
    tokens: Mapping[str, int]


def order(shape: Shape, number: int) -> Order:
    """The `number`-th run. Its answer depends on its number, so that none passes for another."""
    key = f"{shape.name}-{number}"
    said = " ".join(
        _VOCABULARY[(number * 7 + place * place) % len(_VOCABULARY)] for place in range(shape.words)
    )
    inputs = {
        "key": key,
        "ask_ms": shape.ask_ms,
        "word_ms": shape.word_ms,
        "words": said,
        "receiver": shape.receiver,
    }
    expects = {"said": f"asked {key} | {said}"}
    return Order("load", LOAD, key, inputs, expects, {"ask": 2, "tell": shape.words})


def probe(shape: Shape, number: int) -> Order:
    """The `number`-th small run."""
    key = f"{shape.name}-p{number}"
    return Order("probe", PROBE, key, {"key": key}, {"said": f"probed {key}"}, {"probe": 2})


def _is_held(found: Mapping[str, Json]) -> bool:
    """Whether a run waits for somebody who decides what to do after a restore."""
    return found["state"] == "paused" and (found["error"] or {}).get("kind") == "restored"


class Refused(Exception):
    """The server has answered, and the answer is no success. `status` is HTTP's."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status}: {text[:200]}")
        self.status = status


class Asker:
    """Asks the endpoint that has answered, or the next one; `on_trouble` hears of each refusal."""

    def __init__(
        self,
        endpoints: Sequence[str],
        clock: RealClock,
        on_trouble: Callable[[str], None],
        *,
        token: str = "",
    ) -> None:
        self._endpoints = list(endpoints)
        self._clock = clock
        self._on_trouble = on_trouble
        self._at = 0
        self._http = aiohttp.ClientSession(
            timeout=_TIMEOUT,
            connector=aiohttp.TCPConnector(limit=0),
            headers={"authorization": f"Bearer {token}"} if token else {},
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._http.close()

    async def ask(
        self, method: str, path: str, *, pause_s_max: float = RETRY_S_MAX, **more: Json
    ) -> Json:
        """The answer, however long it takes. Raises Refused where asking again is of no use."""
        pause_s = _RETRY_S_FIRST
        while True:
            at = self._at
            url = self._endpoints[at % len(self._endpoints)]
            try:
                return await self.ask_once(method, url + path, **more)
            except Refused as error:
                if error.status < 500 and error.status != 429:
                    raise
                self._on_trouble(str(error))
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                self._on_trouble(f"{type(error).__name__}: {error}")
            if self._at == at:  # nobody else has gone on yet
                self._at += 1
            await self._clock.sleep(pause_s)
            pause_s = min(pause_s * 2, pause_s_max)

    async def ask_once(self, method: str, url: str, **more: Json) -> Json:
        """One request. Raises Refused and whatever the connection does."""
        async with self._http.request(method, url, **more) as response:
            if not response.ok:
                raise Refused(response.status, await response.text())
            return await response.json()


class Asks(Protocol):
    """A client of the API: `Asker`, or our library (load_library.py)."""

    async def ask(
        self, method: str, path: str, *, pause_s_max: float = RETRY_S_MAX, **more: Json
    ) -> Json:
        """The answer, however long it takes. Raises Refused where asking again is of no use."""
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...


class Load:
    """Keeps runs under way until `stop`. What it writes down is judge.py's books."""

    def __init__(self, shape: Shape, asker: Asks, write: Write, *, clock: RealClock) -> None:
        self.shape = shape
        self._asker = asker
        self._write = write
        self._clock = clock
        self._tasks: set[asyncio.Task[None]] = set()
        self._runners: list[asyncio.Task[None]] = []
        self.under_way: dict[str, Order] = {}
        self._probing = 0
        self._unanswered = 0

    async def register(self) -> None:
        """Make the workflows known."""
        for text in workflows(self.shape):
            await self._asker.ask(
                "POST",
                "/api/v1/workflows",
                data=text.encode(),
                headers={"content-type": "application/yaml"},
            )

    def start(self) -> None:
        """Begin: runs at a steady pace, probes beside them."""
        self._runners = [
            asyncio.create_task(self._pace()),
            asyncio.create_task(self._probe()),
        ]

    async def stop(self, limit_s: float) -> bool:
        """Start no more and wait until all have ended; False when some have not in time."""
        for runner in self._runners:
            runner.cancel()
        await asyncio.gather(*self._runners, return_exceptions=True)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=limit_s)
        left = list(self._tasks)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        return not left

    async def submit(self, given: Order) -> str:
        """Start one run and write down that it was accepted; its id."""
        began_s = self._clock.monotonic()
        answer = await self._asker.ask(
            "POST",
            f"/api/v1/workflows/{given.workflow}/execute",
            json={"inputs": dict(given.inputs)},
            headers={"idempotency-key": given.key},
            pause_s_max=_RETRY_S_FIRST if given.kind == "probe" else RETRY_S_MAX,
        )
        run = str(answer["run_id"])
        self.under_way[run] = given
        await self._write(
            {
                "event": "accepted",
                "run": run,
                "kind": given.kind,
                "key": given.key,
                "expects": given.expects,
                "tokens": dict(given.tokens),
                "began_s": began_s,
            }
        )
        return run

    async def follow(self, run: str) -> None:
        """Until it has ended, or the server says that it does not know it."""
        given = self.under_way[run]
        wait_s = _WAIT_S[given.kind]
        while True:
            try:
                found = await self._asker.ask(
                    "GET",
                    f"/api/v1/runs/{run}/result",
                    params={"wait": str(wait_s)},
                    timeout=aiohttp.ClientTimeout(total=wait_s + _ANSWER_S, connect=1),
                )
            except Refused as error:
                if error.status != _GONE:
                    raise
                self.under_way.pop(run)
                await self._write({"event": "gone", "run": run, "text": str(error)})
                return
            if found["is_ended"] and not _is_held(found):
                break
            if found["is_ended"]:
                await self._clock.sleep(RETRY_S_MAX)
        self.under_way.pop(run)
        await self._write(
            {
                "event": "ended",
                "run": run,
                "kind": given.kind,
                "state": found["state"],
                "output": found["output"],
                "error": found["error"],
                "is_right": found["output"] == given.expects,
            }
        )

    async def _pace(self) -> None:
        number, most = 0, int(self.shape.in_flight * 1.25) + 1
        next_s = self._clock.monotonic()
        while True:
            loads = sum(given.kind == "load" for given in self.under_way.values())
            if loads + self._unanswered < most:
                self._spawn(self._one(order(self.shape, number)))
                number += 1
            next_s = max(next_s + self.shape.gap_s, self._clock.monotonic())
            await self._clock.sleep(next_s - self._clock.monotonic())

    async def _probe(self) -> None:
        number = 0
        while True:
            if self._probing < _PROBES_MAX:
                self._probing += 1
                self._spawn(self._one(probe(self.shape, number)))
                number += 1
            await self._clock.sleep(self.shape.probe_ms / 1000)

    async def _one(self, given: Order) -> None:
        is_load = given.kind == "load"
        self._unanswered += is_load
        try:
            try:
                run = await self.submit(given)
            finally:
                self._unanswered -= is_load
            await self.follow(run)
        except Refused as error:
            await self._write({"event": "refused", "key": given.key, "text": str(error)})
        finally:
            self._probing -= not is_load

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
