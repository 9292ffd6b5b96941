"""One workflow for each step type, between a paid step before it and a step after it.

A run's texts are the fake server's, which are a pure function of the prompt, so a run that was
killed must have the same output as one that was not. Effects go to the fake server too: its ledger
takes every POST, with the idempotency key.
"""

from __future__ import annotations

import json
import urllib.request
from dataclasses import dataclass
from typing import Any

from llm_orchestrator import Context, step, workflow
from llm_orchestrator.language.code import CodeWorkflow
from tests.acceptance.crash.witness import WITNESS

HEAD = """
name: %s
inputs: {url: {type: string}, folder: {type: string}}
steps:
  - {id: first, type: llm, provider: openai, model: fake, prompt: Begin, stream: false,
     max_tokens: 4}
"""
EFFECT = """
    action: http
    method: POST
    url: "{{ inputs.url }}/v1/chat/completions"
    json: {model: fake, messages: [{role: user, content: "{{ steps.first.text }}"}]}
"""


@dataclass(frozen=True)
class Flow:
    """A workflow and how its run is to be treated. `text` holds what follows HEAD's steps."""

    text: str = ""
    code: CodeWorkflow[Any] | None = None
    choose: str = ""
    """What a person decides when the run pauses for an unknown outcome."""
    ends: tuple[str, ...] = ("completed",)
    signals: tuple[tuple[str, Any], ...] = ()
    child: str = ""
    embeds: str = ""
    """The step whose calls the ledger knows by their API only."""
    once: tuple[str, ...] = ()
    """Steps that must not be issued again without a decision."""
    repeats_allowed: int = 0
    """Issues of a `once` step beyond the first that its policy decides (on_unknown: retry)."""


def _http(policy: str, more: str = "") -> str:
    return f"""
  - id: post
    type: action
    on_unknown: {policy}{EFFECT}{more}
  - {{id: last, type: transform, function: template, template: "{{{{ steps.first.text }}}}",
     depends_on: [post]}}
"""


OUTPUTS = """
outputs: {said: {value: "{{ steps.last.result }}, {{ steps.first.text }}"}}
"""

DONE = """
  - {id: last, type: transform, function: template, template: "said %s"}
"""

