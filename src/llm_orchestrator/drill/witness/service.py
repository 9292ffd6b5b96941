"""The witness's process: it starts the load, watches, keeps the ledger, and judges in the end.

Orders come as JSON lines on stdin: {"do": ...}; each gets one line as its answer, {"error": ...}
when it cannot be done.

    load   begin with a load (load.Shape)            look   what has been seen since a moment
    note   write a line into the ledger              run    start one run besides, and follow it
    stop   start no more, wait for the ends          judge  compare everything; the verdict
    sight  what the sources show of this drill
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import dataclasses
import itertools
import json
import signal
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from llm_orchestrator.clock import RealClock
from llm_orchestrator.drill.fake_ledger import Ledger
from llm_orchestrator.drill.judge import LLM, STORE, judge, read
from llm_orchestrator.drill.load import Asker, Asks, Load, Order, Shape
from llm_orchestrator.drill.load_library import LibraryAsker
from llm_orchestrator.drill.witness.calls import Calls
from llm_orchestrator.drill.witness.eyes import Eyes, NoEyes, Seen, make_eyes
from llm_orchestrator.drill.witness.receiver import Receiver

Json = Any
_LOOK_S = 0.1
_FINAL_S = 30.0
_LINE_BYTES_MAX = 1 << 24


class Witness:
    """Everything that was seen, on disk; and the questions about it."""

    def __init__(self, ledger: Path, eyes: Eyes, *, calls: Calls, endpoints: list[str]) -> None:
        self._clock = RealClock()
        self._path = ledger
        self._ledger = Ledger(ledger)
        self._eyes = eyes
        self._calls = calls
        self._endpoints = endpoints
        self._asker: Asks | None = None
        self._receiver = Receiver(self.write)
        self._load: Load | None = None
        self._watching: asyncio.Task[None] | None = None
        self._more: set[asyncio.Task[None]] = set()
        self._lines: dict[str, list[dict[str, Json]]] = defaultdict(list)

    # -- writing down ---------------------------------------------------------------------------

    async def write(self, line: dict[str, Json]) -> None:
        """Put a line down with both clocks; it is on the disk when this returns."""
        line |= {"at": self._clock.now_us(), "s": self._clock.monotonic()}
        await self._ledger.append(line)
        self._lines[line["event"]].append(line)

    def _trouble(self, text: str) -> None:
        line: dict[str, Json] = {"event": "trouble", "text": text[:200]}
        line |= {"at": self._clock.now_us(), "s": self._clock.monotonic()}
        self._ledger.put(line)
        self._lines[line["event"]].append(line)

    async def _watch(self) -> None:
        while True:
            for seen in await asyncio.to_thread(self._eyes.news):
                self._note_entry("entry", seen)
            await self._clock.sleep(_LOOK_S)

    def _note_entry(self, event: str, seen: Seen) -> None:
        line: dict[str, Json] = {"event": event, **seen._asdict()}
        line |= {"at": self._clock.now_us(), "s": self._clock.monotonic()}
        self._ledger.put(line)
        self._lines[line["event"]].append(line)

    # -- orders ---------------------------------------------------------------------------------

    async def obey(self, order: dict[str, Json]) -> Json:
        """Carry out one order; its answer."""
        given = {key: value for key, value in order.items() if key != "do"}
        match order["do"]:
            case "load":
                return await self._begin(given)
            case "note":
                await self.write(given)
            case "run":
                return await self._run(Order(**given))
            case "sight":
                return await self._sight()
            case "look":
                return self._look(float(given["since_s"]))
            case "stop":
                return await self._stop(float(given["limit_s"]))
            case "judge":
                return await self._judge(given)
            case other:
                raise ValueError(f"there is no order {other!r}")
        return {}

    async def _begin(self, given: dict[str, Json]) -> Json:
        host = str(given.pop("host"))
        client = LibraryAsker if given.pop("client", "plain") == "library" else Asker
        token = str(given.pop("token"))
        self._asker = client(self._endpoints, self._clock, self._trouble, token=token)
        await self._receiver.start(host)
        receiver = f"http://{host}:{self._receiver.port}/effect"
        self._load = Load(
            Shape(**given, receiver=receiver), self._asker, self.write, clock=self._clock
        )
        await self._load.register()
        self._watching = asyncio.create_task(self._watch())
        self._load.start()
        return {"receiver": receiver}

    async def _run(self, order: Order) -> Json:
        assert self._load is not None
        run = await self._load.submit(order)
        task = asyncio.create_task(self._load.follow(run))
        self._more.add(task)
        task.add_done_callback(self._more.discard)
        return {"run": run}

    async def _sight(self) -> Json:
        """What has been seen of this drill in each source; null where a source is out of sight."""
        assert self._load is not None
        name = self._load.shape.name
        return {
            STORE: None if isinstance(self._eyes, NoEyes) else len(self._lines["entry"]),
            LLM: await self._calls.count(name) if self._calls.is_seen else None,
        }

    def _unseen(self) -> list[str]:
        return [STORE] * isinstance(self._eyes, NoEyes) + [LLM] * (not self._calls.is_seen)

    def _look(self, since_s: float) -> Json:
        """Times are on the steady clock; null is not seen yet."""
        assert self._load is not None
        accepted, ended = self._by_run("accepted"), self._by_run("ended")
        gone = self._by_run("gone")
        affected = {
            run
            for run, line in accepted.items()
            if line["kind"] == "load"
            and run not in gone
            and line["s"] < since_s
            and (run not in ended or ended[run]["s"] >= since_s)
        }
        ends = [ended[run]["s"] for run in affected if run in ended]
        right = [
            line
            for line in self._since("ended", since_s)
            if line["kind"] == "probe" and line["is_right"]
        ]
        troubles = self._since("trouble", since_s)
        wrong = [line for line in self._since("ended", since_s) if not line["is_right"]]
        return {
            "now_s": self._clock.monotonic(),
            "under_way": sum(o.kind == "load" for o in self._load.under_way.values()),
            "accepted_s": _first(
                line["s"] for line in self._since("accepted", since_s) if line["began_s"] >= since_s
            ),
            "verified_s": _first(
                line["s"] for line in right if accepted[line["run"]]["began_s"] >= since_s
            ),
            "advanced_s": self._advanced_s(affected, since_s, ends),
            "troubles": len(troubles),
            "refused": len(self._since("refused", since_s)),
            "trouble_s": _first(line["s"] for line in troubles),
            "wrong": len(wrong),
            "why_wrong": f"{wrong[0]['state']}: {wrong[0]['error']}"[:300] if wrong else "",
            "probes": len(right),
            "affected": len(affected),
            "affected_left": len(affected) - len(ends),
            "drained_s": max(ends, default=since_s) if len(ends) == len(affected) else None,
        }

    def _advanced_s(self, affected: set[str], since_s: float, ends: list[float]) -> float | None:
        """When one of them moved on, or its client heard that it had ended meanwhile."""
        steps = (
            line["s"]
            for line in self._since("entry", since_s)
            if line["run"] in affected and line["kind"] not in ("claimed", "state")
        )
        return _first([*itertools.islice(steps, 1), *ends])

    def _by_run(self, event: str) -> dict[str, dict[str, Json]]:
        return {line["run"]: line for line in self._lines[event]}

    def _since(self, event: str, since_s: float) -> list[dict[str, Json]]:
        """Lines of an event are in the order of their times."""
        lines = self._lines[event]
        return lines[bisect.bisect_left(lines, since_s, key=_second) :]

    async def _stop(self, limit_s: float) -> Json:
        assert self._load is not None
        is_whole = await self._load.stop(limit_s)
        if self._more:
            _, left = await asyncio.wait(self._more, timeout=limit_s if is_whole else 0.1)
            is_whole = is_whole and not left
        return {"is_whole": is_whole, "left": list(self._load.under_way)[:20]}

    async def _judge(self, given: dict[str, Json]) -> Json:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        for seen in await self._see_all():
            self._note_entry("final", seen)
        await self._ledger.lines()
        assert self._load is not None
        await self._calls.keep(self._load.shape.name)
        await self.write({"event": "terms", "unseen": self._unseen(), **given})
        books = await asyncio.to_thread(read, self._path, self._calls.kept)
        verdict = await asyncio.to_thread(judge, books)
        found = dataclasses.asdict(verdict)
        await self.write({"event": "verdict", **found})
        return found

    async def _see_all(self) -> list[Seen]:
        end_s = self._clock.monotonic() + _FINAL_S
        while True:
            try:
                return await asyncio.to_thread(self._eyes.all)
            except OSError:
                if self._clock.monotonic() > end_s:
                    raise
            await self._clock.sleep(_LOOK_S)

    async def close(self) -> None:
        """Write what is left and close everything."""
        for task in (*self._more, *filter(None, [self._watching])):
            task.cancel()
        if self._load is not None:
            await self._load.stop(0.1)
        await self._receiver.stop()
        if self._asker is not None:
            await self._asker.close()
        await self._ledger.close()


def _second(line: dict[str, Json]) -> float:
    return float(line["s"])


def _first(times: Any) -> float | None:
    return min(times, default=None)


async def serve(witness: Witness) -> None:
    """Obey stdin until it closes."""
    reader = asyncio.StreamReader(limit=_LINE_BYTES_MAX)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        try:
            answer = await witness.obey(json.loads(line))
        except Exception as error:  # noqa: BLE001 - whoever ordered it hears of it
            answer = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


async def _main(chosen: argparse.Namespace) -> None:
    witness = Witness(
        chosen.ledger,
        make_eyes(chosen.store, chosen.first_run),
        calls=Calls(chosen.llm_source, chosen.llm_ledger),
        endpoints=chosen.endpoint,
    )
    try:
        await serve(witness)
    finally:
        await witness.close()


def main() -> None:
    """Entry point of `python -m llm_orchestrator.drill.witness`."""
    parser = argparse.ArgumentParser(prog="witness")
    parser.add_argument("--ledger", type=Path, required=True)
    parser.add_argument("--llm-ledger", type=Path, action="append", required=True)
    parser.add_argument("--llm-source", action="append", default=[], help="path or address, each")
    parser.add_argument("--store", default="", help="without it no entry is in sight")
    parser.add_argument("--first-run", default="", help="runs with lower ids are not looked at")
    parser.add_argument("--endpoint", action="append", required=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the drill, which closes our stdin
    asyncio.run(_main(parser.parse_args()))
