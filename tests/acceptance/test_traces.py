"""Traces and logs of real processes: one trace through kill -9, and runs that need no receiver."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from llm_orchestrator.telemetry.propagation import incoming
from tests.acceptance.cluster.nodes import NodeProcess, until
from tests.acceptance.fake_server import FakeServer, fake_server
from tests.acceptance.otlp_receiver import Receiver, nobody, receiving, silence
from tests.acceptance.site import DATABASES, Site, site_on

pytestmark = [pytest.mark.timeout(300)]
CLIENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
TRACE, PARENT = CLIENT.split("-")[1:3]
FLOW = """\
name: talk
inputs: {receiver: {type: string}}
steps:
  - {id: first, type: llm, provider: house, model: fake, prompt: "one"}
  - {id: second, type: llm, provider: house, model: fake, depends_on: [first],
     prompt: "two [[fake: hang times=1]]"}
  - {id: hook, type: action, action: http, depends_on: [second], effect: repeatable,
     parameters: {method: POST, url: "{{ inputs.receiver }}/hook", json: {}}}
"""
SHORT = """\
name: short
steps:
  - {id: only, type: llm, provider: house, model: fake, prompt: "three"}
"""


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    with fake_server(tmp_path_factory.mktemp("fake")) as made:
        yield made


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


def trace_to(site: Site, url: str) -> None:
    """Every node that starts from now on sends its spans there, soon."""
    site.configure('outgoing_allow = ["127.0.0.1"]')
    site.cluster._environment |= {
        "OTEL_EXPORTER_OTLP_ENDPOINT": url,
        "OTEL_BSP_SCHEDULE_DELAY": "50",
        "OTEL_RESOURCE_ATTRIBUTES": "team=whales",
    }


def ready(site: Site, name: str) -> NodeProcess:
    node = site.cluster.node(name)
    assert node.node_id
    return node


def log_of(node: NodeProcess) -> list[dict[str, object]]:
    """Every line of a node's stderr; fails for one that is no JSON."""
    return [json.loads(line) for line in node.said.splitlines()]


@pytest.mark.parametrize("database", DATABASES)
def test_a_run_that_survived_kill_9_is_one_trace(
    database: str, tmp_path: Path, fake: FakeServer, receiver: Receiver
) -> None:
    with site_on(database, tmp_path, fake) as site:
        fake.control(reset=True)
        trace_to(site, receiver.url)
        first = ready(site, "a")
        second = ready(site, "b") if site.is_shared else None
        if second is not None:
            second.freeze()
        incoming(CLIENT)
        [run_id] = site.submit(FLOW, [{"receiver": receiver.url}])
        incoming("")
        until(lambda: f"{run_id}/second" in site.calls(), "a question that hangs")
        until(lambda: receiver.named("step first"), "the first step's span")
        lost_node = first.node_id
        first.kill()
        if second is not None:
            second.thaw()
        second = second or ready(site, "b")
        site.wait_completed(1)
        assert second.terminate() == 0, second.said
        questions = site.calls()[f"{run_id}/second"]

    ours = [span for span in receiver.spans if span.facts.get("run.id") == run_id]
    assert {span.trace_id for span in ours} == {TRACE}
    assert len({span.span_id for span in ours}) == len(ours)
    assert Counter(span.name for span in ours) == {
        "run talk": 1,
        "stay talk": 2,
        "step first": 1,
        "step second": 1,
        "step hook": 1,
        "chat fake": 2,
        "attempt hook": 1,
    }
    run = receiver.one("run talk")
    assert (run.parent_id, run.facts["run.state"]) == (PARENT, "completed")
    stays = sorted(receiver.named("stay talk"), key=lambda span: int(span.facts["epoch"]))
    assert [stay.parent_id for stay in stays] == [run.span_id] * 2
    assert [stay.facts["node"] for stay in stays] == [lost_node, second.node_id]
    assert stays[0].error == f"node {lost_node} was lost"
    assert stays[1].links == (stays[0].span_id,)
    known = {span.span_id for span in ours} | {PARENT}
    assert [span.name for span in ours if span.parent_id not in known] == []
    assert receiver.one("step first").resource["service.instance.id"] == lost_node
    assert run.resource["service.name"] == "llm-orchestrator"
    assert run.resource["team"] == "whales"

    asked = {span.facts["step"]: span for span in receiver.named("chat fake")}
    assert asked["second"].facts["gen_ai.provider.name"] == "house"
    assert asked["second"].facts["gen_ai.usage.output_tokens"] > 0
    assert "gen_ai.input.messages" not in asked["second"].facts
    # Both lives asked; only the one whose answer was kept has a span.
    assert [line["traceparent"][3:35] for line in questions] == [TRACE, TRACE]
    assert questions[1]["traceparent"][36:52] == asked["second"].span_id
    [hook] = receiver.headers
    assert hook["traceparent"] == f"00-{TRACE}-{receiver.one('attempt hook').span_id}-01"

    [line] = [line for line in log_of(second) if line["event"] == f"run {run_id} completed"]
    assert line["trace_id"] == TRACE
    assert (line["run_id"], line["node"]) == (run_id, second.node_id)
    assert line["span_id"] == stays[1].span_id


@pytest.mark.parametrize("how", ["refused", "silent"])
def test_an_exporter_that_is_down_hurts_no_run_and_no_end(
    how: str, tmp_path: Path, fake: FakeServer
) -> None:
    with ExitStack() as stack:
        site = stack.enter_context(site_on("sqlite", tmp_path, fake))
        fake.control(reset=True)
        trace_to(site, nobody() if how == "refused" else stack.enter_context(silence()))
        site.cluster._environment["OTEL_BSP_MAX_QUEUE_SIZE"] = "64"
        site.cluster._environment["OTEL_BSP_MAX_EXPORT_BATCH_SIZE"] = "16"
        node = ready(site, "a")
        site.submit(SHORT, [{}] * 100)  # more spans than the queue takes
        site.wait_completed(100)
        assert node.terminate() == 0, node.said
        assert log_of(node)


def test_without_an_endpoint_nothing_is_sent_and_the_log_still_knows_the_trace(
    tmp_path: Path, fake: FakeServer
) -> None:
    with site_on("sqlite", tmp_path, fake) as site:
        fake.control(reset=True)
        node = ready(site, "a")
        [run_id] = site.submit(SHORT, [{}])
        site.wait_completed(1)
        assert node.terminate() == 0, node.said
        [line] = [line for line in log_of(node) if line["event"] == f"run {run_id} completed"]
        assert len(str(line["trace_id"])) == 32
        assert "span_id" not in line
        assert [call["traceparent"] for call in site.calls()[f"{run_id}/only"]] == [""]
