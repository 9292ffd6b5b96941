"""Templates and expressions: the only module that knows the template engine (minijinja).

`render` works on JSON: text that is exactly one `{{ expression }}` becomes the expression's own
value, other text becomes text. Strict: what is not there is an error that names it and its nearest
neighbour. A file's author is trusted, a value is not: values are never read as templates, never
enter an expression's text, and cannot be changed by one. Invariant: what is handed in as `names` is
the same afterwards, because expressions see a copy of just the parts that they mention (the engine
can call methods of a dict, `{{ steps.a.pop("x") }}`, and those must not reach a run's state).

What is certainly little work (cost.py) runs in this process, the rest in a child that is killed
when it takes too much (sandbox.py). So no text and no value holds a process up or costs it its
memory.

In text, null shows as nothing, true and false in lower case, lists and mappings as JSON.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import OrderedDict
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import minijinja

from llm_orchestrator.errors import TemplateError
from llm_orchestrator.language import lexer, names, sandbox
from llm_orchestrator.language.cost import Cost, cost_of
from llm_orchestrator.language.lexer import is_template
from llm_orchestrator.model import Json

FUEL = 200_000
TEMPLATE_LENGTH_MAX = 100_000
EXPRESSION_LENGTH_MAX = 20_000
BLOCK_TOKENS_MAX = 4_000
ELIF_MAX = 500
"""More than this, chained in each other, would run the engine out of its stack."""
CACHED_TEXTS_MAX = 2_000
_BLOCKS = frozenset({"{{", "{%"})

REMOVED_FILTERS = ("format", "indent", "batch", "slice", "attr", "pprint", "filesizeformat")
_FILTERS = """
abs bool capitalize chain count d default dictsort e escape first float groupby int items join last
length lines list lower map max min pluralize reject rejectattr replace reverse round safe select
selectattr sort split string striptags sum title tojson trim truncate unique upper urlencode
wordwrap zip
"""
FILTERS = frozenset(_FILTERS.split())
FUNCTIONS = frozenset({"range", "dict", "namespace"})
_FORBIDDEN = re.compile(r"\{%[-+]?\s*(include|import|from|extends|block|call)\b")
_GUARD = re.compile(r"\b(if|else|and|or|default|d|defined|undefined)\b")
_FALSE = frozenset({"", "false", "0", "no"})


class _Undefined(Exception):
    """An expression that came to nothing; the text is the engine's word, or empty."""


class _Compiled(NamedTuple):
    """What is known of one text: a lone path, an expression, or a template."""

    text: str
    paths: tuple[names.Path, ...]
    plan: names.Plan
    path: names.Path | None = None
    expression: str | None = None
    is_checked: bool = False
    """True: every path must be there; inside a list nobody else would notice that it is not."""
    cost: Cost = Cost()


