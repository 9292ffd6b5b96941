"""Readers of streams and the death of the node that speaks: real processes, SIGKILL, PostgreSQL.

The fake model says a word every PACE_MS; what it said is kept each second. A node dies in the
middle of an answer, another one takes the run over and goes on from what was kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from llm_orchestrator.client.events import Event, Held, Parser
from tests.acceptance.cluster.books import Books
from tests.acceptance.cluster.nodes import Cluster, NodeProcess

pytestmark = [pytest.mark.serial, pytest.mark.timeout(300)]
PACE_MS, TOKENS = 60, 100
FIRST, OTHER = " ".join(f"amber{n:03d}" for n in range(TOKENS)), "basin " * 40
STORY = f"""
name: story
version: "1.0"
inputs: {{prompt: string}}
steps:
  - {{id: say, type: llm, provider: house, model: fake, stream: true,
     prompt: "{{{{ inputs.prompt }}}} [[fake: chunk_delay_ms={PACE_MS}]]"}}
outputs: {{text: {{value: "{{{{ steps.say.text }}}}"}}}}
"""
SETTINGS = """
[providers.house]
base_url = "{url}/v1"
resume = ["prefill"]
"""
YAML = {"content-type": "application/yaml"}


@pytest.fixture(autouse=True)
def _house(cluster: Cluster) -> None:
    """A provider that goes on from half an answer."""
    cluster.configure(SETTINGS.format(url=cluster.fake.url))


def url_of(node: NodeProcess) -> str:
    """Where it listens, once it is ready."""
    assert node.node_id
    found = re.search(r"on (http://[\w.:]+)", node.said)
    assert found, node.said
    return found[1]


def start(url: str, prompt: str) -> str:
    body = {"inputs": {"prompt": prompt}}
    answer = httpx.post(f"{url}/api/v1/workflows/story/execute", json=body, timeout=60)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["run_id"])


def register(url: str) -> None:
    answer = httpx.post(f"{url}/api/v1/workflows", content=STORY, headers=YAML, timeout=60)
    assert answer.is_success, answer.text


class Reader:
    """One reader of a run's events, wherever it asks."""

    def __init__(self, run_id: str, path: str = "/events") -> None:
        self.path = f"/api/v1/runs/{run_id}{path}"
        self.held = Held()
        self.last_id = ""
        self.seqs: list[int] = []
        self.resets: list[int] = []
        self.end: dict[str, Any] | None = None

    @property
    def text(self) -> str:
        return self.held.text.get("say", "")

    def read(self, url: str, enough: Callable[[], bool] = lambda: False) -> None:
        """From where it stands, until it has enough, the stream breaks off, or the run ends."""
        headers = {"last-event-id": self.last_id} if self.last_id else {}
        parser = Parser(self.last_id)
        try:
            with httpx.stream("GET", url + self.path, headers=headers, timeout=60) as answer:
                assert answer.status_code == 200, answer.read()
                for line in answer.iter_lines():
                    for event in parser.feed(line):
                        self.take(event)
                        if event.kind == "end" or enough():
                            return
        except httpx.TransportError:
            return

    def take(self, event: Event) -> None:
        self.last_id = event.id
        held = len(self.text)
        self.held.apply(event)
        if event.kind == "chunk":
            assert event.data["offset"] == held, "a gap or a repeat"
        elif event.kind == "reset":
            assert event.data["offset"] <= held
            self.resets.append(event.data["offset"])
        elif event.kind == "end":
            self.end = event.data
        elif event.kind != "reconnect":
            self.seqs.append(int(event.id))


