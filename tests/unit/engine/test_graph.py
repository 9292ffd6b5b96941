"""The ready queue: a step starts the moment its last dependency ends, and nothing ever hangs."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from llm_orchestrator.engine.graph import Graph
from llm_orchestrator.model import StepState

COMPLETED, FAILED, SKIPPED = StepState.COMPLETED, StepState.FAILED, StepState.SKIPPED


def test_steps_without_dependencies_start_at_once_in_file_order() -> None:
    graph = Graph({"b": [], "a": [], "c": ["a"]})
    assert graph.take_ready() == [("b", ""), ("a", "")]
    assert graph.take_ready() == []


def test_a_step_starts_with_its_last_dependency_and_only_once() -> None:
    graph = Graph({"a": [], "b": [], "c": ["a", "b", "a"]})
    graph.take_ready()
    graph.end("a", COMPLETED)
    assert graph.take_ready() == []
    graph.end("b", COMPLETED)
    assert graph.take_ready() == [("c", "")]
    assert not graph.is_done
    graph.end("c", COMPLETED)
    assert graph.is_done


def test_a_failure_skips_what_depends_on_it_and_names_it() -> None:
    graph = Graph({"a": [], "b": ["a"], "c": ["b"], "d": []})
    graph.take_ready()
    graph.end("a", FAILED)
    assert graph.take_ready() == [("b", "a failed")]
    graph.end("b", SKIPPED)
    assert graph.take_ready() == [("c", "b was skipped")]


def test_a_step_may_run_although_a_dependency_was_skipped_but_not_if_it_failed() -> None:
    graph = Graph({"a": [], "b": [], "c": ["a"], "d": ["b"]}, run_if_skipped=["c", "d"])
    graph.take_ready()
    graph.end("a", SKIPPED)
    graph.end("b", FAILED)
    assert graph.take_ready() == [("c", ""), ("d", "b failed")]


GRAPHS = st.lists(st.lists(st.integers(0, 30), max_size=4), max_size=14)


@given(GRAPHS, st.randoms(), st.sets(st.integers(0, 13)))
def test_any_graph_ends_each_step_once_and_after_its_dependencies(
    rows: list[list[int]], chance: random.Random, tolerant: set[int]
) -> None:
    needs = {
        str(number): sorted({str(other % number) for other in row} if number else set())
        for number, row in enumerate(rows)
    }
    graph = Graph(needs, run_if_skipped=[str(number) for number in tolerant])
    ended: dict[str, StepState] = {}
    open_steps: list[str] = []
    while True:
        for step, reason in graph.take_ready():
            states = [ended[need] for need in needs[step]]
            must_skip = FAILED in states or (SKIPPED in states and int(step) not in tolerant)
            assert bool(reason) is must_skip
            assert step not in ended
            if reason:
                ended[step] = SKIPPED
                graph.end(step, SKIPPED)
            else:
                open_steps.append(step)
        if open_steps:
            step = open_steps.pop(chance.randrange(len(open_steps)))
            ended[step] = chance.choice([COMPLETED, COMPLETED, FAILED, SKIPPED])
            graph.end(step, ended[step])
        elif len(ended) == len(needs) or not graph._ready:
            break
    assert graph.is_done
    assert set(ended) == set(needs)
