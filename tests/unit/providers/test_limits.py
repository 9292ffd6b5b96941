from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_orchestrator.providers.limits import (
    Bucket,
    Buckets,
    Limit,
    Slice,
    cut_slice,
    join,
    limit_for,
    refill,
    settle,
    spend,
)

LIMIT = Limit(requests_per_minute=60, tokens_per_minute=6000)


class Node:
    """One node that asks, spends and settles, as the guard does."""

    def __init__(self, limit: Limit) -> None:
        self.limit = limit
        self.part = Slice()

    def ask(self, shared: Buckets, now: float, tokens: float) -> tuple[Buckets, float]:
        paid = spend(self.part, now, tokens=tokens, limit=self.limit)
        if paid is None:
            shared, taken, wait = cut_slice(shared, self.part, now, tokens=tokens, limit=self.limit)
            if taken is None:
                return shared, wait
            self.part = join(self.part, taken, now)
            paid = spend(self.part, now, tokens=tokens, limit=self.limit)
            if paid is None:
                return shared, 1.0
        self.part = paid
        return shared, 0.0


def test_a_bucket_fills_evenly_and_never_over_its_size() -> None:
    assert refill(Bucket(0, 0), 30, 60).level == 30
    assert refill(Bucket(50, 0), 600, 60).level == 60


def test_a_clock_that_went_back_adds_nothing() -> None:
    assert refill(Bucket(5, 100), 50, 60).level == 5


def test_a_minute_admits_what_the_limit_says_and_then_tells_when_to_come() -> None:
    shared, node = Buckets.from_json(None, LIMIT, 0), Node(LIMIT)
    for _ in range(60):
        shared, wait = node.ask(shared, 0.0, 1)
        assert wait == 0
    shared, wait = node.ask(shared, 0.0, 1)
    assert wait == pytest.approx(1.0)


def test_the_hot_path_takes_a_slice_and_then_leaves_the_shared_state_alone() -> None:
    shared, node = Buckets.from_json(None, LIMIT, 0), Node(LIMIT)
    touched = 0
    for _ in range(30):
        before = shared
        shared, _ = node.ask(shared, 0.0, 10)
        touched += shared != before
    assert touched == 10


def test_a_request_larger_than_the_bucket_passes_when_the_bucket_is_full_and_leaves_debt() -> None:
    limit = Limit(tokens_per_minute=100)
    shared, node = Buckets.from_json(None, limit, 0), Node(limit)
    shared, wait = node.ask(shared, 0.0, 1000)
    assert wait == 0
    shared, wait = node.ask(shared, 0.0, 10)
    assert wait > 60


def test_what_was_really_used_is_settled_and_debt_is_paid_with_the_next_slice() -> None:
    limit = Limit(tokens_per_minute=6000)
    shared, node = Buckets.from_json(None, limit, 0), Node(limit)
    shared, _ = node.ask(shared, 0.0, 100)
    node.part = settle(node.part, estimated=100, used=5000)
    shared, wait = node.ask(shared, 0.0, 100)
    assert wait == 0
    assert shared.tokens.level == pytest.approx(900)


def test_a_slice_whose_time_is_over_leaves_only_its_debt() -> None:
    taken = Slice(3, 300, 103)
    assert join(Slice(5, 50, 100), taken, 99) == Slice(8, 350, 103)
    assert join(Slice(5, 50, 100), taken, 101) == Slice(3, 300, 103)
    assert join(Slice(5, -50, 100), taken, 101) == Slice(3, 250, 103)


def test_the_limit_of_a_model_comes_before_its_providers() -> None:
    limits = {"openai": Limit(5), "openai/big": Limit(1), "openai/free": Limit()}
    assert limit_for(limits, "openai", "big") == ("openai/big", Limit(1))
    assert limit_for(limits, "openai", "small") == ("openai", Limit(5))
    assert limit_for(limits, "openai", "free") == ("openai", Limit(5))
    assert limit_for(limits, "anthropic", "x") is None


@given(st.none() | st.integers() | st.lists(st.integers(), max_size=3) | st.text())
def test_unreadable_state_is_a_full_bucket(junk: object) -> None:
    assert Buckets.from_json(junk, LIMIT, 5).requests == Bucket(60, 5)


def test_shared_state_survives_json() -> None:
    shared = Buckets(Bucket(1.5, 2), Bucket(-7, 2))
    assert Buckets.from_json(shared.to_json(), LIMIT, 9) == shared


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.floats(0, 5), st.integers(1, 400)),
        min_size=1,
        max_size=120,
    )
)
def test_three_nodes_together_never_exceed_the_limit(
    asks: list[tuple[int, float, int]],
) -> None:
    shared = Buckets.from_json(None, LIMIT, 0)
    nodes = [Node(LIMIT) for _ in range(3)]
    now, requests, tokens = 0.0, 0, 0
    for place, pause, amount in asks:
        now += pause
        shared, wait = nodes[place].ask(shared, now, amount)
        if wait == 0:
            requests, tokens = requests + 1, tokens + amount
        else:
            assert wait > 0
    assert requests <= 60 + now + 1e-6
    assert tokens <= 6000 + now * 100 + 1e-6


@given(st.integers(1, 400), st.integers(1, 50))
def test_who_waits_as_long_as_he_is_told_is_admitted(amount: int, before: int) -> None:
    shared, node, now = Buckets.from_json(None, LIMIT, 0), Node(LIMIT), 0.0
    for _ in range(before):
        shared, wait = node.ask(shared, now, amount)
        if wait:
            now += wait + 1e-6
            shared, wait = node.ask(shared, now, amount)
        assert wait == 0
