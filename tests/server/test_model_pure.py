"""How messages become inputs, which text is the answer, and how its events are numbered."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llm_orchestrator.errors import InputError
from llm_orchestrator.language.load import load_text
from llm_orchestrator.model import Workflow
from llm_orchestrator.server.model_events import OPENING, Script
from llm_orchestrator.server.model_inputs import Asked, answer_text, streamed_step, to_run
from llm_orchestrator.server.model_run import Text, model_name
from llm_orchestrator.server.model_shapes import Run

USER: dict[str, Any] = {
    "role": "user",
    "content": [{"type": "text", "text": "hel"}, {"text": "lo"}],
}
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "first"},
    {"role": "assistant", "content": "said"},
    USER,
]
SAY = "{id: say, type: llm, provider: echo, model: echo, prompt: hello}"


def stored(text: str) -> Workflow:
    definition = load_text(text.encode(), "workflow.yaml", known_providers=["echo"])
    return Workflow(definition.name, definition.version, definition.digest, definition.canonical())


def flow(inputs: str = "{}", steps: str = SAY, outputs: str = "") -> Workflow:
    more = f"inputs: {inputs}\n" if inputs else ""
    return stored(f"name: flow\n{more}steps: [{steps}]\n" + outputs)


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ("{messages: array}", {"messages": TALK}),
        ("{prompt: string}", {"prompt": "hello"}),
        ("{input: string, system: string}", {"input": "hello", "system": "be brief"}),
        ("{topic: string, size: {type: integer, default: 3}}", {"topic": "hello"}),
        ("{question: string, other: string}", {"question": "hello"}),
        ("{temperature: number, prompt: string}", {"prompt": "hello", "temperature": 0.5}),
        ("", {"messages": TALK, "prompt": "hello"}),
    ],
)
def test_messages_become_what_is_declared(inputs: str, expected: dict[str, Any]) -> None:
    given = to_run(flow(inputs), Asked(TALK, parameters={"temperature": 0.5, "top_p": 1}))
    assert given.inputs == expected


def test_metadata_and_inputs_fill_what_is_declared_and_the_rest_are_labels() -> None:
    inputs = "{prompt: string, size: integer, tone: string, topics: array}"
    asked = Asked(
        TALK,
        metadata={"size": "7", "tone": "7", "topics": '["a"]', "team": "red"},
        inputs={"tone": "warm", "prompt": "mine"},
    )
    given = to_run(flow(inputs), asked)
    expected = {"prompt": "mine", "size": 7, "tone": "warm", "topics": ["a"]}
    assert given == (expected, {"team": "red"})


def test_a_python_workflow_gets_the_prompt() -> None:
    code = Workflow("code", "1", "ab", b'{"kind":"python","name":"code","version":"1"}')
    asked = Asked(TALK, inputs={"more": 1})
    assert to_run(code, asked).inputs == {"prompt": "hello", "more": 1}
    assert streamed_step(code) is None


def test_a_message_that_fits_nowhere_is_refused() -> None:
    with pytest.raises(InputError):
        to_run(flow("{left: string, right: string}"), Asked(TALK))


@pytest.mark.parametrize(
    ("output", "text"),
    [
        ("plain", "plain"),
        ({"said": "alone"}, "alone"),
        ({"text": "first", "answer": "second"}, "first"),
        ({"text": 1, "answer": "second"}, "second"),
        ({"say": {"text": "of a step", "model": "m"}}, "of a step"),
        ({"a": "1", "b": "2"}, '{"a": "1", "b": "2"}'),
        ([1], "[1]"),
        (None, ""),
    ],
)
def test_the_answer_is_the_outputs_text(output: Any, text: str) -> None:
    assert answer_text(output) == text


@pytest.mark.parametrize(
    ("step", "value", "expected"),
    [
        (SAY, "{{ steps.say.text }}", "say"),
        (SAY, "{{outputs.say}}", "say"),
        (SAY.replace("}", ", output: [said]}"), "{{ steps.say.said }}", "say"),
        (SAY.replace("}", ", output: {a: model, said: text}}"), "{{ steps.say.said }}", "say"),
        (SAY.replace("}", ", output: {a: model, said: text}}"), "{{ steps.say.a }}", None),
        (SAY, "{{ steps.say.model }}", None),
        (SAY, "<{{ steps.say.text }}>", None),
        (SAY.replace("}", ", on_error: continue}"), "{{ steps.say.text }}", None),
        (
            "{id: say, type: transform, expression: '1', output: [text]}",
            "{{ steps.say.text }}",
            None,
        ),
    ],
)
def test_tokens_are_streamed_only_where_they_are_the_answer(
    step: str, value: str, expected: str | None
) -> None:
    outputs = f"outputs: {{answer: {{value: {json.dumps(value)}}}}}\n"
    assert streamed_step(flow(steps=step, outputs=outputs)) == expected


def test_a_lone_step_without_outputs_speaks() -> None:
    assert streamed_step(flow()) == "say"


def test_a_model_is_a_name_and_perhaps_a_version() -> None:
    assert model_name("say") == ("say", None)
    assert model_name("say@1.0") == ("say", "1.0")
    assert model_name("@say") == ("@say", None)


# -- numbers --------------------------------------------------------------------------------------

RUN = Run("run", "flow@1", 0)
RESPONSE = {"status": "completed", "output": []}
ANSWER = "It is what it is, and no more."


def script(pieces: list[str], after: int | None = None) -> list[dict[str, Any]]:
    """All events, the text coming in these pieces."""
    made, text = Script(RUN, after), ""
    events = list(made.opening(RESPONSE))
    for piece in pieces:
        text += piece
        events += made.deltas(text)
    return [*events, *made.deltas(text, is_whole=True), *made.closing(RESPONSE, text)]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 100])
def test_numbers_follow_from_the_text_however_it_comes(size: int) -> None:
    pieces = [ANSWER[start : start + size] for start in range(0, len(ANSWER), size)]
    events = script(pieces)
    assert events == script([ANSWER])
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for after in range(len(events)):
        assert script(pieces, after) == events[after + 1 :]


def test_a_failed_run_ends_with_the_number_that_follows() -> None:
    made = Script(RUN, 1)
    assert [event["sequence_number"] for event in made.opening(RESPONSE)] == [2, 3]
    list(made.deltas(ANSWER[:9]))
    last = made.ending({"status": "failed"})
    assert (last["type"], last["sequence_number"]) == ("response.failed", OPENING + 2)
    assert made.ending({"status": "cancelled"})["type"] == "response.incomplete"


def test_text_that_is_told_again_is_silent_until_it_is_new() -> None:
    text = Text()
    text.now = "one two"
    assert text.take() == "one two"
    for now, new in (("", ""), ("one", ""), ("one two three", " three")):
        text.now = now
        assert (text.is_void, text.take()) == (False, new)
    text.now = "one two or"
    assert text.is_void
