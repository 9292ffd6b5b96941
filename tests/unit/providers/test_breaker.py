from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llm_orchestrator.providers.breaker import (
    BreakerPolicy,
    State,
    Tally,
    Verdict,
    admit,
    begun,
    count,
    fail,
    open_,
    release,
    succeed,
)

POLICY = BreakerPolicy(failures_max=3, open_s=2, open_s_max=16, wave_max=16, wave_s_max=50)


def half_open(now: float = 100.0) -> tuple[Verdict, int]:
    verdict = open_(Verdict(), now - 50, POLICY)
    verdict, answer = admit(verdict, now, POLICY)
    assert answer.is_admitted
    return verdict, answer.wave_id


def test_a_closed_breaker_admits_everything_and_writes_nothing() -> None:
    verdict, answer = admit(Verdict(), 5, POLICY)
    assert (verdict, answer.is_admitted, answer.wave_id) == (Verdict(), True, 0)


def test_it_opens_after_so_many_failures_in_a_row_and_a_success_starts_the_count_again() -> None:
    tally = Tally()
    outcomes = [True, True, False, True, True, True]
    opened = []
    for number, is_failure in enumerate(outcomes):
        tally, is_open = count(tally, 1.0 + number / 10, is_failure=is_failure, policy=POLICY)
        opened.append(is_open)
    assert opened == [False] * 5 + [True]


def test_it_opens_on_a_large_share_of_failures_though_never_in_a_row() -> None:
    policy = replace(POLICY, window_calls_min=10, share_max=0.5)
    tally, is_open = Tally(), False
    for number in range(10):
        tally, is_open = count(tally, 1.0, is_failure=number % 2 == 1, policy=policy)
    assert is_open


def test_an_old_window_is_forgotten() -> None:
    tally, _ = count(Tally(), 0.0, is_failure=True, policy=POLICY)
    tally, _ = count(tally, 31.0, is_failure=False, policy=POLICY)
    assert (tally.calls, tally.failures) == (1, 0)


def test_zero_failures_max_switches_it_off() -> None:
    policy = replace(POLICY, failures_max=0)
    tally = Tally()
    for _ in range(100):
        tally, is_open = count(tally, 1.0, is_failure=True, policy=policy)
        assert not is_open
    assert fail(Verdict(), 1, policy, wave_id=0, retry_after_s=9) == Verdict()


def test_each_opening_in_a_row_lasts_longer_up_to_a_limit() -> None:
    verdict, now, lasted = Verdict(), 0.0, []
    for _ in range(6):
        verdict = open_(verdict, now, POLICY)
        lasted.append(verdict.until - now)
        now = verdict.until
        verdict, _ = admit(verdict, now, POLICY)
    assert lasted == [2, 4, 8, 16, 16, 16]


def test_retry_after_opens_at_once_and_is_honoured() -> None:
    verdict = fail(Verdict(), 10, POLICY, wave_id=0, retry_after_s=33)
    assert verdict.until == 43
    _, answer = admit(verdict, 42.9, POLICY)
    assert not answer.is_admitted
    assert answer.wait_s == pytest.approx(0.1)


def test_calls_come_back_in_waves_of_1_4_16_and_then_it_closes() -> None:
    verdict, wave_id = half_open()
    sizes = [1]
    ids = [wave_id]
    while verdict.state is State.HALF_OPEN:
        for old in ids:
            verdict = succeed(verdict, 101, POLICY, wave_id=old)
        ids = []
        while verdict.state is State.HALF_OPEN:
            verdict, answer = admit(verdict, 101, POLICY)
            if not answer.is_admitted:
                break
            ids.append(answer.wave_id)
        if ids:
            sizes.append(len(ids))
    assert sizes == [1, 4, 16]


def test_the_next_wave_waits_for_the_whole_last_one() -> None:
    verdict, wave_id = half_open()
    verdict = succeed(verdict, 101, POLICY, wave_id=wave_id)
    ids = []
    for _ in range(4):
        verdict, answer = admit(verdict, 101, POLICY)
        ids.append(answer.wave_id)
    for wave_id in ids[:3]:
        verdict = succeed(verdict, 101, POLICY, wave_id=wave_id)
    assert not admit(verdict, 101, POLICY)[1].is_admitted
    verdict = succeed(verdict, 101, POLICY, wave_id=ids[3])
    assert admit(verdict, 101, POLICY)[1].is_admitted


def test_one_failure_in_a_wave_opens_it_again_for_longer() -> None:
    verdict, wave_id = half_open()
    verdict = fail(verdict, 101, POLICY, wave_id=wave_id)
    assert verdict.state is State.OPEN
    assert verdict.until == 101 + 4


