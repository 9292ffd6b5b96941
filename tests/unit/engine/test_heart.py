"""A node's heart: joins, beats whatever its node does, tells what it sees, and leaves no trace.

Where a test needs the thread, it runs on real time with short beats and waits for events.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from llm_orchestrator.clock import Clock, RealClock, StoreClock
from llm_orchestrator.engine import heart as heart_module
from llm_orchestrator.engine.heart import Heart, Kind
from llm_orchestrator.engine.lease import LeaseOptions, Verdict
from llm_orchestrator.errors import StoreError, StoreUnavailable
from llm_orchestrator.model import Json
from llm_orchestrator.store.base import Members, NodeState, Pulse, Store
from llm_orchestrator.store.memory import MemoryStore
from tests.unit.engine.support import VirtualClock, virtually

HANG_S = 60.0
SHORT = LeaseOptions(heartbeat_s=0.01, lease_s=30.0)
KINDS: list[Kind] = ["thread", "task", "none"]
Hook = Callable[[str], None]


@dataclass
class Ward:
    """A store in memory as a heart sees it. `hook` is called before each request; it may raise."""

    store: MemoryStore
    hook: Hook = lambda name: None
    asked: list[str] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)
    sessions: int = 1
    late_s: float = 0.0
    """How long each answer is on its way."""
    is_closed: bool = False

    async def members(self) -> Members:
        self._ask("members")
        return cast("Members", _Members(self, await self.store.members()))

    def _ask(self, name: str) -> None:
        with self.changed:
            self.asked.append(name)
            self.changed.notify_all()
        self.hook(name)

    def count(self, name: str) -> int:
        return self.asked.count(name)

    def wait_for(self, name: str, times: int) -> None:
        """Block this thread until something has been asked so often."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.count(name) >= times, HANG_S), self.asked

    def state(self, node_id: str = "me") -> str:
        return str(self.store.nodes[node_id].state)


class _Members:
    def __init__(self, ward: Ward, inner: Any) -> None:
        self._ward = ward
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: Any) -> Any:
            self._ward._ask(name)
            result = await getattr(self._inner, name)(*arguments)
            self._ward.is_closed |= name == "close"
            if self._ward.late_s:
                await self._ward.store._clock.sleep(self._ward.late_s)
            if isinstance(result, Pulse):
                return result._replace(session=self._ward.sessions)
            return result

        return call


class Ears:
    """What the heart told, and on which thread."""

    def __init__(self) -> None:
        self.heard: list[Verdict] = []
        self.threads: set[int] = set()
        self._news = asyncio.Event()

    def __call__(self, verdict: Verdict) -> None:
        self.heard.append(verdict)
        self.threads.add(threading.get_ident())
        self._news.set()

    async def hear(self) -> Verdict:
        """The next one."""
        self._news.clear()
        await self._news.wait()
        return self.heard[-1]


def make(
    ward: Ward,
    kind: Kind,
    *,
    clock: Clock | None = None,
    options: LeaseOptions = SHORT,
    told: Callable[[Verdict], None] = lambda verdict: None,
    info: Callable[[], Json] = dict,
) -> Heart:
    store = cast("Store", ward)
    clock = clock or RealClock()
    return Heart("me", store, clock, kind=kind, options=options, info=info, told=told)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "heart"]


def a_ward(clock: Clock | None = None) -> Ward:
    return Ward(MemoryStore(clock or RealClock()))


# -- every kind ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
async def test_a_node_has_joined_when_start_returns_and_has_left_when_stop_does(kind: Kind) -> None:
    ward = a_ward()
    heart = make(ward, kind)
    await heart.start()
    assert ward.state() == NodeState.ALIVE
    assert heart.holds()
    await heart.stop()
    assert ward.state() == NodeState.LEFT
    assert ward.is_closed
    assert threads() == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["members", "join"])
async def test_what_keeps_it_from_joining_reaches_start(
    kind: Kind, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heart_module, "JOIN_S", 0.05)
    ward = a_ward()

    def refuse(name: str) -> None:
        if name == where:
            raise StoreUnavailable("the store is away")

    ward.hook = refuse
    heart = make(ward, kind)
    running = threads()
    with pytest.raises(StoreUnavailable, match="the store is away"):
        await heart.start()
    assert not heart.holds() or kind == "none"
    await heart.stop()
    assert ward.store.nodes == {}
    assert ward.count("leave") == 0
    assert ward.is_closed == (where == "join")
    assert threads() == running == []