class Templates:
    """Renders and evaluates. Keeps compiled texts, nothing of any run; use one per process."""

    def __init__(self) -> None:
        self._engines: dict[int, _Engine] = {}
        self._parser = _Engine(FUEL)
        self._texts: OrderedDict[tuple[str, bool], _Compiled] = OrderedDict()

    def render(self, value: Json, scope: Mapping[str, Json]) -> Json:
        """`value` with each template in it rendered once; keys and other values stay."""
        if isinstance(value, str):
            return self._render_text(value, scope) if is_template(value) else value
        if isinstance(value, Mapping):
            return {key: self.render(item, scope) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.render(item, scope) for item in value]
        return value

    def evaluate(self, expression: str, scope: Mapping[str, Json]) -> Json:
        """The value of an expression (no braces), with its own type."""
        return self._evaluate(self._compile(expression, is_expression=True), scope)

    def is_true(self, expression: str, scope: Mapping[str, Json]) -> bool:
        """Whether a condition holds; see the function `is_true`."""
        return is_true(self.evaluate(expression, scope))

    def references(self, text: str, *, is_expression: bool = False) -> set[names.Path]:
        """The paths that a template (or an expression) takes from outside itself."""
        return set(self._compile(text, is_expression=is_expression).paths)

    def copy_used(self, expression: str, scope: Mapping[str, Json]) -> dict[str, Json]:
        """A copy of just the names that an expression uses, for evaluating it later."""
        return names.prune(self._compile(expression, is_expression=True).plan, scope)

    def check(self, text: str, *, is_expression: bool = False) -> str | None:
        """Why the text cannot be used, or None."""
        try:
            compiled = self._compile(text, is_expression=is_expression)
            if compiled.expression is not None and compiled.path is None:
                self._parse(text, "{{ " + (compiled.expression or "-") + "\n}}")
        except TemplateError as error:
            return error.message
        return _check_filters(text, is_expression=is_expression)

    def _render_text(self, text: str, scope: Mapping[str, Json]) -> Json:
        return self._evaluate(self._compile(text, is_expression=False), scope)

    def _evaluate(self, compiled: _Compiled, scope: Mapping[str, Json]) -> Json:
        if compiled.path is not None:
            return names.copy(_look_up(compiled, scope))
        if compiled.is_checked and names.explain_missing(compiled.paths, scope):
            raise _missing(compiled, scope, None)
        seen = names.prune(compiled.plan, scope)
        try:
            fuel = compiled.cost.fuel(seen)
            if not fuel:
                return _ask(compiled, seen)
            engine = self._engines.get(fuel)
            if engine is None:
                engine = self._engines[fuel] = _Engine(fuel)
            return engine.run(compiled, seen)
        except minijinja.TemplateError as error:
            if error.kind == "OutOfFuel":
                return self._evaluate(compiled._replace(cost=Cost()), scope)
            if error.kind == "UndefinedError":
                raise _missing(compiled, scope, error.detail) from error
            raise _failed(compiled, error.detail or error.message) from error
        except _Undefined as error:
            raise _missing(compiled, scope, str(error)) from error
        except Exception as error:
            raise _failed(compiled, str(error)) from error
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            raise TemplateError(f"template {_short(compiled.text)} is too much") from error

    def _compile(self, text: str, *, is_expression: bool) -> _Compiled:
        key = (text, is_expression)
        found = self._texts.get(key)
        if found is None:
            self._texts[key] = found = self._compile_new(text, is_expression=is_expression)
            if len(self._texts) > CACHED_TEXTS_MAX:
                _, old = self._texts.popitem(last=False)
                for engine in tuple(self._engines.values()):
                    engine.forget(old.text)
        else:
            try:
                self._texts.move_to_end(key)
            except KeyError:  # another thread has just dropped it
                return found
        return found

    def _compile_new(self, text: str, *, is_expression: bool) -> _Compiled:
        limit = EXPRESSION_LENGTH_MAX if is_expression else TEMPLATE_LENGTH_MAX
        if len(text) > limit:
            raise TemplateError(f"{_short(text)} is longer than {limit} characters")
        if not is_expression and _FORBIDDEN.search(text):
            raise TemplateError(f"{_short(text)} uses a statement that workflows do not have")
        expression = text.strip() if is_expression else _only_expression(text)
        source = text if expression is None else "{{ (" + expression + "\n) }}"
        paths = self._read_paths(text, source)
        path = None if expression is None else _only_path(expression)
        plan, is_checked = names.make_plan(paths), not _GUARD.search(text)
        return _Compiled(text, paths, plan, path, expression, is_checked, cost_of(source))

    def _parse(self, text: str, source: str) -> set[str]:
        """The names that a source takes from outside. Raises TemplateError."""
        try:
            return self._parser.names(source)
        except minijinja.TemplateError as error:
            detail = error.detail or error.message
            raise TemplateError(f"does not parse: {detail} in {_short(text)}") from error

    def _read_paths(self, text: str, source: str) -> tuple[names.Path, ...]:
        """Every path of the source whose first name is not its own (a loop's variable is)."""
        blocks = [
            lexer.tokens(piece.inner) for piece in lexer.split(source) if piece.opening in _BLOCKS
        ]
        if max(map(len, blocks), default=0) > BLOCK_TOKENS_MAX:
            raise TemplateError(
                f"{_short(text)} has more than {BLOCK_TOKENS_MAX} words and signs in one block"
            )
        if text.count("elif") > ELIF_MAX:
            raise TemplateError(f"{_short(text)} has more than {ELIF_MAX} elif")
        roots = self._parse(text, source)
        found = {
            path.parts: None
            for items in blocks
            for path in lexer.paths(items)
            if path.parts[0] in roots
        }
        seen = {path[0] for path in found}
        found.update({(root,): None for root in roots if root not in seen})
        return tuple(path for path in found if len(path) > 1 or path[0] not in FUNCTIONS)


class _Engine:
    """The template engine with so much fuel for each text. It bounds nothing else."""

    def __init__(self, fuel: int) -> None:
        env = minijinja.Environment(
            undefined_behavior="strict", fuel=fuel, finalizer=_show, keep_trailing_newline=True
        )
        for name in ("debug", "cycler", "joiner"):
            env.remove_global(name)
        for name in REMOVED_FILTERS:
            env.remove_filter(name)
        env.add_filter("tojson", _tojson)
        self._env = env
        self._templates: dict[str, str] = {}
        self._count = itertools.count()

    def names(self, source: str) -> set[str]:
        """The names that a source takes from outside. Raises what the engine raises.

        The engine works constants out as it parses; without `*` they stay as small as the source.
        """
        return set(self._env.undeclared_variables_in_str(source.replace("*", " - ")))

    def run(self, compiled: _Compiled, seen: dict[str, Json]) -> Json:
        """Raises what the engine raises, or _Undefined."""
        expression = compiled.expression
        if expression is None:
            return str(self._env.render_template(self._template(compiled.text), **seen))
        value = self._env.eval_expr(expression, **seen)
        if value is None and self._env.eval_expr(f"({expression}\n) is undefined", **seen):
            raise _Undefined
        return names.to_json(value)

    def forget(self, text: str) -> None:
        """Drop what was kept of a template."""
        if name := self._templates.pop(text, ""):
            self._env.remove_template(name)

    def _template(self, text: str) -> str:
        name = self._templates.get(text)
        if name is None:
            name = f"t{next(self._count)}"
            self._env.add_template(name, text)
            self._templates[text] = name
        return name


