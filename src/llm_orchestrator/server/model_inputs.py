"""A workflow behind a model's face: how messages become inputs, and which text is the answer.

The one place that says it. What a request brings becomes the input of that name, where the workflow
declares one (the first that gives a value wins):

- `inputs` of the body (`extra_body={"inputs": {...}}` in the official client);
- `metadata`: read as JSON where the input is no string; what is no input becomes a label;
- `temperature`, `top_p`, `max_tokens`, ... (PARAMETERS);
- `messages`: all messages (of a response: the items of its `input`), as they came;
- `system`: the text of the system messages, or `instructions`;
- the text of the last user message: the first that is declared of `prompt`, `input`, `question`,
  `text`, `query`; else the only required string that nothing else gives.

A workflow without an `inputs` section gets `messages` and `prompt`, a Python workflow `prompt`,
both besides `inputs`. What nothing declares is left out; an input without a value is refused.

The answer's text is the run's output if that is a string; else its only output, or its `text`,
`answer`, `output`, `content`, `message`, `result`, whichever is the first that is a string; else
the output as JSON. Tokens come as they are made where that output is just one step's text
(`{{ steps.say.text }}`; `say` is an `llm` step, not within another step, without `on_error`);
else the answer comes in one piece when it is there. The usage is that of the run's own steps.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from llm_orchestrator.engine.flows import is_code
from llm_orchestrator.errors import InputError
from llm_orchestrator.model import Json, Workflow

PROMPTS = ("prompt", "input", "question", "text", "query")
ANSWERS = ("text", "answer", "output", "content", "message", "result")
PARAMETERS = (
    "temperature",
    "top_p",
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    "frequency_penalty",
    "presence_penalty",
    "seed",
    "stop",
    "user",
    "reasoning_effort",
)
_STEP_TEXT = re.compile(r"\{\{-?\s*(steps|outputs)\.(\w+)(?:\.(\w+))?\s*-?\}\}")


class Asked(NamedTuple):
    """What a request says, whichever of the two shapes it had."""

    messages: Sequence[Mapping[str, Json]]
    system: str = ""
    parameters: Mapping[str, Json] = {}
    metadata: Mapping[str, str] = {}
    inputs: Mapping[str, Json] = {}


class Given(NamedTuple):
    """What a run is started with."""

    inputs: dict[str, Json]
    labels: dict[str, str]


def to_run(stored: Workflow, asked: Asked) -> Given:
    """See the module's docstring. Raises InputError when no text fits anywhere."""
    prompt = last_user_text(asked.messages)
    declared = _declared(stored)
    if declared is None:
        plain: dict[str, Json] = {"prompt": prompt}
        if not is_code(stored):
            plain["messages"] = [dict(message) for message in asked.messages]
        return Given({**plain, **asked.inputs}, dict(asked.metadata))
    inputs = dict(asked.inputs)
    for name, text in asked.metadata.items():
        if name in declared:
            inputs.setdefault(name, _read(text, declared[name].get("type", "any")))
    offered: dict[str, Json] = {
        **asked.parameters,
        "messages": [dict(message) for message in asked.messages],
    }
    system = asked.system or _system_text(asked.messages)
    if system:
        offered["system"] = system
    for name, value in offered.items():
        if name in declared and value is not None:
            inputs.setdefault(name, value)
    place = _place_of_prompt(declared, inputs)
    if place:
        inputs.setdefault(place, prompt)
    elif "messages" not in declared and prompt and not asked.inputs:
        raise InputError(
            f"workflow {stored.name} declares no input for a message",
            hint=f"declare one of: messages, {', '.join(PROMPTS)}; or give `inputs` in the body",
        )
    labels = {name: text for name, text in asked.metadata.items() if name not in declared}
    return Given(inputs, labels)


def last_user_text(messages: Sequence[Mapping[str, Json]]) -> str:
    """The text of the last message that a user sent."""
    for message in reversed(messages):
        if message.get("role", "user") == "user":
            return text_in(message.get("content"))
    return ""


def text_in(content: Json) -> str:
    """The text of a message's content: a string, or parts of which some have text."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if isinstance(part, Mapping)]
    return "".join(text for text in texts if isinstance(text, str))


def answer_text(output: Json) -> str:
    """The text of a run's output."""
    if isinstance(output, str):
        return output
    if output is None:
        return ""
    if isinstance(output, Mapping):
        name = _answer_name(output)
        value = output.get(name) if name is not None else None
        if isinstance(value, str):
            return value
        if len(output) == 1 and isinstance(value, Mapping) and isinstance(value.get("text"), str):
            return str(value["text"])  # no `outputs` section, one last step
    return json.dumps(output, ensure_ascii=False, default=str)


def streamed_step(stored: Workflow) -> str | None:
    """The step whose tokens are the answer's; None when only the end tells the answer."""
    if is_code(stored):
        return None
    definition = json.loads(stored.definition)
    steps = {step["id"]: step for step in definition["steps"]}
    outputs = definition.get("outputs")
    if outputs is None:
        return _lone_step(definition["steps"])
    name = _answer_name(dict.fromkeys(outputs, ""))
    if name is None:
        return None
    spec = outputs[name]
    value = spec.get("value") if isinstance(spec, Mapping) else spec
    found = _STEP_TEXT.fullmatch(value.strip()) if isinstance(value, str) else None
    step = steps.get(found[2]) if found else None
    if found is None or step is None or not _is_plain(step):
        return None
    return str(step["id"]) if _is_text(step, found[1], found[3]) else None


def _answer_name(output: Mapping[str, Json]) -> str | None:
    if len(output) == 1:
        return next(iter(output))
    return next((name for name in ANSWERS if isinstance(output.get(name), str)), None)


def _lone_step(steps: Sequence[Mapping[str, Json]]) -> str | None:
    if len(steps) == 1 and _is_plain(steps[0]) and not steps[0].get("output"):
        return str(steps[0]["id"])
    return None


def _is_plain(step: Mapping[str, Json]) -> bool:
    return step.get("type") == "llm" and step.get("on_error", "fail") == "fail"


def _is_text(step: Mapping[str, Json], space: str, field: str | None) -> bool:
    """Whether `steps.ID.FIELD` or `outputs.ID` is what the model said."""
    bound = step.get("output") or ()
    names = dict.fromkeys(bound[:1], "text") if isinstance(bound, list) else dict(bound)
    if space == "outputs":
        first = next(iter(bound), None) if not isinstance(bound, list) else None
        return field is None and (first is None or names[first] == "text")
    return field is not None and names.get(field, field) == "text"


def _declared(stored: Workflow) -> dict[str, dict[str, Json]] | None:
    if is_code(stored):
        return None
    found = json.loads(stored.definition).get("inputs")
    if found is None:
        return None
    return {name: spec if isinstance(spec, dict) else {} for name, spec in found.items()}


def _place_of_prompt(declared: Mapping[str, Mapping[str, Json]], given: Mapping[str, Json]) -> str:
    for name in PROMPTS:
        if name in declared:
            return name
    open_ones = [
        name
        for name, spec in declared.items()
        if name not in given
        and spec.get("required", True)
        and "default" not in spec
        and spec.get("type", "any") in ("string", "any")
    ]
    return open_ones[0] if len(open_ones) == 1 else ""


def _system_text(messages: Sequence[Mapping[str, Json]]) -> str:
    wanted = [each for each in messages if each.get("role") in ("system", "developer")]
    return "\n".join(text_in(message.get("content")) for message in wanted)


def _read(text: str, kind: Json) -> Json:
    """A metadata value, which is always a string, as an input of some type."""
    if kind == "string":
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text
