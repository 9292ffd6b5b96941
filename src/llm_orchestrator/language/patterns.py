"""Regular expressions of workflow files: looked for here if that is surely quick, else in a child.

Python's engine tries every way of matching, which can be more ways than anybody waits for. Without
repeated groups there are at most about len(text) ** (repeats + 1); what may be more runs in a child
process that is killed when it takes too long (sandbox.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llm_orchestrator.errors import AuthorError
from llm_orchestrator.language import sandbox
from llm_orchestrator.language.sandbox import TooMuch
from llm_orchestrator.model import Json

INPUT_CPU_S_MAX = 0.1
"""For one input: who starts a run waits for it."""
_LENGTH_MAX = 100
_TRIES_MAX = 20_000_000
_FLAGS = re.compile(r"\(\?-?[aiLmsux]")
_ATOM = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_REPEATED_GROUP = re.compile(r"\)[*+?{]")
_CHOICE = re.compile(r"(?<!\()[*+?{|]|\(\?P=")
_REFERENCE = re.compile(r"\\[1-9]")


def is_light(pattern: str, length: int) -> bool:
    """True if looking for the pattern in that many characters is surely little work."""
    if len(pattern) > _LENGTH_MAX or _FLAGS.search(pattern):
        return False
    bare = _ATOM.sub("c", pattern)
    if _REPEATED_GROUP.search(bare):
        return False
    choices = len(_CHOICE.findall(bare)) + len(_REFERENCE.findall(pattern))
    return bool(len(pattern) * (length + 2) ** (choices + 1) <= _TRIES_MAX)


def find(
    pattern: str, text: str, *, group: Json = None, is_all: bool = False,
    cpu_s: float = sandbox.CPU_S_MAX,
) -> list[str | None]:  # fmt: skip
    """The first match or all, each as its `group` (None: group 1, or all of it without groups).

    Raises AuthorError for a pattern that is none, that lacks the group, or that takes too long.
    """
    question = {"pattern": pattern, "text": text, "group": group, "is_all": is_all}
    try:
        if is_light(pattern, len(text)):
            said = answer(question)
        else:
            said = sandbox.ask(f"{__name__}:answer", question, cpu_s=cpu_s)
    except TooMuch as error:
        raise AuthorError(
            f"looking for it in {len(text)} characters is too much: {error.message}",
            hint="repeat no groups that hold repeats themselves, as (a+)+ does",
        ) from error
    if "error" in said:
        raise AuthorError(said["error"])
    found: list[str | None] = said["found"]
    return found


def answer(question: Mapping[str, Any]) -> Json:
    """Look for it here: {"found"} or {"error"}."""
    try:
        pattern = re.compile(question["pattern"])
    except (re.error, OverflowError, RecursionError) as error:
        return {"error": f"it is no regular expression: {error}"}
    group = question["group"]
    if group is None:
        group = 1 if pattern.groups else 0
    if group not in pattern.groupindex and group not in range(pattern.groups + 1):
        return {"error": f"it has no group {group!r}"}
    found = []
    for match in pattern.finditer(question["text"]):
        found.append(match[group])
        if not question["is_all"]:
            break
    return {"found": found}