FLOWS: dict[str, Flow] = {
    "llm_stream": Flow(
        "  - {id: ask, type: llm, provider: openai, model: fake, max_tokens: 6,"
        ' prompt: "Tell {{ steps.first.text }}"}\n' + DONE % "{{ steps.ask.text }}"
    ),
    "llm_anthropic": Flow(
        "  - {id: ask, type: llm, provider: anthropic, model: claude-sonnet-4-5, max_tokens: 4,"
        ' prompt: "Say {{ steps.first.text }}"}\n' + DONE % "{{ steps.ask.text }}"
    ),
    "llm_whole": Flow(
        "  - {id: ask, type: llm, provider: openai, model: fake, max_tokens: 6, stream: false,"
        ' prompt: "Tell {{ steps.first.text }}"}\n' + DONE % "{{ steps.ask.text }}"
    ),
    "embed": Flow(
        "  - {id: vec, type: embed, provider: openai, model: fake,"
        ' input: "{{ steps.first.text }}"}\n' + DONE % "{{ steps.vec.vector }}",
        embeds="vec",
    ),
    "vectors": Flow(
        """
  - {id: vec, type: embed, provider: openai, model: fake, input: "{{ steps.first.text }}"}
  - {id: keep, type: vector_upsert, database: sql, index: docs, ids: [one],
     vectors: ["{{ steps.vec.vector }}"], metadatas: [{text: "{{ steps.first.text }}"}]}
  - {id: find, type: vector_search, database: sql, index: docs, depends_on: [keep],
     query: "{{ steps.vec.vector }}"}
"""
        + DONE % "{{ steps.find.results[0].metadata.text }}",
        embeds="vec",
    ),
    "transform": Flow(
        """
  - {id: cut, type: transform, function: split, inputs: {text: "{{ steps.first.text }}"},
     separator: " "}
"""
        + DONE % "{{ steps.cut.result }}"
    ),
    "http_retry": Flow(_http("retry"), once=("post",), repeats_allowed=1),
    "http_ask_retry": Flow(_http("ask"), choose="retry", once=("post",)),
    "http_ask_finished": Flow(_http("ask"), choose="finished", once=("post",)),
    "http_ask_failed": Flow(
        _http("ask"), choose="failed", once=("post",), ends=("completed", "failed")
    ),
    "http_fail": Flow(_http("fail"), once=("post",), ends=("completed", "failed")),
    "http_probe": Flow(
        _http("probe", "    probe: {function: 'tests.acceptance.crash.flows:was_posted'}\n"),
        once=("post",),
        repeats_allowed=1,
    ),
    "webhook": Flow(
        """
  - id: hook
    type: action
    action: webhook
    url: "{{ inputs.url }}/v1/chat/completions"
    headers: {Idempotency-Key: "{{ run.id }}/hook"}
    payload: {model: fake, messages: [{role: user, content: hook}]}
  - {id: last, type: transform, function: template, template: "{{ steps.first.text }}",
     depends_on: [hook]}
""",
        choose="retry",
        once=("hook",),
    ),
    "file_write": Flow(
        """
  - {id: write, type: action, action: file_write, path: "{{ inputs.folder }}/made.txt",
     content: "{{ steps.first.text }}"}
"""
        + DONE % "{{ steps.write.result.bytes }}"
    ),
    "file_append": Flow(
        """
  - {id: write, type: action, action: file_write, path: "{{ inputs.folder }}/made.txt",
     content: "{{ steps.first.text }}", append: true}
"""
        + DONE % "{{ steps.write.result.bytes }}",
        choose="finished",
        once=("write",),
    ),
    "log": Flow(
        '  - {id: note, type: action, action: log, message: "{{ steps.first.text }}"}\n'
        + DONE % "{{ steps.note.result }}"
    ),
    "outbox": Flow(
        '  - {id: tell, type: action, action: publish, text: "{{ steps.first.text }}"}\n'
        + DONE % "{{ steps.tell.result.outbox }}"
    ),
    "parallel": Flow(
        """
  - id: both
    type: parallel
    tasks:
      - {id: left, type: llm, provider: openai, model: fake, prompt: "L {{ steps.first.text }}",
         max_tokens: 2, stream: false}
      - {id: right, type: llm, provider: openai, model: fake, prompt: "R {{ steps.first.text }}",
         max_tokens: 2, stream: false}
"""
        + DONE % "{{ steps.left.text }} {{ steps.right.text }}"
    ),
    "map": Flow(
        """
  - id: each
    type: map
    items: [a, b, c]
    max_concurrency: 2
    steps:
      - {id: ask, type: llm, provider: openai, model: fake, prompt: "Item {{ item }}",
         max_tokens: 2, stream: false}
"""
        + DONE % "{{ steps.each.results }}"
    ),
    "branch": Flow(
        """
  - id: choose
    type: branch
    condition: "{{ steps.first.text | length > 3 }}"
    branches:
      "true":
        - {id: yes_ask, type: llm, provider: openai, model: fake, prompt: Yes, max_tokens: 2,
           stream: false}
      "false":
        - {id: no_ask, type: llm, provider: openai, model: fake, prompt: No, max_tokens: 2,
           stream: false}
"""
        + DONE % "{{ steps.choose.result }} {{ steps.choose.branch }}"
    ),
    "loop": Flow(
        """
  - id: again
    type: loop
    max_iterations: 3
    steps:
      - {id: ask, type: llm, provider: openai, model: fake, prompt: "Round {{ iteration }}",
         max_tokens: 2, stream: false}
"""
        + DONE % "{{ steps.again.result }} {{ steps.again.iterations }}"
    ),
    "wait_timer": Flow(
        """
  - {id: rest, type: wait, seconds: 0.3, depends_on: [first]}
  - {id: last, type: transform, function: template, template: "{{ steps.first.text }}",
     depends_on: [rest]}
"""
    ),
    "wait_signal": Flow(
        "  - {id: hear, type: wait, signal: go, depends_on: [first]}\n"
        + DONE % "{{ steps.hear.payload.word }}",
        signals=(("go", {"word": "now"}),),
    ),
    "approval": Flow(
        "  - {id: gate, type: approval, form: {why: string}, depends_on: [first]}\n"
        + DONE % "{{ steps.gate.form.why }} {{ steps.gate.by }}",
        signals=(
            ("approval:gate", {"approved": True, "form": {"why": 7}, "by": "bob"}),
            ("approval:gate", {"approved": True, "form": {"why": "good"}, "by": "ann"}),
        ),
    ),
    "child": Flow(
        "  - {id: sub, type: workflow, workflow: crash_inner,"
        ' inputs: {word: "{{ steps.first.text }}"}}\n' + DONE % "{{ steps.sub.output.said }}",
        child="""
name: crash_inner
inputs: {word: {type: string}}
steps:
  - {id: inner, type: llm, provider: openai, model: fake, prompt: "In {{ inputs.word }}",
     max_tokens: 2, stream: false}
outputs: {said: {value: "{{ steps.inner.text }}"}}
""",
    ),
    "python": Flow(
        """
  - {id: call, type: python, function: "tests.acceptance.crash.flows:effect",
     args: {word: "{{ steps.first.text }}"}}
"""
        + DONE % "{{ steps.call.result }}",
        choose="retry",
        once=("call",),
    ),
}