@pytest.mark.parametrize("kind", ["thread", "task"])
async def test_nothing_may_begin_before_the_node_has_joined(kind: Kind) -> None:
    """Until then its name is nobody's: whoever sees a run of it takes the run over."""
    ward, held = a_ward(), []
    heart = make(ward, kind)

    def look(name: str) -> None:
        if name == "join":
            held.append(heart.holds())

    ward.hook = look
    assert not heart.holds()
    await heart.start()
    assert held == [False]
    assert heart.holds()
    await heart.stop()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_heart_that_is_stopped_while_it_joins_stops(kind: Kind) -> None:
    ward = a_ward()
    heart = make(ward, kind)
    starting = asyncio.ensure_future(heart.start())
    await asyncio.sleep(0)  # it has begun, and nobody has answered yet
    starting.cancel()
    async with asyncio.timeout(HANG_S):
        await heart.stop()
    assert threads() == []
    assert "me" not in ward.store.nodes or ward.state() == NodeState.LEFT


async def test_where_nobody_else_can_own_the_runs_it_joins_and_leaves_only() -> None:
    ward = a_ward()
    heart = make(ward, "none")
    await heart.start()
    heart.announce()
    await heart.held()
    await heart.stop()
    assert ward.asked == ["members", "join", "leave", "close"]


# -- the thread ------------------------------------------------------------------------------------


async def test_beats_go_on_while_the_nodes_loop_is_blocked() -> None:
    ward = a_ward()
    heart = make(ward, "thread")
    await heart.start()
    before = ward.count("beat")
    ward.wait_for("beat", before + 5)  # this blocks the loop: only the thread can go on
    assert ward.count("beat") >= before + 5
    await heart.stop()


async def test_verdicts_come_on_the_nodes_own_loop() -> None:
    ward, ears = a_ward(), Ears()
    heart = make(ward, "thread", told=ears)
    await heart.start()
    verdict = await ears.hear()
    assert ears.threads == {threading.get_ident()}
    assert verdict.alive == {"me"}
    assert not verdict.is_fenced
    await heart.stop()


async def test_a_heart_whose_node_is_gone_stops_by_itself() -> None:
    """A program's loop that ended without a word drives nothing: the others must see that."""
    ward = a_ward()

    def live_and_forget() -> None:
        loop = asyncio.new_event_loop()
        loop.run_until_complete(make(ward, "thread").start())
        loop.close()

    await asyncio.to_thread(live_and_forget)
    for thread in threads():
        await asyncio.to_thread(thread.join, HANG_S)
    assert threads() == []
    assert ward.state() == NodeState.LEFT


async def test_a_defect_in_what_a_node_says_of_itself_does_not_stop_its_heart() -> None:
    ward, turns = a_ward(), []

    def info() -> Json:
        turns.append(1)
        if len(turns) == 3:
            raise RuntimeError("dictionary changed size during iteration")
        return {}

    heart = make(ward, "thread", info=info)
    await heart.start()
    await asyncio.to_thread(ward.wait_for, "beat", 6)
    assert heart.holds()
    await heart.stop()
    assert ward.state() == NodeState.LEFT


# -- what it says and sees -------------------------------------------------------------------------


def test_stop_says_the_state_it_is_given_and_announce_says_leaving() -> None:
    async def main() -> None:
        ward, clock = a_ward(VirtualClock()), VirtualClock()
        heart = make(ward, "task", clock=clock, options=LeaseOptions())
        await heart.start()
        await clock.sleep(2.0)
        assert ward.count("leave") == 0
        heart.announce()
        await clock.sleep(1.0)
        assert ward.state() == NodeState.LEAVING
        beats = ward.count("beat")
        await clock.sleep(5.0)
        assert ward.count("beat") > beats  # it still lives
        assert ward.count("leave") == 1
        assert heart.holds()
        await heart.stop()
        assert ward.state() == NodeState.LEFT

    virtually(main())