def test_late_answers_of_calls_from_before_change_nothing() -> None:
    verdict, wave_id = half_open()
    assert fail(verdict, 101, POLICY, wave_id=0) == verdict
    assert succeed(verdict, 101, POLICY, wave_id=wave_id - 1) == verdict


def test_probes_that_never_answer_are_given_up() -> None:
    verdict, _ = half_open(100)
    assert not admit(verdict, 149, POLICY)[1].is_admitted
    assert admit(verdict, 151, POLICY)[1].is_admitted


def test_a_cancelled_probe_gives_its_place_back() -> None:
    verdict, wave_id = half_open()
    assert admit(release(verdict, wave_id=wave_id), 101, POLICY)[1].is_admitted


def test_a_wrong_clock_cannot_keep_it_shut_for_ever() -> None:
    verdict = open_(Verdict(), 1e9, POLICY)
    verdict, answer = admit(verdict, 100, POLICY)
    assert answer.wait_s <= POLICY.retry_after_s_max
    assert admit(verdict, 100 + POLICY.retry_after_s_max, POLICY)[1].is_admitted


@given(st.from_type(Verdict))
def test_a_verdict_survives_json(verdict: Verdict) -> None:
    assert Verdict.from_json(verdict.to_json()) == verdict


@given(st.recursive(st.none() | st.integers() | st.text(), st.lists))
def test_unreadable_state_is_a_closed_breaker(junk: object) -> None:
    assert Verdict.from_json(junk) == Verdict()
    assert Verdict.from_json({"state": junk}) == Verdict()


class Calls(RuleBasedStateMachine):
    """Random calls, outcomes and pauses: what a provider in trouble gets to see."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.verdict = Verdict()
        self.flying: list[tuple[int, float]] = []

    @rule()
    def call(self) -> None:
        before = self.verdict
        self.verdict, answer = admit(before, self.now, POLICY)
        if answer.is_admitted:
            self.flying.append((answer.wave_id, self.now))
        else:
            assert answer.wait_s > 0
        if before.state is State.OPEN and self.now < before.until:
            assert not answer.is_admitted

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), wait=st.none() | st.floats(0, 700))
    def break_off(self, data: st.DataObject, wait: float | None) -> None:
        wave_id, _ = self.flying.pop(data.draw(st.integers(0, len(self.flying) - 1)))
        self.verdict = fail(self.verdict, self.now, POLICY, wave_id=wave_id, retry_after_s=wait)

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        wave_id, _ = self.flying.pop(data.draw(st.integers(0, len(self.flying) - 1)))
        self.verdict = succeed(self.verdict, self.now, POLICY, wave_id=wave_id)

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        wave_id, _ = self.flying.pop(data.draw(st.integers(0, len(self.flying) - 1)))
        self.verdict = release(self.verdict, wave_id=wave_id)

    @rule()
    def trip(self) -> None:
        self.verdict = open_(self.verdict, self.now, POLICY)

    @rule(seconds=st.floats(0, 100))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def a_wave_is_never_overbooked(self) -> None:
        in_wave = sum(wave_id == self.verdict.wave_id for wave_id, _ in self.flying)
        if self.verdict.state is State.HALF_OPEN:
            assert in_wave + self.verdict.succeeded <= self.verdict.wave <= POLICY.wave_max
            assert self.verdict.succeeded <= self.verdict.admitted <= self.verdict.wave

    @invariant()
    def nobody_is_shut_out_for_ever(self) -> None:
        later = self.now + POLICY.retry_after_s_max + POLICY.wave_s_max
        assert admit(self.verdict, later, POLICY)[1].is_admitted


TestCalls = Calls.TestCase
TestCalls.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_what_was_under_way_before_does_not_end_a_row_of_failures() -> None:
    tally, is_open = Tally(), False
    for now in (10.0, 10.1, 10.2):
        assert not is_open
        tally, is_open = count(tally, now, is_failure=True, policy=POLICY)
        if not is_open:  # a long answer that began before the first failure ends well
            tally, _ = count(tally, now, is_failure=False, policy=POLICY, began=3.0)
    assert is_open


def test_a_call_that_began_after_the_first_failure_ends_the_row() -> None:
    tally = Tally()
    for now in (10.0, 11.0, 12.0, 13.0):
        tally, is_open = count(tally, now, is_failure=True, policy=POLICY)
        assert not is_open
        tally, _ = count(tally, now + 0.5, is_failure=False, policy=POLICY, began=now + 0.1)


def test_fast_failures_among_many_slow_calls_do_not_open_it() -> None:
    tally, is_open = count(Tally(), 10.0, is_failure=True, policy=POLICY)
    for _ in range(40):
        tally = begun(tally)
    for now in (10.1, 10.2, 10.3, 10.4):
        tally, is_open = count(tally, now, is_failure=True, policy=POLICY)
        assert not is_open