def answer(question: Mapping[str, Any]) -> Json:
    """In the child: {"value"}, {"undefined"} or {"error"}."""
    compiled = _Compiled(question["text"], (), {}, expression=question["expression"])
    engine = _child_engine()
    try:
        return {"value": engine.run(compiled, question["names"])}
    except _Undefined as error:
        return {"undefined": str(error)}
    except minijinja.TemplateError as error:
        if error.kind == "UndefinedError":
            return {"undefined": error.detail or ""}
        return {"error": error.detail or error.message}
    except Exception as error:  # noqa: BLE001 (it is told as it is)
        return {"error": str(error)}
    finally:
        engine.forget(compiled.text)


@cache
def _child_engine() -> _Engine:
    return _Engine(FUEL)


def _ask(compiled: _Compiled, seen: dict[str, Json]) -> Json:
    """Run it in a child."""
    question: dict[str, Json] = {"text": compiled.text, "expression": compiled.expression}
    said = sandbox.ask(f"{__name__}:answer", {**question, "names": seen})
    if "undefined" in said:
        raise _Undefined(said["undefined"])
    if "error" in said:
        raise TemplateError(said["error"])
    return said["value"]


def is_true(value: Json) -> bool:
    """Whether a value counts as yes. Text counts as no when it is empty, false, 0 or no."""
    if isinstance(value, str):
        return value.strip().lower() not in _FALSE
    return bool(value)


def _only_expression(text: str) -> str | None:
    """The expression of a text that is nothing but one `{{ expression }}`."""
    pieces = lexer.split(text.strip())
    if len(pieces) == 1 and pieces[0].opening == "{{" and pieces[0].text.endswith("}}"):
        return pieces[0].inner.strip()
    return None


def _only_path(expression: str) -> names.Path | None:
    items = lexer.tokens(expression)
    path = next(lexer.paths(items), None)
    return path.parts if path and (path.start, path.end) == (0, len(items)) else None


def _look_up(compiled: _Compiled, scope: Mapping[str, Json]) -> Json:
    value: Any = scope
    for part in compiled.path or ():
        is_there, value = names.step_into(value, part)
        if not is_there:
            raise _missing(compiled, scope, None)
    return value


def _show(value: Any) -> str:
    """How a value looks inside text."""
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(names.to_json(value), ensure_ascii=False)


def _tojson(value: Any, indent: int | None = None) -> str:
    """The filter `tojson`; the engine's own can be made to exhaust the memory by its indent."""
    width = min(max(int(indent), 0), 8) if indent else None
    return json.dumps(names.to_json(value), ensure_ascii=False, indent=width)


def _check_filters(text: str, *, is_expression: bool) -> str | None:
    """Filters that do not exist, which the engine would notice only when it gets there."""
    blocks = [text] if is_expression else [p.inner for p in lexer.split(text) if p.opening]
    for block in blocks:
        items = [token for token in lexer.tokens(block) if token.kind != "space"]
        for before, token in itertools.pairwise(items):
            if before.text == "|" and token.kind == "name" and token.text not in FILTERS:
                hint = names.nearest(token.text, FILTERS)
                return f"unknown filter `{token.text}` in {_short(text)}{hint}"
    return None


def _failed(compiled: _Compiled, detail: str) -> TemplateError:
    return TemplateError(f"template {_short(compiled.text)} failed: {detail}")


def _missing(compiled: _Compiled, scope: Mapping[str, Json], detail: str | None) -> TemplateError:
    """The error for a name that is not there."""
    named = re.match(r"`(.+)` is undefined", detail or "")
    paths = list(compiled.paths)
    if named:
        paths.sort(key=lambda path: not ".".join(path).startswith(named.group(1)))
    what = names.explain_missing(paths, scope)
    if what is None:
        what = f"`{named.group(1)}` is not there" if named else "something it names is not there"
    return TemplateError(f"template {_short(compiled.text)}: {what}")


def _short(text: str, limit: int = 80) -> str:
    flat = " ".join(text.split())
    return f"`{flat if len(flat) <= limit else flat[: limit - 3] + '...'}`"