@pytest.mark.parametrize("failures", [1, 3])
def test_a_store_that_is_slow_at_first_is_asked_to_join_again(failures: int) -> None:
    async def main() -> None:
        ward, clock = a_ward(VirtualClock()), VirtualClock()
        heart = make(ward, "task", clock=clock, options=LeaseOptions())

        def refuse(name: str) -> None:
            if name == "join" and ward.count("join") <= failures:
                raise StoreUnavailable("no answer in time")

        ward.hook = refuse
        await heart.start()
        assert ward.count("join") == failures + 1
        assert heart.holds()
        await heart.stop()

    virtually(main())


def test_a_store_that_does_not_let_it_join_is_given_up_in_time() -> None:
    async def main() -> None:
        ward, clock = a_ward(VirtualClock()), VirtualClock()
        heart = make(ward, "task", clock=clock, options=LeaseOptions())

        def refuse(name: str) -> None:
            if name == "join":
                raise StoreUnavailable("away")

        ward.hook = refuse
        begun = clock.monotonic()
        with pytest.raises(StoreUnavailable):
            await heart.start()
        assert heart_module.JOIN_S <= clock.monotonic() - begun < heart_module.JOIN_S + 5
        await heart.stop()

    virtually(main())


def test_a_heart_that_is_stopped_while_the_store_is_away_asks_no_more() -> None:
    async def main() -> None:
        ward, clock = a_ward(VirtualClock()), VirtualClock()
        heart = make(ward, "task", clock=clock, options=LeaseOptions())

        refused = asyncio.Event()

        def refuse(name: str) -> None:
            if name == "join":
                refused.set()
                raise StoreUnavailable("away")

        ward.hook = refuse
        begun = clock.monotonic()
        starting = asyncio.ensure_future(heart.start())
        await refused.wait()
        await heart.stop()
        with pytest.raises(StoreUnavailable):
            await starting
        assert clock.monotonic() - begun < heart_module.JOIN_S / 2
        assert ward.count("join") <= 2  # at most the one that was about to be made

    virtually(main())


def test_an_announcement_that_failed_is_made_again() -> None:
    async def main() -> None:
        ward, clock = a_ward(VirtualClock()), VirtualClock()
        heart = make(ward, "task", clock=clock, options=LeaseOptions())
        await heart.start()

        def refuse(name: str) -> None:
            if name == "leave" and ward.count("leave") == 1:
                raise StoreUnavailable("once")

        ward.hook = refuse
        heart.announce()
        await clock.sleep(1.0)
        assert ward.state() == NodeState.LEAVING
        await heart.stop()

    virtually(main())


def test_beats_come_as_often_as_the_options_say() -> None:
    async def main() -> None:
        ward, clock = a_ward(VirtualClock()), VirtualClock()
        heart = make(ward, "task", clock=clock, options=LeaseOptions(heartbeat_s=1.0))
        await heart.start()
        await clock.sleep(100.0)
        assert 100 <= ward.count("beat") <= 130
        assert ward.store.nodes["me"].beat == ward.count("beat")
        await heart.stop()

    virtually(main())


def test_while_the_store_is_away_the_lease_ends_and_comes_back_with_it() -> None:
    async def main() -> None:
        ward, clock, ears = a_ward(VirtualClock()), VirtualClock(), Ears()
        heart = make(ward, "task", clock=clock, options=LeaseOptions(), told=ears)
        await heart.start()
        waiting: list[asyncio.Task[None]] = []

        def refuse(name: str) -> None:
            raise StoreUnavailable("away")

        await clock.sleep(1.0)
        ward.hook = refuse
        await clock.sleep(2.0)
        assert heart.holds()
        await clock.sleep(1.0)
        assert not heart.holds()
        waiting = [asyncio.ensure_future(heart.held()) for _ in range(3)]
        told = len(ears.heard)
        await clock.sleep(60.0)
        assert len(ears.heard) == told
        assert not any(task.done() for task in waiting)
        ward.hook = lambda name: None
        await clock.sleep(0.5)
        assert heart.holds()
        assert all(task.done() for task in waiting)
        await heart.stop()

    virtually(main())


