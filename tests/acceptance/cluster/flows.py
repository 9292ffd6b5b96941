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
     prompt: "Second of {{ inputs.number }}, {{ steps.first.text }} [[fake: delay_ms={{ inputs.delay }}]]"}
outputs: {said: {value: "{{ steps.first.text }}, {{ steps.second.text }}"}}
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