def text_of(name: str) -> str:
    """The whole file of a flow."""
    return HEAD % f"crash_{name}" + FLOWS[name].text + OUTPUTS


def effect(word: str, context: Any) -> str:
    """A step of somebody's own."""
    WITNESS.did(context.idempotency_key)
    return word.upper()


def was_posted(context: Any) -> Any:
    """Ask the receiver whether it has seen this step's key."""
    key = context.idempotency_key.removesuffix("/probe")
    with urllib.request.urlopen(f"{WITNESS.url}/control/ledger") as response:
        keys = [line.get("idempotency_key") for line in json.load(response)]
    return {"status": 200} if key in keys else None


# -- in Python ------------------------------------------------------------------------------------


@step
async def plain(ctx_run_id: str, word: str) -> str:
    WITNESS.hit(f"before plain-{word}")
    WITNESS.did(f"{ctx_run_id}/plain-{word}")
    WITNESS.hit(f"after plain-{word}")
    return word.upper()


@step(effect="once", on_unknown="retry")
async def careful(ctx_run_id: str) -> str:
    WITNESS.hit("before careful")
    WITNESS.did(f"{ctx_run_id}/careful")
    WITNESS.hit("after careful")
    return "careful"


@workflow(name="crash_code_inner")
async def inner(ctx: Context, word: str) -> str:
    return await ctx.step(plain.named("plain-inner"), ctx.run_id, "inner") + word


@workflow(name="crash_code")
async def code(ctx: Context, **inputs: str) -> dict[str, Any]:
    free = [ctx.now().isoformat(), ctx.random(), ctx.uuid()]
    both = await ctx.gather(
        ctx.step(plain.named("plain-a"), ctx.run_id, "a"),
        ctx.step(plain.named("plain-b"), ctx.run_id, "b"),
    )
    await ctx.sleep(0.2)
    word = await ctx.wait_signal("go")
    once = await ctx.step(careful, ctx.run_id)
    child = await ctx.run(inner, word="!")
    return {"free": free, "fixed": [both, word, once, child]}


FLOWS["code"] = Flow(
    code=code,
    signals=(("go", "hear"),),
    once=("careful",),
    repeats_allowed=1,
)
