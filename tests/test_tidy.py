"""The house style (STYLE.md) as an ordinary test.

A rule is a function from one file to its complaints. Each rule has, at the bottom, an example of
what it must complain about: a rule that cannot fail is a defect. Layers are import-linter's matter
(pyproject.toml), everything else about a single line is ruff's.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "src/llm_orchestrator/"

FILE_LINES_MAX = 600
FILE_LINES_THINK = 400
FUNCTION_LINES_MAX = 70
FUNCTION_LINES_P90 = 31
CLASS_LINES_MAX = 300
PUBLIC_METHODS_MAX = 15
POSITIONAL_MAX = 3
COLUMNS_MAX = 100

CLOCK_MODULES = {"random", "secrets", "time", "uuid"}
DATABASE_DRIVERS = {"aiosqlite", "asyncpg", "psycopg", "psycopg2", "sqlite3"}
WEB_FRAMEWORKS = {"aiohttp.web", "fastapi", "flask", "starlette", "uvicorn"}
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
# The folders of a person or of one machine, which no file of ours may name.
HOMES = re.compile(r"(?<![\w.}*-])/(?:home|r[o]ot|U[s]ers|w[o]rk)/\w")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One file: its path below the repository, with slashes, and its text."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree; an empty one for a file that is not Python."""
        return ast.parse(self.text if self.is_python else "", self.path)

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @property
    def is_python(self) -> bool:
        return self.path.endswith(".py")

    @property
    def in_package(self) -> str:
        """The path of a module below the package; "" for any other file."""
        if not (self.is_python and self.path.startswith(PACKAGE)):
            return ""
        return self.path.removeprefix(PACKAGE)

    def is_in(self, *places: str) -> bool:
        """Whether the file is one of `places` (folders end with a slash) of the package."""
        return any(
            self.in_package.startswith(place) if place.endswith("/") else self.in_package == place
            for place in places
        )

    def functions(self) -> Iterator[Function]:
        return (n for n in ast.walk(self.tree) if isinstance(n, Function))

    def classes(self) -> Iterator[ast.ClassDef]:
        return (n for n in ast.walk(self.tree) if isinstance(n, ast.ClassDef))

    def imports(self) -> Iterator[tuple[int, str]]:
        """Line and dotted name of everything that is imported, lazily or not."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


Complaints = Iterator[tuple[int, str]]
Rule = Callable[[Source], Complaints]


def length(node: Function | ast.ClassDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def is_within(name: str, modules: set[str]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


# --- size and shape ---


def file_is_short(source: Source) -> Complaints:
    if source.is_python and len(source.lines) > FILE_LINES_MAX:
        yield 1, f"{len(source.lines)} lines, at most {FILE_LINES_MAX}: is there a second idea?"


def lines_are_narrow(source: Source) -> Complaints:
    for number, line in enumerate(source.lines if source.is_python else [], 1):
        if len(line) > COLUMNS_MAX:
            yield number, f"{len(line)} columns, at most {COLUMNS_MAX}"


def functions_are_short(source: Source) -> Complaints:
    for node in source.functions():
        if length(node) > FUNCTION_LINES_MAX:
            yield node.lineno, f"{node.name} has {length(node)} lines, max {FUNCTION_LINES_MAX}"


def classes_are_small(source: Source) -> Complaints:
    for node in source.classes() if source.in_package else ():
        if length(node) > CLASS_LINES_MAX:
            yield node.lineno, f"class {node.name} has {length(node)} lines, max {CLASS_LINES_MAX}"
        public = [n for n in node.body if isinstance(n, Function) and is_public_method(n)]
        if len(public) > PUBLIC_METHODS_MAX:
            yield node.lineno, f"class {node.name} has {len(public)} public methods"


def is_public_method(node: Function) -> bool:
    decorators = {ast.unparse(d) for d in node.decorator_list}
    return not (node.name.startswith("_") or decorators & {"overload", "property"})


def arguments_have_names(source: Source) -> Complaints:
    if not source.in_package:
        return
    methods = {n for c in source.classes() for n in c.body if isinstance(n, Function)}
    for node in source.functions():
        if any(ast.unparse(each).startswith("router.") for each in node.decorator_list):
            continue  # a route is called by the framework, by names
        decorators = {d.id for d in node.decorator_list if isinstance(d, ast.Name)}
        count = len(node.args.posonlyargs) + len(node.args.args)
        count -= node in methods and "staticmethod" not in decorators
        if count > POSITIONAL_MAX:
            yield (
                node.lineno,
                f"{node.name} takes {count} arguments by position, max {POSITIONAL_MAX}",
            )


def module_says_what_it_is_for(source: Source) -> Complaints:
    if source.in_package and not ast.get_docstring(source.tree):
        yield 1, "the module has no docstring: what is it for, what must it never do?"


def init_only_re_exports(source: Source) -> Complaints:
    if not source.in_package.endswith("__init__.py"):
        return
    allowed: tuple[type[ast.stmt], ...] = (ast.Import, ast.ImportFrom)
    if source.in_package == "__init__.py":  # the root may be lazy
        allowed = (*allowed, ast.Assign, ast.If, ast.FunctionDef)
    for node in source.tree.body[1:]:
        if is_all(node):
            yield from all_is_sorted(node)
        elif not isinstance(node, allowed):
            yield node.lineno, "__init__.py is a docstring, imports and __all__, nothing else"


def is_all(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"


def all_is_sorted(node: ast.stmt) -> Complaints:
    names = ast.literal_eval(node.value) if isinstance(node, ast.Assign) else []
    # CONSTANTS, then Classes, then functions: the order that ruff (RUF022) writes.
    order = sorted(names, key=lambda n: (not n.isupper(), not n[:1].isupper(), n))
    if names != order:
        yield node.lineno, f"__all__ is not sorted: {order}"


# --- one door for everything that is not decided by the journal ---


def only_clock_reads_time_and_chance(source: Source) -> Complaints:
    if not source.in_package or source.is_in("clock.py"):
        return
    for line, name in source.imports():
        if is_within(name, CLOCK_MODULES | {"os.urandom"}):
            yield line, f"{name}: time, chance and new ids come from a Clock (clock.py)"
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Attribute):
            continue
        owner = ast.unparse(node.value).rpartition(".")[2]
        if (owner in {"date", "datetime"} and node.attr in {"now", "today", "utcnow"}) or (
            owner == "os" and node.attr in {"getrandom", "urandom"}
        ):
            yield node.lineno, f"{owner}.{node.attr}: ask a Clock (clock.py)"


def only_clock_sleeps(source: Source) -> Complaints:
    """`sleep(0)` only gives way. Unit tests are held to it too: they inject, they do not wait.

    A fake plays the world outside, in a process of its own: its slowness is real.
    """
    if source.is_in("clock.py") or source.in_package.startswith("drill/fake_"):
        return
    if not (source.in_package or source.path.startswith("tests/unit/")):
        return
    for node in ast.walk(source.tree):
        if (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in {"asyncio.sleep", "time.sleep", "sleep"}
            and ast.unparse(node.args[0] if node.args else node.func) != "0"
        ):
            yield node.lineno, f"{ast.unparse(node)}: sleep on a Clock, that a test can advance"


def only_configuration_reads_the_environment(source: Source) -> Complaints:
    if not source.in_package or source.is_in("config.py", "security/secrets.py"):
        return
    for line, name in source.imports():
        if name in {f"os.{word}" for word in ENVIRONMENT}:
            yield line, f"{name}: only config.py and security/secrets.py read the environment"
    for node in ast.walk(source.tree):
        if (
            isinstance(node, ast.Attribute)
            and node.attr in ENVIRONMENT
            and ast.unparse(node.value) == "os"
        ):
            yield node.lineno, f"os.{node.attr}: take it from the one frozen Config"


def only_store_names_a_database_driver(source: Source) -> Complaints:
    """A drill's witness looks by itself, and its damage is done to the bytes: not by the store."""
    drill = ("drill/witness/eyes.py", "drill/single_damage.py")
    if source.in_package and not source.is_in("store/", *drill):
        for line, name in source.imports():
            if is_within(name, DATABASE_DRIVERS):
                yield line, f"{name}: a database driver never leaves store/"


