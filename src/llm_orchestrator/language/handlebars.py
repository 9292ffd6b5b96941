"""Turns the Handlebars of the earlier system's files into our own template syntax, at load.

Text in, text out; it never sees a value. What has no counterpart (partials, unknown helpers) is an
error, not a guess. Text without a Handlebars tag comes back unchanged, so new files never pass
through here in effect.

`{{#each xs}} {{@index}} {{this.f}} {{/each}}` becomes a `for`; inside, a name without a root of
ours is the item's, as in Handlebars. `{{#if x}}` holds when `x` is there and true, because that
is how earlier files ask for an optional input. A block tag alone on its line leaves no line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from llm_orchestrator.errors import TemplateError

ROOTS = frozenset({"inputs", "input", "steps", "outputs", "run", "secrets"})

_HINT = re.compile(r"\{\{\{|\{\{~?\s*(?:[#/!^&>@]|else\b|this\b|\.\.?/|\.\s*\})")
_TAG = re.compile(r"\{\{\{(?P<raw>.*?)\}\}\}|\{\{(?P<tag>!--.*?--|[^{}]*?)\}\}", re.DOTALL)
_WORD = re.compile(r"\"[^\"]*\"|'[^']*'|[()]|[^\s()]+")
_LITERAL = re.compile(r"^(?:\".*\"|'.*'|-?\d+(?:\.\d+)?|true|false|null|none)$", re.DOTALL)
_OPERATORS = {
    "eq": "==", "ne": "!=", "gt": ">", "gte": ">=", "lt": "<", "lte": "<=", "and": "and",
    "or": "or",
}  # fmt: skip


@dataclass(slots=True)
class _Frame:
    """An open block. `item` is the loop's variable, empty for if and unless."""

    name: str
    item: str = ""
    key: str = "loop.index0"
    aliases: dict[str, str] = field(default_factory=dict)


def is_handlebars(text: str) -> bool:
    """True when the text has a tag that only Handlebars knows."""
    return _HINT.search(text) is not None


def translate(text: str) -> str:
    """The same template in our syntax. Raises TemplateError for what has no counterpart."""
    if not is_handlebars(text):
        return text
    return _Translator(text).run()


