"""The workflows that the clusters execute. Delays are the fake server's."""

from __future__ import annotations

from pathlib import Path

TALK = """\
name: talk
inputs: {number: {type: integer}, delay: {type: integer, default: 1000}}
steps:
  - {id: first, type: llm, provider: openai, model: fake, max_tokens: 2, stream: false,
     prompt: "First of {{ inputs.number }} [[fake: delay_ms={{ inputs.delay }}]]"}
  - {id: second, type: llm, provider: openai, model: fake, max_tokens: 2, stream: false,
     prompt: "Then {{ inputs.number }} {{ steps.first.text }}[[fake: delay_ms={{ inputs.delay }}]]"}
outputs: {said: {value: "{{ steps.first.text }}, {{ steps.second.text }}"}}
"""
DESK = """\
name: desk
inputs: {delay: {type: integer, default: 1500}}
steps:
  - {id: slow, type: llm, provider: openai, model: fake, max_tokens: 2, stream: false,
     prompt: "Slow [[fake: delay_ms={{ inputs.delay }}]]"}
  - {id: go, type: wait, signal: go}
  - {id: review, type: approval}
  - {id: last, type: llm, provider: openai, model: fake, max_tokens: 2, stream: false,
     depends_on: [slow, go, review], prompt: "Last {{ steps.go.payload.word }}"}
outputs: {said: {value: "{{ steps.last.text }}"}, approved: {value: "{{ steps.review.approved }}"}}
"""
PARENT = """\
name: parent
steps:
  - {id: child, type: workflow, file: desk.yaml, inputs: {delay: 20000}}
"""
FRAGILE = """\
name: fragile
inputs: {word: {type: string, default: first}}
steps:
  - {id: sound, type: llm, provider: openai, model: fake, max_tokens: 2, stream: false,
     prompt: "Sound"}
  - {id: frail, type: llm, provider: openai, model: fake, max_tokens: 2, stream: false,
     prompt: "Frail {{ steps.sound.text }} {{ inputs.word }} [[fake: status=400 times=1]]"}
outputs: {said: {value: "{{ steps.frail.text }}"}}
"""
POISON = """\
import os
import signal

from llm_orchestrator import Context, step, workflow


@step
async def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@workflow
async def poison(ctx: Context) -> None:
    await ctx.step(die)
"""
CALL = """\
name: NAME
queue: QUEUE
inputs: {number: {type: integer, default: 0}, delay: {type: integer, default: 100}}
steps:
  - {id: call, type: llm, provider: openai, model: fake, max_tokens: 2, stream: false,
     prompt: "NAME {{ inputs.number }} [[fake: delay_ms={{ inputs.delay }}]]"}
outputs: {said: {value: "{{ steps.call.text }}"}}
"""


def write_talk(folder: Path) -> Path:
    """Two calls, one after the other."""
    file = folder / "talk.yaml"
    file.write_text(TALK)
    return file


def write_call(folder: Path, name: str = "call", queue: str = "default", more: str = "") -> Path:
    """One call. `more`: top-level lines besides."""
    file = folder / f"{name}.yaml"
    file.write_text(CALL.replace("NAME", name).replace("QUEUE", queue) + more)
    return file


def write_control(folder: Path) -> None:
    """What people intervene in: desk.yaml, parent.yaml that calls it, fragile.yaml."""
    for name, text in {"desk": DESK, "parent": PARENT, "fragile": FRAGILE}.items():
        (folder / f"{name}.yaml").write_text(text)


def write_poison(folder: Path) -> Path:
    """A Python workflow whose step kills its process."""
    file = folder / "poison.py"
    file.write_text(POISON)
    return file
