"""Carry out one scenario once: load, baseline, fault, healing, verdict.

Order is what makes a result honest. Nothing is touched before the baseline is healthy under load;
t0 is the moment at which the target confirms the fault; the fault is taken away whatever happens;
and only the witness says whether anything was lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm_orchestrator.clock import RealClock
from llm_orchestrator.drill import seen as seeing
from llm_orchestrator.drill.judge import LLM, STORE
from llm_orchestrator.drill.marks import APART_S, Marks, disorder_of
from llm_orchestrator.drill.outcome import (
    INCONCLUSIVE,
    LOST,
    MISSED,
    PASSED,
    Outcome,
    shortfalls,
)
from llm_orchestrator.drill.scenario import Scenario
from llm_orchestrator.drill.target import (
    Broken,
    HasHome,
    Injected,
    NotConfirmed,
    NotPossible,
    Target,
    UndoFailed,
)
from llm_orchestrator.errors import OperatorError

Json = Any
Tell = Callable[[str], None]
_POLL_S = 0.1
_ORDER_S = 600.0
_WAKE_S = 1.0
"""So long after its healing a fault may still show: what was frozen goes on where it stood."""
_LINE_BYTES_MAX = 1 << 24
_SOURCES = {STORE: "the store", LLM: "the LLM server's ledger"}


class Unhealthy(OperatorError):
    """The system was not well before anything was done to it."""


class NotWell(OperatorError):
    """What was healed does not work."""


class WitnessFailed(OperatorError):
    """The witness could not do as told; without it there is no verdict."""


class WitnessProcess:
    """The witness, started as a process of its own; it ends when we do."""

    def __init__(self, folder: Path, target: Target) -> None:
        self._folder = folder
        self._target = target
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start it."""
        looks = self._target.looks
        words = [sys.executable, "-m", "llm_orchestrator.drill.witness"]
        words += ["--ledger", str(self._folder / "witness.jsonl")]
        words += ["--store", looks.store_url, "--first-run", looks.first_run]
        for ledger in self._target.llm_ledgers:
            words += ["--llm-ledger", str(ledger)]
        for source in looks.llm:
            words += ["--llm-source", source]
        for endpoint in self._target.endpoints:
            words += ["--endpoint", endpoint]
        with (self._folder / "witness.log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._target.command(*words),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                limit=_LINE_BYTES_MAX,
                env={
                    "PATH": os.defpath,
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                    **looks.environment,
                },
                start_new_session=True,
            )

    async def order(self, do: str, **given: Json) -> dict[str, Json]:
        """Let it do something; its answer. Raises WitnessFailed."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"do": do, **given}).encode() + b"\n")
            await process.stdin.drain()
            line = await asyncio.wait_for(process.stdout.readline(), _ORDER_S)
        except (OSError, TimeoutError) as error:
            raise WitnessFailed(f"the witness does not answer: {error}") from error
        if not line:
            raise WitnessFailed("the witness is gone", hint=f"see {self._folder / 'witness.log'}")
        answer: dict[str, Json] = json.loads(line)
        if "error" in answer:
            raise WitnessFailed(f"the witness, told to {do}: {answer['error']}")
        return answer

    async def stop(self) -> None:
        """Close its stdin and wait."""
        process = self._process
        if process is None or process.stdin is None:
            return
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), 10)
        except TimeoutError:
            process.kill()
            await process.wait()


class Drill:
    """One run of a scenario against a target that is not started yet."""

    def __init__(
        self,
        scenario: Scenario,
        target: Target,
        folder: Path,
        *,
        name: str,
        tell: Tell,
        on_phase: Tell = lambda word: None,
        phase_s: float = 0.0,
    ) -> None:
        self._scenario = scenario
        self._target = target
        self._name = name
        self._tell = tell
        self._on_phase = on_phase
        self._phase_s = phase_s
        self._clock = RealClock()
        self._witness = WitnessProcess(folder, target)
        self._injected: list[Injected] = []
        self._windows: list[tuple[int, float]] = []
        self.outcome = Outcome(marks=Marks(scenario.measure_from))

    async def run(self) -> Outcome:
        """Never raises for what the system does: that is a status."""
        outcome = self.outcome
        try:
            if self._scenario.failback and not isinstance(self._target, HasHome):
                raise NotPossible(f"{self._target.name} has no home to which it could fail back")
            self._on_phase("start")
            await self._target.start()
            await self._witness.start()
            self._on_phase("baseline")
            await self._baseline()
            self._on_phase("fault")
            await self._fault()
            self._on_phase("recovery")
            await self._recover()
            self._on_phase("verdict")
            await self._verdict()
        except Broken as error:
            outcome.status = LOST
            outcome.reasons.append(error.message)
        except (Unhealthy, NotConfirmed, NotPossible) as error:
            outcome.status = INCONCLUSIVE
            outcome.reasons.append(error.message)
        except OperatorError as error:
            outcome.status = MISSED if self._injected else INCONCLUSIVE
            outcome.reasons.append(f"{type(error).__name__}: {error.message}")
        finally:
            await self._leave()
        return outcome

    async def _leave(self) -> None:
        with contextlib.suppress(OperatorError):
            if self._injected and "heal" not in self.outcome.marks.at_s:
                await self._target.undo()
        start = self.outcome.marks.at_s.get("t0", 0.0)
        self.outcome.sights = [
            f"{sight.at_s - start:+.3f} s {sight.mark}: {sight.text}"
            for sight in self._target.sights()
        ]
        self.outcome.facts = self._target.facts()
        await self._witness.stop()
        try:
            await self._target.stop()
        except UndoFailed as error:
            self.outcome.reasons.append(f"IT IS STILL BROKEN: {error.message}")
            self._tell(self.outcome.reasons[-1])

    # -- before -----------------------------------------------------------------------------------

    async def _baseline(self) -> None:
        scenario, load = self._scenario, self._scenario.load
        shape = load.model_dump()
        shape |= {"host": self._target.client_host, "token": self._target.looks.token}
        await self._witness.order("load", name=self._name, **shape)
        began_s = self._clock.monotonic()
        self._tell(f"load: {load.in_flight} runs of {load.run_s:g} s")
        limit_s = load.run_s * 1.5 + 30
        while True:
            seen = await self._witness.order("look", since_s=began_s)
            if seen["under_way"] >= load.in_flight * 0.95:
                break
            if self._clock.monotonic() > began_s + limit_s:
                raise Unhealthy(
                    f"{seen['under_way']} of {load.in_flight} runs under way after {limit_s:.0f} s"
                )
            await self._clock.sleep(_POLL_S)
        since_s, used = self._clock.monotonic(), cpu_times()
        await self._clock.sleep(scenario.baseline.seconds)
        seen = await self._witness.order("look", since_s=since_s)
        percent = cpu_percent(used, cpu_times())
        self.outcome.baseline = {
            "cpu_percent": round(percent, 1),
            "runs_under_way": seen["under_way"],
            "probes": seen["probes"],
        }
        self._tell(f"baseline: {seen['under_way']} runs under way, processors {percent:.0f} % busy")
        if percent > scenario.baseline.cpu_percent_max:
            raise Unhealthy(
                f"the processors are {percent:.0f} % busy before the fault, more than "
                f"{scenario.baseline.cpu_percent_max:g} %: a measurement would mean nothing"
            )
        if seen["troubles"] or seen["refused"] or seen["wrong"] or not seen["probes"]:
            raise Unhealthy(f"it is not well before the fault: {json.dumps(seen)}")
        await self._check_sight()

    async def _check_sight(self) -> None:
        """A source that shows nothing of the load is not this system's: nothing can be judged."""
        seen = await self._witness.order("sight")
        for source, what in _SOURCES.items():
            if seen[source] == 0:
                raise Unhealthy(f"{what} shows nothing of this drill's runs: is it this system's?")

    # -- the fault --------------------------------------------------------------------------------

    async def _fault(self) -> None:
        await self._clock.sleep(self._phase_s)  # so that repeats hit different moments
        await self._check_unseen()
        for fault in self._scenario.faults:
            if self._injected:
                await self._clock.sleep(fault.after_s)
            from_us = self._clock.now_us()
            injected = await self._target.inject(fault)
            self._injected.append(injected)
            self._windows.append((from_us, injected.at_s))
            self.outcome.evidence.append(f"{fault.kind} on {fault.on}: {injected.evidence}")
            self.outcome.marks.put("t0", injected.at_s)
            self._tell(f"fault: {fault.kind}, {injected.evidence}")
        await self._see()
        if self._scenario.heal is not None:
            await self._clock.sleep(self._scenario.heal.after_s)
            await self._target.undo()
            self.outcome.marks.put("heal", self._clock.monotonic())
            self._tell("the fault is taken away")
            await self._see_end()

    async def _check_unseen(self) -> None:
        seen = self._scenario.expect.seen
        if seen is None:
            return
        limit_s = seen.within_s
        if await seeing.wait(self._target, seen, self._clock, until=False, limit_s=limit_s) is None:
            raise Unhealthy(f"{seen.metric} says it before anything is done")

    async def _see(self) -> None:
        """Wait until the product itself says what has happened."""
        seen, marks = self._scenario.expect.seen, self.outcome.marks
        if seen is None:
            return
        limit_s = marks.at_s["t0"] + seen.within_s - self._clock.monotonic()
        at_s = await seeing.wait(self._target, seen, self._clock, until=True, limit_s=limit_s)
        if at_s is None:
            self.outcome.reasons.append(f"{seen.metric} did not say it in {seen.within_s:g} s")
            return
        marks.put("t1", at_s)
        self._tell(f"seen after {at_s - marks.at_s['t0']:.2f} s: {seen.metric}")

    async def _see_end(self) -> None:
        seen = self._scenario.expect.seen
        if seen is None or not seen.ends:
            return
        limit_s = seen.within_s
        if await seeing.wait(self._target, seen, self._clock, until=False, limit_s=limit_s) is None:
            self.outcome.reasons.append(f"{seen.metric} still says it after the healing")

    async def _recover(self) -> None:
        """Watch until it works again and the backlog is gone, or the limits are over."""
        outcome, marks, limits = self.outcome, self.outcome.marks, self._scenario.limits
        recover_s = marks.start_s + limits.recover_s
        drain_s = recover_s + limits.drain_s
        while True:
            seen = await self._witness.order("look", since_s=marks.at_s["t0"])
            base = await self._witness.order("look", since_s=marks.start_s)
            outcome.affected, outcome.refused = seen["affected"], seen["troubles"]
            marks.put("t4", base["accepted_s"])
            advanced = base["advanced_s"] if seen["affected"] else base["verified_s"]
            if base["verified_s"] is not None and advanced is not None:
                if "t5" not in marks.at_s:
                    marks.put("t5", max(base["verified_s"], advanced))
                    self._tell(f"recovered after {marks.recovery_time_s:.2f} s")
                if seen["drained_s"] is not None:
                    marks.put("t6", max(seen["drained_s"], marks.at_s["t5"]))
            if "t6" in marks.at_s:
                break
            now_s = self._clock.monotonic()
            if now_s > drain_s or ("t5" not in marks.at_s and now_s > recover_s):
                break
            await self._clock.sleep(_POLL_S)
        await self._redundant()
        sights = self._target.sights()
        marks.detected([seen["trouble_s"], *(s.at_s for s in sights if s.mark == "t1")])
        marks.take([(sight.at_s, sight.mark) for sight in sights])
        await self._recover_later()
        if self._scenario.failback:
            await self._fail_back()  # what is seen meanwhile is not of the fault

    async def _recover_later(self) -> None:
        """Where the failover began after a run was verified, recovery is what came behind it."""
        marks = self.outcome.marks
        t3_s = marks.at_s.get("t3")
        if t3_s is None or marks.at_s.get("t5", t3_s) >= t3_s - APART_S:
            return
        for name in ("t4", "t5", "t6"):
            marks.at_s.pop(name, None)
        end_s = self._clock.monotonic() + self._scenario.limits.recover_s
        while self._clock.monotonic() < end_s and "t6" not in marks.at_s:
            seen = await self._witness.order("look", since_s=t3_s)
            marks.put("t4", seen["accepted_s"])
            marks.put("t5", seen["verified_s"])
            if "t5" in marks.at_s and seen["drained_s"] is not None:
                marks.put("t6", max(seen["drained_s"], marks.at_s["t5"]))
            await self._clock.sleep(_POLL_S)

    async def _redundant(self) -> None:
        """Where nothing was healed, bring back what is dead; then wait until all of it works."""
        if self._scenario.heal is None:
            await self._target.undo()
        end_s = self._clock.monotonic() + self._scenario.limits.recover_s
        while (is_whole := await self._target.is_redundant()) is False:
            if self._clock.monotonic() > end_s:
                self.outcome.reasons.append("it is not redundant again")
                return
            await self._clock.sleep(_POLL_S)
        if is_whole:
            self.outcome.marks.put("t7", self._clock.monotonic())
            self._tell("it is redundant again")

    async def _fail_back(self) -> None:
        """Move the work home; what is in flight meanwhile may be made again, as in a fault."""
        if "t7" not in self.outcome.marks.at_s:
            self.outcome.reasons.append("it is not failed back: it was not redundant")
            return
        limit_s, from_us = self._scenario.limits.recover_s, self._clock.now_us()
        began_s = self._clock.monotonic()
        try:
            assert isinstance(self._target, HasHome)  # it was checked before anything was done
            said = await self._target.fail_back(limit_s)
            done_s = self._clock.monotonic()
            while (await self._witness.order("look", since_s=done_s))["verified_s"] is None:
                if self._clock.monotonic() > done_s + limit_s:
                    raise NotWell(f"no run is verified within {limit_s:g} s after it")
                await self._clock.sleep(_POLL_S)
        except OperatorError as error:
            self.outcome.reasons.append(f"it is not failed back: {error.message}")
            return
        finally:
            until_us = self._clock.now_us() + int(_WAKE_S * 1e6)
            await self._witness.order(
                "note", event="window", **{"from": from_us, "until": until_us, "t0": from_us}
            )
        self.outcome.marks.put("t8", done_s)
        self.outcome.evidence.append(f"failback in {done_s - began_s:.2f} s: {said}")
        self._tell(f"failed back after {done_s - began_s:.2f} s: {said}")

    # -- after ------------------------------------------------------------------------------------

    async def _verdict(self) -> None:
        scenario, outcome = self._scenario, self.outcome
        stopped = await self._witness.order("stop", limit_s=scenario.limits.drain_s)
        until_us = self._clock.now_us()
        ended = [outcome.marks.at_s[name] for name in ("t6", "heal") if name in outcome.marks.at_s]
        if "t6" in outcome.marks.at_s:
            until_s = max(ended) + (_WAKE_S if "heal" in outcome.marks.at_s else 0.0)
            until_us -= max(0, int((self._clock.monotonic() - until_s) * 1e6))
        ahead_us = self._clock.now_us() - int(self._clock.monotonic() * 1e6)
        for from_us, at_s in self._windows:
            window = {"from": from_us, "until": until_us, "t0": ahead_us + int(at_s * 1e6)}
            await self._witness.order("note", event="window", **window)
        touched = sorted(run for injected in self._injected for run in injected.touched)
        kept = [i.kept_until_us for i in self._injected if i.kept_until_us is not None]
        self._tell("all runs have ended" if stopped["is_whole"] else "some runs do not end")
        outcome.verdict = await self._witness.order(
            "judge",
            touched=touched,
            kept_until_us=min(kept, default=None),
            may_pause=scenario.expect.touched_may_pause,
        )
        outcome.not_judged += outcome.verdict["not_judged"]
        outcome.not_judged += self._target.facts().get("not_judged", ())
        outcome.reasons += shortfalls(
            scenario,
            outcome,
            is_damaged=bool(touched),
            deaths=self._target.facts()["node_deaths"],
        )
        for text in outcome.not_judged:
            self._tell(f"not judged: {text}")
        if outcome.verdict["findings"]:
            outcome.status = LOST
        else:
            outcome.status = MISSED if outcome.reasons else PASSED
            if disorder := disorder_of(outcome.marks.relative()):
                outcome.status = INCONCLUSIVE
                outcome.reasons.append(f"a fault of the drill: {'; '.join(disorder)}")


def cpu_times() -> tuple[float, float]:
    """Busy and all time of this machine's processors so far, in ticks (proc(5))."""
    numbers = [float(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return sum(numbers) - numbers[3] - numbers[4], sum(numbers)


def cpu_percent(before: tuple[float, float], after: tuple[float, float]) -> float:
    """How busy they were between two looks."""
    return 100 * (after[0] - before[0]) / max(after[1] - before[1], 1)