class _Translator:
    def __init__(self, text: str) -> None:
        self._text = text
        self._frames: list[_Frame] = []
        self._tags = [
            (m.start(), m.end(), (m["raw"] if m["raw"] is not None else m["tag"]).strip("~ \t\n"))
            for m in _TAG.finditer(text)
        ]

    def run(self) -> str:
        out: list[str] = []
        position = 0
        for number, (start, end, tag) in enumerate(self._tags):
            start_of_text, next_position = position, end
            if tag[:1] in {"#", "/", "!", "^"} or tag.split(" ")[0] == "else":
                start, next_position = self._swallow_line(start, end)
            out.append(self._text[start_of_text : max(start, start_of_text)])
            out.append(self._tag(number, tag))
            position = next_position
        if self._frames:
            raise TemplateError(f"`{{{{#{self._frames[-1].name}}}}}` is never closed")
        out.append(self._text[position:])
        return "".join(out)

    def _swallow_line(self, start: int, end: int) -> tuple[int, int]:
        """A block tag alone on its line takes the whole line with it."""
        line = self._text.rfind("\n", 0, start) + 1
        after = re.compile(r"[ \t]*(?:\n|\Z)").match(self._text, end)
        if self._text[line:start].strip(" \t") or after is None:
            return start, end
        return line, after.end()

    def _tag(self, number: int, tag: str) -> str:
        if tag.startswith("!"):
            return ""
        if tag.startswith(">"):
            raise TemplateError(f"partials (`{{{{{tag}}}}}`) are not supported")
        if tag.startswith("#"):
            return self._open(number, tag[1:].strip())
        if tag.startswith("/"):
            return self._close(tag[1:].strip())
        if tag.startswith("^"):
            return self._open(number, f"unless {tag[1:].strip()}")
        if tag == "else":
            return "{% else %}"
        if tag.startswith("else if "):
            return "{% elif " + self._condition(tag[8:]) + " %}"
        if "|" in tag or _LITERAL.match(tag):
            return "{{ " + tag + " }}"
        return "{{ " + self._expression(tag.lstrip("&").strip()) + " }}"

    def _open(self, number: int, tag: str) -> str:
        name, _, rest = tag.partition(" ")
        rest, _, names = rest.partition(" as |")
        if name in {"if", "unless"}:
            condition = self._condition(rest)
            self._frames.append(_Frame(name))
            return "{% if " + (condition if name == "if" else f"not ({condition})") + " %}"
        if name not in {"each", "with"}:
            raise TemplateError(f"unknown block `{{{{#{name}}}}}`")
        source = self._expression(rest)
        depth = len(self._frames) + 1
        aliases = names.rstrip("| ").split()
        frame = _Frame(name, item=aliases[0] if aliases else f"this_{depth}")
        head = "{% with " + f"{frame.item} = {source}" + " %}"
        if name == "each":
            if self._uses_key(number):
                frame.key = f"key_{depth}"
                head = "{% for " + f"{frame.key}, {frame.item} in {source}|items" + " %}"
            else:
                head = "{% for " + f"{frame.item} in {source}" + " %}"
            frame.aliases = {aliases[0]: frame.item} if aliases else {}
            if len(aliases) > 1:
                frame.aliases[aliases[1]] = frame.key
        self._frames.append(frame)
        return head

    def _close(self, name: str) -> str:
        if not self._frames or (self._frames[-1].name != name and name):
            raise TemplateError(f"`{{{{/{name}}}}}` closes nothing")
        return {"each": "{% endfor %}", "with": "{% endwith %}"}.get(
            self._frames.pop().name, "{% endif %}"
        )

    def _uses_key(self, number: int) -> bool:
        depth = 0
        for _, _, tag in self._tags[number + 1 :]:
            depth += tag.startswith("#each") - tag.startswith("/each")
            if depth < 0:
                return False
            if depth == 0 and "@key" in tag:
                return True
        return False

    def _condition(self, text: str) -> str:
        words = _WORD.findall(text)
        if len(words) == 1 and not _LITERAL.match(words[0]):
            path = self._path(words[0])
            return path if path.startswith("loop.") else f"({path} is defined and {path})"
        return self._expression(text)

    def _expression(self, text: str) -> str:
        words = _WORD.findall(text)
        if not words:
            raise TemplateError("an empty tag")
        value, rest = self._value(words)
        if rest:
            value, rest = self._call(words)
        if rest:
            raise TemplateError(f"cannot read `{text}`")
        return value

    def _value(self, words: list[str]) -> tuple[str, list[str]]:
        if words[0] != "(":
            return self._path(words[0]), words[1:]
        value, rest = self._call(words[1:])
        if rest[:1] != [")"]:
            raise TemplateError("a `(` is never closed")
        return value, rest[1:]

    def _call(self, words: list[str]) -> tuple[str, list[str]]:
        name, rest = words[0], words[1:]
        arguments: list[str] = []
        while rest and rest[0] != ")":
            value, rest = self._value(rest)
            arguments.append(value)
        if name in _OPERATORS and len(arguments) >= 2:
            return "(" + f" {_OPERATORS[name]} ".join(arguments) + ")", rest
        if name == "not" and len(arguments) == 1:
            return f"(not {arguments[0]})", rest
        if name == "len" and len(arguments) == 1:
            return f"({arguments[0]}|length)", rest
        if name == "lookup" and len(arguments) == 2:
            return f"{arguments[0]}[{arguments[1]}]", rest
        raise TemplateError(f"unknown helper `{name}`")

    def _path(self, text: str) -> str:
        if _LITERAL.match(text):
            return text
        frames = [frame for frame in self._frames if frame.item]
        while text.startswith("../"):
            text = text[3:]
            frames = frames[:-1]
        special = {"@index": "loop.index0", "@first": "loop.first", "@last": "loop.last"}
        if text in special and frames:
            return special[text]
        if text == "@key" and frames:
            return frames[-1].key
        if text.startswith("@root."):
            return _dotted(text[6:])
        if text.startswith("@"):
            raise TemplateError(f"`{text}` has no meaning here")
        item = frames[-1].item if frames else ""
        if text in {"this", "."} or text.startswith(("this.", "this/", "./")):
            if not item:
                raise TemplateError("`this` outside of `{{#each}}`")
            rest = re.sub(r"^(?:this|\.)[./]?", "", text)
            return f"{item}.{_dotted(rest)}" if rest else item
        root = re.split(r"[./\[]", text)[0]
        for frame in reversed(frames):
            if root in frame.aliases:
                return frame.aliases[root] + _dotted(text)[len(root) :]
        return _dotted(text) if root in ROOTS or not item else f"{item}.{_dotted(text)}"


def _dotted(path: str) -> str:
    """`a/b.[0].c` as `a.b[0].c`."""
    return re.sub(r"\.\[([^\]]+)\]", _index, path.replace("/", "."))


def _index(match: re.Match[str]) -> str:
    inside = match.group(1).strip("'\"")
    return f"[{inside}]" if inside.isdecimal() else f'["{inside}"]'
