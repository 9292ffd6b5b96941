"""Reads YAML or JSON text into plain data and remembers the line and column of every key.

Built on the parser's events, not on its constructors: nothing of Python's is ever made from a tag,
and a bomb is refused while it is read (size, depth, how much aliases unfold), before it is built.
Invariant: every mapping key is text, every scalar is null, boolean, integer, finite number or text,
as YAML 1.2's core schema reads them (`yes` is text).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import (
    AliasEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

BYTES_MAX = 1024 * 1024
DEPTH_MAX = 60
VALUES_MAX = 100_000
TEXT_SIZE = 20
"""So many characters count as one value more."""

_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^[-+]?\d{1,4000}$")
_BASED = re.compile(r"^0(?:o[0-7]{1,1000}|x[0-9a-fA-F]{1,1000})$")
_FLOAT = re.compile(r"^[-+]?(?:\.\d+|\d+(?:\.\d*)?)(?:[eE][-+]?\d+)?$")
_ODD_FLOAT = re.compile(r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$")
_CORE = "tag:yaml.org,2002:"


class SourceError(Exception):
    """The text is no usable YAML or JSON. Line and column count from 1; 0 means unknown."""

    def __init__(self, message: str, line: int = 0, column: int = 0) -> None:
        super().__init__(message)
        self.message = message
        self.line = line
        self.column = column


class Mark(NamedTuple):
    """A place in the text, counting from 1."""

    line: int
    column: int


@dataclass(slots=True)
class Source:
    """The data, and where each key and value of it stands."""

    data: Any
    size: int = 0
    """How many values it holds once aliases are unfolded; long texts count as several."""
    marks: dict[int, dict[str | int, tuple[Mark, Mark]]] = field(default_factory=dict)
    """By id of a container: key or index to the marks of the key and of the value."""

    def find(self, loc: tuple[str | int, ...]) -> Mark:
        """The place of `loc`: its key, or the nearest container that is there."""
        value, mark = self.data, Mark(1, 1)
        for part in loc:
            entry = self.marks.get(id(value), {}).get(part)
            if entry is None:
                break
            mark, value = entry[0], value[part]
        return mark


def read(content: bytes | str, *, is_json: bool = False, bytes_max: int = BYTES_MAX) -> Source:
    """Parse; raises SourceError, which says where and what."""
    text = _decode(content, bytes_max)
    if is_json or text.lstrip()[:1] == "{":
        text = _check_json(text, must=is_json)
    try:
        return _Composer().run(YAML(typ="safe", pure=True).parse(text))
    except MarkedYAMLError as error:
        raise _explain(error, text) from error
    except RecursionError as error:
        raise SourceError(f"nested deeper than {DEPTH_MAX}") from error
    except ValueError as error:
        raise SourceError(f"cannot be read as YAML: {error}") from error


def _decode(content: bytes | str, bytes_max: int) -> str:
    raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    if len(raw) > bytes_max:
        raise SourceError(f"larger than {bytes_max} bytes: a workflow file holds no data")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        column = len(before[before.rfind(b"\n") + 1 :].decode("utf-8", "replace")) + 1
        raise SourceError("not UTF-8", before.count(b"\n") + 1, column) from error
    bad = re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff]", text)
    if bad:
        line, column = _position(text, bad.start())
        raise SourceError(f"control character U+{ord(bad.group()):04X}", line, column)
    return text


def _position(text: str, offset: int) -> tuple[int, int]:
    return text.count("\n", 0, offset) + 1, offset - (text.rfind("\n", 0, offset) + 1) + 1


def _check_json(text: str, *, must: bool) -> str:
    """JSON's own error message where it is meant as JSON; tabs between tokens become blanks."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        if must or text.lstrip()[:2].rstrip() in {'{"', "{"}:
            raise SourceError(f"not valid JSON: {error.msg}", error.lineno, error.colno) from error
        return text
    except RecursionError as error:
        raise SourceError(f"nested deeper than {DEPTH_MAX}") from error
    return text.replace("\t", " ")


def _explain(error: MarkedYAMLError, text: str) -> SourceError:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark else (0, 0)
    lines = text.split("\n")
    if 0 < line <= len(lines) and "\t" in lines[line - 1][: len(lines[line - 1])]:
        indent = re.match(r"[ ]*\t", lines[line - 1])
        if indent or "\\t" in str(error.problem) or "tab" in str(error.problem):
            return SourceError("a tab character in the indentation: use blanks", line, column)
    problem = str(error.problem or error.context or "cannot be read")
    return SourceError(f"not valid YAML: {problem}", line, column)


class _Frame:
    """A container that is being filled."""

    __slots__ = ("anchor", "key", "key_mark", "mark", "marks", "merges", "size", "value")

    def __init__(self, value: Any, mark: Mark, anchor: str | None) -> None:
        self.value = value
        self.mark = mark
        self.anchor = anchor
        self.marks: dict[str | int, tuple[Mark, Mark]] = {}
        self.merges: list[dict[str, Any]] = []
        self.key: str | None = None
        self.key_mark = mark
        self.size = 1


class _Composer:
    def __init__(self) -> None:
        self._source = Source(None)
        self._stack: list[_Frame] = []
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._total = 0
        self._documents = 0

    def run(self, events: Iterator[Event]) -> Source:
        for event in events:
            if isinstance(event, NodeEvent):
                self._node(event)
            elif isinstance(event, MappingEndEvent | SequenceEndEvent):
                self._close()
        self._source.size = self._total
        return self._source

    def _node(self, event: Any) -> None:
        mark = Mark(event.start_mark.line + 1, event.start_mark.column + 1)
        if not self._stack:
            self._documents += 1
            if self._documents > 1:
                raise SourceError("more than one document in the file", *mark)
        if isinstance(event, AliasEvent):
            if event.anchor not in self._anchors:
                raise SourceError(f"alias *{event.anchor} has no anchor here", *mark)
            value, size = self._anchors[event.anchor]
            self._add(value, mark, size)
        elif isinstance(event, ScalarEvent):
            is_key = bool(self._stack) and self._wants_key()
            value = event.value if is_key else _scalar(event, mark)
            size = 1 + len(event.value) // TEXT_SIZE
            if event.anchor:
                self._anchors[event.anchor] = (value, size)
            self._add(value, mark, size)
        else:
            self._open(event, mark)

    def _wants_key(self) -> bool:
        top = self._stack[-1]
        return isinstance(top.value, dict) and top.key is None

    def _open(self, event: MappingStartEvent | SequenceStartEvent, mark: Mark) -> None:
        if self._stack and self._wants_key():
            raise SourceError('a key must be plain text; quote a template: "{{ ... }}"', *mark)
        if len(self._stack) >= DEPTH_MAX:
            raise SourceError(f"nested deeper than {DEPTH_MAX}", *mark)
        expected = "map" if isinstance(event, MappingStartEvent) else "seq"
        tag = str(event.tag) if event.tag else ""
        if tag and tag not in {f"{_CORE}{expected}", "!"}:
            raise SourceError(f"the tag {tag} is not allowed", *mark)
        value: Any = {} if isinstance(event, MappingStartEvent) else []
        self._stack.append(_Frame(value, mark, event.anchor))

    def _close(self) -> None:
        frame = self._stack.pop()
        for merged in frame.merges:
            for key, value in merged.items():
                if key not in frame.value:
                    frame.value[key] = value
                    frame.marks[key] = (frame.mark, frame.mark)
        self._source.marks[id(frame.value)] = frame.marks
        if frame.anchor:
            self._anchors[frame.anchor] = (frame.value, frame.size)
        self._total -= frame.size - 1  # counted again with the frame
        self._add(frame.value, frame.mark, frame.size)

    def _add(self, value: Any, mark: Mark, size: int) -> None:
        self._total += size
        if self._total > VALUES_MAX:
            raise SourceError(
                f"more than {VALUES_MAX} values, or too much text, once aliases are unfolded", *mark
            )
        if not self._stack:
            self._source.data = value
            return
        top = self._stack[-1]
        top.size += size
        if isinstance(top.value, list):
            top.marks[len(top.value)] = (mark, mark)
            top.value.append(value)
        elif top.key is None:
            self._key(top, value, mark)
        else:
            self._item(top, value, mark)

    def _key(self, top: _Frame, value: Any, mark: Mark) -> None:
        if not isinstance(value, str):
            raise SourceError("a key must be plain text", *mark)
        if value in top.value:
            first = top.marks[value][0]
            raise SourceError(f"duplicate key `{value}` (first in line {first.line})", *mark)
        top.key, top.key_mark = value, mark

    def _item(self, top: _Frame, value: Any, mark: Mark) -> None:
        key, top.key = top.key, None
        if key == "<<":
            sources = value if isinstance(value, list) else [value]
            if not all(isinstance(source, dict) for source in sources):
                raise SourceError("`<<` merges mappings only", *mark)
            top.merges.extend(sources)
            return
        assert key is not None
        top.value[key] = value
        top.marks[key] = (top.key_mark, mark)


def _scalar(event: ScalarEvent, mark: Mark) -> Any:
    text = event.value
    tag = str(event.tag) if event.tag else ""
    if tag and tag != "!":
        kind = tag.removeprefix(_CORE)
        if kind not in {"str", "int", "float", "bool", "null"} or kind == tag:
            raise SourceError(f"the tag {tag} is not allowed", *mark)
        if kind == "str":
            return _repair(text)
    elif event.style or tag == "!":
        return _repair(text)
    if _NULL.match(text):
        return None
    if _BOOL.match(text):
        return text.lower() == "true"
    if _INT.match(text):
        return int(text)
    if _BASED.match(text):
        return int(text, 0)
    if _ODD_FLOAT.match(text) or (_FLOAT.match(text) and not math.isfinite(float(text))):
        raise SourceError(f"{text} is no number that JSON knows; quote it if it is text", *mark)
    return float(text) if _FLOAT.match(text) else _repair(text)


def _repair(text: str) -> str:
    """Join the surrogate pairs that JSON's escapes spell; a lone one is kept."""
    if not any("\ud800" <= char <= "\udfff" for char in text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