def only_server_names_the_web_framework(source: Source) -> Complaints:
    fakes = ("drill/fake_llm.py", "drill/fake_pinecone.py", "drill/witness/receiver.py")
    if source.in_package and not source.is_in("server/", *fakes):
        for line, name in source.imports():
            if is_within(name, WEB_FRAMEWORKS):
                yield line, f"{name}: the web framework stays in server/"


# --- manners ---


def only_the_command_line_prints(source: Source) -> Complaints:
    if not source.in_package or source.is_in("cli/") or source.in_package.startswith("drill/fake_"):
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
            yield node.lineno, "print: a library returns, raises or logs"


def excepts_say_what(source: Source) -> Complaints:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield node.lineno, "bare except: name what you expect"


def nothing_is_left_for_later(source: Source) -> Complaints:
    for number, line in enumerate(source.lines if source.in_package else [], 1):
        if word := re.search(r"\b(TODO|FIXME|XXX)\b", line):
            yield number, f"{word[1]}: do it, or put it in an issue"


def no_path_of_one_machine(source: Source) -> Complaints:
    for number, line in enumerate(source.lines, 1):
        if found := HOMES.search(line):
            yield number, f"{found[0]}...: a path of one machine"


def requirements_name_no_address(source: Source) -> Complaints:
    if not source.path.startswith("requirements/"):
        return
    for number, line in enumerate(source.lines, 1):
        if "://" in line or re.match(r"\s*(-i|-f|--(extra-)?index-url|--find-links)\b", line):
            yield number, "an address of a package index: scripts/lock leaves them out"