def test_after_trouble_and_on_another_session_it_beats_at_once() -> None:
    """To the others it is gone until they see from which session it beats now."""

    async def main() -> None:
        ward, clock = a_ward(VirtualClock()), VirtualClock()
        heart = make(ward, "task", clock=clock, options=LeaseOptions(heartbeat_s=10.0))
        await heart.start()
        await clock.sleep(1.0)
        assert ward.count("beat") == 1
        ward.sessions = 2  # its connection was cut, and is a new one
        await clock.sleep(0.25)
        assert ward.count("beat") == 2
        await clock.sleep(3.0)
        assert ward.count("beat") == 2

        def refuse(name: str) -> None:
            if name == "watch":
                ward.hook = lambda name: None
                raise StoreUnavailable("once")

        ward.hook = refuse
        await clock.sleep(0.5)
        assert ward.count("beat") == 3
        await heart.stop()

    virtually(main())


def test_a_node_that_is_fenced_is_told_once_and_says_nothing_more() -> None:
    async def main() -> None:
        ward, clock, ears = a_ward(VirtualClock()), VirtualClock(), Ears()
        heart = make(ward, "task", clock=clock, options=LeaseOptions(), told=ears)
        await heart.start()
        await clock.sleep(1.0)
        members = await ward.store.members()
        assert await members.bury("me", ward.store.nodes["me"].beat)
        waiting = asyncio.ensure_future(heart.held())
        await clock.sleep(1.0)
        assert [verdict.is_fenced for verdict in ears.heard].count(True) == 1
        assert ears.heard[-1].is_fenced
        assert not heart.holds()
        asked = len(ward.asked)
        await clock.sleep(30.0)
        assert len(ward.asked) == asked
        assert ward.is_closed
        assert ward.state() == NodeState.DEAD
        assert waiting.done() or waiting.cancel()
        await heart.stop()
        assert ward.state() == NodeState.DEAD

    virtually(main())


def test_it_declares_dead_whoever_is_silent_and_tells_who_is_left() -> None:
    async def main() -> None:
        ward, clock, ears = a_ward(VirtualClock()), VirtualClock(), Ears()
        other = await ward.store.members()
        await other.join("it", "local", {})
        heart = make(ward, "task", clock=clock, options=LeaseOptions(), told=ears)
        await heart.start()
        for _ in range(20):
            await other.beat("it", {})
            await clock.sleep(0.5)
            assert ears.heard[-1].alive == {"me", "it"}
        assert ward.state("it") == NodeState.ALIVE
        await clock.sleep(4.0)
        assert ward.state("it") == NodeState.DEAD
        assert ears.heard[-1].alive == {"me"}
        await heart.stop()

    virtually(main())


def test_the_store_says_what_time_it_is_with_every_prompt_answer() -> None:
    async def main() -> None:
        store_time, machine = VirtualClock(), VirtualClock()
        store_time.offset_us = -3_600_000_000
        ward = a_ward(store_time)
        clock = StoreClock(machine)
        heart = make(ward, "task", clock=clock, options=LeaseOptions())
        await heart.start()
        await machine.sleep(1.0)
        assert clock.now_us() == store_time.now_us()
        store_time.offset_us += 60_000_000  # a failover to a server whose clock is ahead
        await machine.sleep(1.0)
        assert clock.now_us() == store_time.now_us()
        await heart.stop()

    virtually(main())


def test_an_answer_that_was_long_on_its_way_sets_no_clock() -> None:
    async def main() -> None:
        machine = VirtualClock()
        ward, clock = a_ward(machine), StoreClock(machine)
        heart = make(ward, "task", clock=clock, options=LeaseOptions())
        await heart.start()
        ward.late_s = 1.0
        for _ in range(50):
            await clock.sleep(0.1)
            assert abs(clock.drift_s) < 0.001
        await heart.stop()

    virtually(main())


async def test_a_good_bye_that_fails_is_no_failure_of_stop() -> None:
    ward = a_ward()
    heart = make(ward, "thread")
    await heart.start()

    def refuse(name: str) -> None:
        if name == "leave":
            raise StoreError("away")

    ward.hook = refuse
    await heart.stop()
    assert ward.count("leave") == 1
    assert ward.is_closed
    assert threads() == []
