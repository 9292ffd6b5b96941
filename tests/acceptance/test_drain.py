"""A node that is told to stop or to be empty: nothing is lost, nothing paid twice, nobody waits."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_orchestrator.model import RunState
from llm_orchestrator.store.base import NodeState
from tests.acceptance.cluster.nodes import HANG_S, NodeProcess, until
from tests.acceptance.fake_server import FakeServer, fake_server
from tests.acceptance.site import DATABASES, Site, claims, finished, site_on

pytestmark = [pytest.mark.serial, pytest.mark.timeout(300)]
RUNS = 200
LONG = 60
"""Of them stream for longer than any grace."""
TOKENS = 60
PACES_MS = (600, 800, 1_000, 1_200)
"""Half a minute at least, and several, so that streams are cut anywhere."""
FLOW = """\
name: talk
inputs: {number: {type: integer}, pace: {type: string, default: quickly}}
steps:
  - {id: first, type: llm, provider: house, model: fake,
     prompt: "Talk of {{ inputs.number }} {{ inputs.pace }} [[fake: tokens=60]]"}
  - {id: second, type: llm, provider: house, model: fake, max_tokens: 3, stream: false,
     depends_on: [first], prompt: "Then {{ inputs.number }}"}
outputs: {first: {value: "{{ steps.first.text }}"}, second: {value: "{{ steps.second.text }}"}}
"""


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    with fake_server(tmp_path_factory.mktemp("fake")) as made:
        yield made


@pytest.fixture(params=DATABASES)
def site(request: pytest.FixtureRequest, tmp_path: Path, fake: FakeServer) -> Iterator[Site]:
    with site_on(request.param, tmp_path, fake) as made:
        yield made


def slow_down(site: Site, count: int, *, paces_ms: tuple[int, ...] = PACES_MS) -> None:
    """The first `count` questions that ask for it are answered slowly, the others in a moment."""
    script = [
        {"match": {"contains": "slowly"}, "chunk_delay_ms": paces_ms[n % len(paces_ms)]}
        for n in range(count)
    ]
    site.fake.control(reset=True, script=script, default={"chunk_delay_ms": 10})


def ready(site: Site, name: str, *words: str) -> NodeProcess:
    node = site.cluster.node(name, *words)
    assert node.node_id
    return node


def test_sigterm_under_load_loses_nothing_and_pays_nothing_twice(site: Site) -> None:
    slow_down(site, LONG)
    first = ready(site, "first", "--grace", "3")
    leaver = first.node_id
    paces = ["slowly"] * LONG + ["quickly"] * (RUNS - LONG)
    run_ids = site.submit(FLOW, [{"number": n, "pace": pace} for n, pace in enumerate(paces)])
    keys = {f"{run_id}/first" for run_id in run_ids}
    until(lambda: keys <= site.calls().keys(), "all first steps that stream")
    second = ready(site, "second") if site.is_shared else None
    assert first.terminate() == 0, first.said
    assert site.owned(leaver) == 0
    assert site.members()[leaver].state == NodeState.LEFT
    second = second or ready(site, "second")
    site.wait_completed(RUNS)
    calls, went_on = site.calls(), 0
    for run_id, (entries, state) in site.journals().items():
        assert state.state is RunState.COMPLETED
        assert sorted(finished(entries)) == ["first", "second"]
        assert not any(claim.get("deaths") for claim in claims(entries))
        assert len(calls[f"{run_id}/second"]) == 1
        assert len(state.output["first"].split()) == TOKENS
        asked = calls[f"{run_id}/first"]
        if len(asked) > 1:
            owner = {entry.step: entry.epoch for entry in entries if entry.kind == "step_finished"}
            assert owner["first"] == state.epoch, "a finished step was paid twice"
            assert len(asked) == 2
            assert asked[1]["prefix_chars"] > 0, "what had come was not kept"
            went_on += 1
    assert went_on == LONG


def test_what_can_go_on_elsewhere_does_so_before_the_grace_ends(
    tmp_path: Path, fake: FakeServer
) -> None:
    with site_on("postgres", tmp_path, fake) as site:
        slow_down(site, 0)
        site.fake.control(script=[*LONGEST, *[SHORT] * 10])
        first = ready(site, "first", "--grace", str(HANG_S * 2))
        leaver = first.node_id
        longest, *others = site.submit(
            FLOW, [{"number": n, "pace": "for ever" if n == 0 else "slowly"} for n in range(11)]
        )
        until(lambda: len(site.calls()) == 11, "steps that stream")
        second = ready(site, "second")
        first.process.send_signal(signal.SIGTERM)
        site.wait_completed(10)
        assert not first.is_dead, "the others waited for the grace to end"
        assert site.members()[leaver].state == NodeState.LEAVING
        assert site.owned(leaver) == 1
        drivers = {
            run_id: [claim["node"] for claim in claims(entries)]
            for run_id, (entries, _) in site.journals().items()
        }
        assert all(drivers[run_id] == [leaver, second.node_id] for run_id in others)
        assert drivers[longest] == [leaver]
        first.process.send_signal(signal.SIGTERM)  # the second one: at once
        assert first.process.wait(HANG_S) == 128 + signal.SIGTERM
        site.wait_completed(11)
        entries, state = site.journals()[longest]
        assert state.deaths == 0
        assert [claim.get("deaths") for claim in claims(entries)] == [None, None]
        assert site.calls()[f"{longest}/first"][1]["prefix_chars"] > 0


LONGEST = [{"match": {"contains": "for ever"}, "chunk_delay_ms": 5_000}]
SHORT = {"match": {"contains": "slowly"}, "chunk_delay_ms": 100}


def test_a_drained_node_is_empty_says_so_and_comes_back(tmp_path: Path, fake: FakeServer) -> None:
    with site_on("postgres", tmp_path, fake) as site:
        slow_down(site, 10, paces_ms=(50,))
        first = ready(site, "first")
        site.submit(FLOW, [{"number": n, "pace": "slowly"} for n in range(10)])
        until(lambda: len(site.calls()) == 10, "steps that stream")
        second = ready(site, "second")
        site.cluster.ok("nodes", "drain", first.node_id[:9], "--reason", "new memory")
        site.wait_completed(10)
        assert site.owned(first.node_id) == 0
        assert not first.is_dead
        assert "drained" in _line(site, first)
        assert "drained" not in _line(site, second)
        more = site.submit(FLOW, [{"number": n} for n in range(100, 120)])
        site.wait_completed(30)
        journals = site.journals()
        assert {c["node"] for run_id in more for c in claims(journals[run_id][0])} == {
            second.node_id
        }
        assert all(len(asked) == 1 for asked in site.calls().values())
        site.cluster.ok("nodes", "drain", first.node_id, "--undo")
        assert second.terminate() == 0
        site.submit(FLOW, [{"number": 200}])
        site.wait_completed(31)
        assert "drained" not in _line(site, first)


def _line(site: Site, node: NodeProcess) -> str:
    rows = site.cluster.ok("nodes", "list").splitlines()
    return next(row for row in rows if node.node_id in row)