RULES: tuple[Rule, ...] = (
    arguments_have_names,
    classes_are_small,
    excepts_say_what,
    file_is_short,
    functions_are_short,
    init_only_re_exports,
    lines_are_narrow,
    module_says_what_it_is_for,
    no_path_of_one_machine,
    nothing_is_left_for_later,
    only_clock_reads_time_and_chance,
    only_clock_sleeps,
    only_configuration_reads_the_environment,
    only_server_names_the_web_framework,
    only_store_names_a_database_driver,
    only_the_command_line_prints,
    requirements_name_no_address,
)


def percentile_90(values: list[int]) -> int:
    """By nearest rank; 0 of nothing."""
    return sorted(values)[-(-len(values) * 9 // 10) - 1] if values else 0


def complaints(source: Source) -> list[str]:
    found = [(line, message) for rule in RULES for line, message in rule(source)]
    return [f"{source.path}:{line}: {message}" for line, message in sorted(found)]


# --- the repository, judged ---


@pytest.fixture(scope="session")
def sources() -> list[Source]:
    """Every text file that is, or could be, committed."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    ).stdout.decode()
    found = []
    for path in sorted(filter(None, listed.split("\0"))):
        try:
            found.append(Source(path, (ROOT / path).read_text("utf-8")))
        except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError):
            continue  # deleted meanwhile, a link to a folder, or no text
    return found


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_repository_keeps(rule: Rule, sources: list[Source]) -> None:
    broken = [f"{s.path}:{line}: {message}" for s in sources for line, message in rule(s)]
    if broken:
        pytest.fail("\n".join(broken), pytrace=False)


def test_most_functions_are_short(
    sources: list[Source], capsys: pytest.CaptureFixture[str]
) -> None:
    package = [s for s in sources if s.in_package]
    lengths = [length(node) for s in package for node in s.functions()]
    long_files = [f"  {s.path}: {len(s.lines)}" for s in package if len(s.lines) > FILE_LINES_THINK]
    with capsys.disabled():
        print(f"\nfunctions: {len(lengths)}, 90 % have at most {percentile_90(lengths)} lines")
        if long_files:
            print(f"files over {FILE_LINES_THINK} lines, think about them:", *long_files, sep="\n")
    assert percentile_90(lengths) <= FUNCTION_LINES_P90


# --- the rules, judged: each complains about its bad example, and about nothing else ---


def in_package(path: str, code: str) -> Source:
    return Source(PACKAGE + path, f'"""What it is for."""\n\n{code}\n')


def lines_of(count: int, indent: str = "    ") -> str:
    return "\n".join(f"{indent}x = {n}" for n in range(count))


METHODS = "\n".join(f"    def m{n}(self): ..." for n in range(PUBLIC_METHODS_MAX + 1))
BAD: list[tuple[Rule, Source]] = [
    (arguments_have_names, in_package("a.py", "def f(a, b, c, d): ...")),
    (arguments_have_names, in_package("a.py", "class C:\n    def f(self, a, b, c, d): ...")),
    (classes_are_small, in_package("a.py", f"class C:\n{lines_of(CLASS_LINES_MAX)}")),
    (classes_are_small, in_package("a.py", f"class C:\n{METHODS}")),
    (excepts_say_what, in_package("a.py", "try: ...\nexcept: ...")),
    (file_is_short, in_package("a.py", lines_of(FILE_LINES_MAX, ""))),
    (functions_are_short, in_package("a.py", f"def f():\n{lines_of(FUNCTION_LINES_MAX)}")),
    (functions_are_short, Source("tests/a.py", f"async def f():\n{lines_of(FUNCTION_LINES_MAX)}")),
    (init_only_re_exports, in_package("engine/__init__.py", "x = 1")),
    (init_only_re_exports, in_package("engine/__init__.py", "__all__ = ['b', 'a']")),
    (init_only_re_exports, in_package("__init__.py", "__all__ = ['step', 'Context']")),
    (lines_are_narrow, in_package("a.py", "# " + "x" * COLUMNS_MAX)),
    (module_says_what_it_is_for, Source(PACKAGE + "a.py", "x = 1\n")),
    (no_path_of_one_machine, Source("README.md", "see /" + "home/someone/notes")),
    (nothing_is_left_for_later, in_package("a.py", "# TODO: later")),
    (only_clock_reads_time_and_chance, in_package("a.py", "import time")),
    (only_clock_reads_time_and_chance, in_package("a.py", "def f():\n    from uuid import uuid4")),
    (only_clock_reads_time_and_chance, in_package("a.py", "x = datetime.datetime.now()")),
    (only_clock_reads_time_and_chance, in_package("a.py", "x = os.urandom(8)")),
    (only_clock_sleeps, in_package("a.py", "await asyncio.sleep(0.1)")),
    (only_clock_sleeps, Source("tests/unit/test_a.py", "time.sleep(1)")),
    (only_configuration_reads_the_environment, in_package("a.py", "x = os.environ['X']")),
    (only_configuration_reads_the_environment, in_package("cli/a.py", "from os import getenv")),
    (only_server_names_the_web_framework, in_package("engine/a.py", "from aiohttp import web")),
    (only_store_names_a_database_driver, in_package("engine/a.py", "import sqlite3.dbapi2")),
    (only_the_command_line_prints, in_package("engine/a.py", "print(1)")),
    (requirements_name_no_address, Source("requirements/a.txt", "--index-url x")),
    (requirements_name_no_address, Source("requirements/a.txt", "a @ https" + "://host/a.whl")),
]
GOOD = [
    in_package("__init__.py", "__all__ = ['LIMIT', 'Context', 'step']\n\ndef __getattr__(n): ..."),
    in_package("a.py", "class C:\n    def f(self, a, b, c, *, d): ..."),
    in_package("a.py", "import datetime\nimport llm_orchestrator.security.secrets\nx = run.now()"),
    in_package("a.py", "await asyncio.sleep(0)\nawait clock.sleep(1)"),
    in_package("cli/a.py", "print(1)"),
    in_package("drill/fake_llm.py", "await asyncio.sleep(1)"),
    in_package("clock.py", "import time\nimport uuid\nx = os.urandom(8)"),
    in_package("config.py", "x = os.environ['X']"),
    in_package("server/a.py", "from aiohttp import web"),
    in_package("store/sqlite.py", "import sqlite3"),
    Source("README.md", "see /usr/share, .tools/" + "root/bin and https" + "://example.org"),
]


@pytest.mark.parametrize(("rule", "source"), BAD, ids=lambda x: getattr(x, "__name__", ""))
def test_rule_complains(rule: Rule, source: Source) -> None:
    assert list(rule(source))
    assert {r for r in RULES if list(r(source))} == {rule}


@pytest.mark.parametrize("source", GOOD, ids=lambda source: source.path)
def test_rules_leave_good_code_alone(source: Source) -> None:
    assert complaints(source) == []


def test_every_rule_is_proved() -> None:
    assert {rule for rule, _ in BAD} == set(RULES)


def test_percentile_is_by_nearest_rank() -> None:
    assert percentile_90([]) == 0
    assert percentile_90(list(range(1, 11))) == 9
    assert percentile_90([1] * 8 + [50, 60]) == 50