@pytest.mark.parametrize("is_same", [True, False], ids=["same-words", "other-words"])
@pytest.mark.parametrize("path", ["/events", "/steps/say/events"], ids=["run", "step"])
def test_a_reader_goes_on_at_another_node_when_its_node_is_killed(
    cluster: Cluster, books: Books, path: str, is_same: bool
) -> None:
    first, second = cluster.ready("a", "b")
    here, there = url_of(first), url_of(second)
    register(here)
    again = FIRST if is_same else OTHER
    cluster.fake.control(reset=True, script=[{"reply": FIRST}, {"reply": again}])
    run_id = start(here, f"A story {path} {is_same}")
    reader = Reader(run_id, path)
    reader.read(here, lambda: len(reader.text) > len(FIRST) // 3)
    assert FIRST.startswith(reader.text)
    first.kill()
    reader.read(there)
    assert reader.end is not None
    assert reader.end["state"] == "completed"
    recorded = httpx.get(f"{there}/api/v1/runs/{run_id}/result", timeout=60).json()["output"]
    assert reader.text == recorded["text"]
    assert recorded["text"].startswith(FIRST[:20])
    assert (recorded["text"] == FIRST) == is_same
    asked = cluster.fake.arrived(f"A story {path} {is_same}")
    assert len(asked) == 2
    assert asked[1]["prefix_chars"] > 0  # it went on from what was kept
    if path == "/events":
        assert reader.seqs == list(range(1, max(reader.seqs) + 1))
    fresh = Reader(run_id, path)
    fresh.read(there)
    assert (fresh.text, fresh.resets, fresh.seqs) == (reader.text, [], reader.seqs)


def numbers(stream: Iterator[Any], seen: list[Any], enough: int) -> None:
    """Read events until there are enough deltas, the connection breaks, or the end."""
    try:
        for event in stream:
            seen.append(event)
            if sum(each.type == "response.output_text.delta" for each in seen) >= enough:
                return
    except (httpx.TransportError, openai.APIError):
        return


def test_a_background_response_is_resumed_by_number_at_another_node(
    cluster: Cluster, books: Books
) -> None:
    first, second = cluster.ready("a", "b")
    register(url_of(first))
    cluster.fake.control(reset=True, script=[{"reply": FIRST}, {"reply": OTHER}])
    here = openai.OpenAI(base_url=f"{url_of(first)}/v1", api_key="none", max_retries=0)
    there = openai.OpenAI(base_url=f"{url_of(second)}/v1", api_key="none", max_retries=0)
    seen: list[Any] = []
    with here, there:
        stream = here.responses.create(
            model="story", input="A response", stream=True, background=True
        )
        numbers(stream, seen, 40)
        response_id = seen[0].response.id
        first.kill()
        rest = there.responses.retrieve(
            response_id, stream=True, starting_after=seen[-1].sequence_number
        )
        seen.extend(rest)
        answer = there.responses.retrieve(response_id)
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    deltas = [event.delta for event in seen if event.type == "response.output_text.delta"]
    assert seen[-1].type == "response.completed"
    assert "".join(deltas) == answer.output_text != FIRST
    assert answer.output_text.startswith(FIRST[:100])


def test_a_chat_elsewhere_does_not_notice_that_the_node_which_speaks_was_killed(
    cluster: Cluster, books: Books
) -> None:
    (face,) = cluster.ready("face", words=("--serve", "api"))
    first, second = cluster.ready("a", "b", words=("--serve", "worker"))
    workers = {first.node_id.split()[0]: first, second.node_id.split()[0]: second}
    register(url_of(face))
    cluster.fake.control(reset=True, default={"reply": FIRST})
    said, killed = "", False
    with openai.OpenAI(base_url=f"{url_of(face)}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="story", messages=[{"role": "user", "content": "A chat"}], stream=True
        )
        for chunk in stream:
            said += chunk.choices[0].delta.content or ""
            run_id = chunk.id.removeprefix("chatcmpl-")
            if len(said) > 100 and not killed:
                workers[owner_of(url_of(face), run_id)].kill()
                killed = True
    assert killed
    assert said == FIRST
    assert len(cluster.fake.arrived("A chat")) == 2


def owner_of(url: str, run_id: str) -> str:
    """Who drives a run that is being driven."""
    return str(httpx.get(f"{url}/api/v1/runs/{run_id}", timeout=60).json()["owner"])
