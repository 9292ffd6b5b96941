"""Two clocks: this machine's, and the store's on this machine's steady one."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_orchestrator.clock import RealClock, StoreClock

HOUR_US = 3_600_000_000


class HandClock(RealClock):
    """Both clocks of a machine are set by hand."""

    def __init__(self) -> None:
        self.wall_us = 1_800_000_000_000_000
        self.steady_s = 1_000.0

    def now_us(self) -> int:
        return self.wall_us

    def monotonic(self) -> float:
        return self.steady_s

    def pass_by(self, seconds: float) -> None:
        self.wall_us += int(seconds * 1_000_000)
        self.steady_s += seconds


def test_a_machine_an_hour_ahead_that_asked_too_early_stands_still_for_no_hour() -> None:
    machine = HandClock()
    clock = StoreClock(machine)
    assert clock.now_us() == machine.wall_us  # nobody has said yet what time it is
    told = machine.wall_us - HOUR_US
    clock.set(told)
    assert clock.now_us() == told
    clock.set(told - HOUR_US)
    assert clock.now_us() == told


def test_the_stores_time_goes_on_with_the_steady_clock() -> None:
    machine = HandClock()
    clock = StoreClock(machine)
    clock.set(5 * HOUR_US)
    machine.pass_by(2.5)
    assert clock.now_us() == 5 * HOUR_US + 2_500_000


def test_whatever_hour_the_machine_thinks_it_is_changes_nothing() -> None:
    machine = HandClock()
    clock = StoreClock(machine)
    clock.set(5 * HOUR_US)
    for step in (HOUR_US, -3 * HOUR_US, 1_000 * HOUR_US):
        machine.wall_us += step
        machine.steady_s += 1.0
    assert clock.now_us() == 5 * HOUR_US + 3_000_000


def test_it_never_goes_back_and_waits_for_a_store_whose_clock_is_behind() -> None:
    machine = HandClock()
    clock = StoreClock(machine)
    clock.set(10 * HOUR_US)
    before = clock.now_us()
    clock.set(10 * HOUR_US - 60_000_000)
    assert clock.now_us() == before
    machine.pass_by(59.0)
    assert clock.now_us() == before
    machine.pass_by(2.0)
    assert clock.now_us() == before + 1_000_000


def test_a_time_that_nobody_has_read_may_be_set_back() -> None:
    clock = StoreClock(HandClock())
    clock.set(10 * HOUR_US)
    clock.set(9 * HOUR_US)
    assert clock.now_us() == 9 * HOUR_US


def test_the_drift_says_how_far_the_machine_is_ahead() -> None:
    machine = HandClock()
    clock = StoreClock(machine)
    assert clock.drift_s == 0.0
    clock.set(machine.wall_us - 2 * HOUR_US)
    assert clock.drift_s == 7_200.0
    machine.pass_by(100.0)
    assert clock.drift_s == 7_200.0
    machine.wall_us -= 3 * HOUR_US
    assert clock.drift_s == -3_600.0


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["pass", "set", "wall"]),
            st.integers(-(10**12), 10**12),
        ),
        max_size=50,
    )
)
def test_no_history_makes_it_go_back(steps: list[tuple[str, int]]) -> None:
    machine = HandClock()
    clock = StoreClock(machine)
    clock.set(machine.wall_us)
    seen = clock.now_us()
    for what, amount in steps:
        if what == "pass":
            machine.pass_by(abs(amount) / 1_000_000)
        elif what == "set":
            clock.set(seen + amount)
        else:
            machine.wall_us += amount
        now = clock.now_us()
        assert now >= seen
        seen = now


def test_a_machine_that_slept_knows_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux's monotonic clock stands still meanwhile; a lease of before would seem to hold."""
    clock = RealClock()
    before = clock.monotonic()
    real = time.clock_gettime

    def slept(which: int) -> float:
        return real(which) + (3_600.0 if which == time.CLOCK_BOOTTIME else 0.0)

    monkeypatch.setattr(time, "clock_gettime", slept)
    assert clock.monotonic() - before >= 3_600.0
