"""The child processes: what kills them, what survives that, and that none is left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llm_orchestrator.language import patterns, sandbox
from llm_orchestrator.language.sandbox import TooMuch, aside
from llm_orchestrator.language.templates import Templates

HEAVY = "{% set x = n %}{{ x }}"
ECHO = "builtins:list"
TEMPLATE = "llm_orchestrator.language.templates:answer"


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Children of this test's own."""
    own = sandbox._Children()  # which processes live is what is tested
    monkeypatch.setattr(sandbox, "_children", own)
    yield own
    own.close()
    own.threads.shutdown()


def pid(children: Any) -> int:
    (child,) = children._free
    return int(child._process.pid)


def test_a_child_is_kept_for_the_next_question_and_closed_in_the_end(children: Any) -> None:
    assert sandbox.ask(ECHO, [1]) == [1]
    first = pid(children)
    assert sandbox.ask(ECHO, [2]) == [2]
    assert pid(children) == first
    sandbox.close()
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    assert sandbox.ask(ECHO, [3]) == [3]


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_that_somebody_killed_is_replaced(children: Any, kill: signal.Signals) -> None:
    sandbox.ask(ECHO, [1])
    first = pid(children)
    os.kill(first, kill)
    assert sandbox.ask(ECHO, [2]) == [2]
    assert pid(children) != first


def test_a_question_that_kills_its_child_is_asked_once(
    children: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[object] = []
    take = children._take

    def counted() -> object:
        begun.append(1)
        return take()

    monkeypatch.setattr(children, "_take", counted)
    question = {"pattern": "(a+)+$", "text": "a" * 50 + "b", "group": None, "is_all": False}
    with pytest.raises(TooMuch, match=r"more than 0\.1 s"):
        sandbox.ask("llm_orchestrator.language.patterns:answer", question, cpu_s=0.1)
    assert len(begun) == 1
    assert children._free == []


def test_memory_is_bounded_and_so_are_messages(children: Any) -> None:
    with pytest.raises(TooMuch, match="512 MiB of memory"):
        sandbox.ask(TEMPLATE, _question(f"[{'x * 100000000, ' * 7}] | join | length"), cpu_s=20)
    with pytest.raises(TooMuch, match="works on more than 16 MiB"):
        sandbox.ask(ECHO, ["a" * (16 << 20)])
    with pytest.raises(TooMuch, match="16 MiB of text"):
        sandbox.ask(TEMPLATE, _question("x ~ x", "a" * (10 << 20)))


def _question(expression: str, x: str = "a") -> dict[str, object]:
    return {"text": expression, "expression": expression, "names": {"x": x}}


def test_threads_share_the_children(children: Any) -> None:
    templates = Templates()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: templates.render(HEAVY, {"n": n}), range(200)))
    assert found == [str(n) for n in range(200)]
    assert 1 <= len(children._free) <= sandbox.CHILDREN_MAX


async def test_a_coroutine_goes_on_while_a_child_works(
    children: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer comes only after the event loop has said so: blocked, it never would."""
    may_answer = threading.Event()
    asked = asyncio.Event()
    loop, ask = asyncio.get_running_loop(), children.ask

    def slowly(data: bytes) -> bytes | None:
        loop.call_soon_threadsafe(asked.set)
        assert may_answer.wait(60)
        answer: bytes | None = ask(data)
        return answer

    monkeypatch.setattr(children, "ask", slowly)
    work = asyncio.create_task(aside(partial(Templates().render, HEAVY, {"n": 5})))
    await asked.wait()
    may_answer.set()
    assert await work == "5"


async def test_work_without_questions_stays_where_it_is(children: Any) -> None:
    assert await aside(threading.get_ident) == threading.get_ident()
    with pytest.raises(KeyError):
        await aside(partial({}.pop, "x"))


async def test_a_thread_works_on_copies_if_there_are_any(children: Any) -> None:
    begun: list[str] = []

    def work(name: str) -> object:
        begun.append(name)
        return sandbox.ask(ECHO, [name])

    assert await aside(partial(work, "shared"), lambda: partial(work, "copy")) == ["copy"]
    assert begun == ["shared", "copy"]


SCRIPT = """
import sys
from llm_orchestrator.language import sandbox
from llm_orchestrator.language.templates import Templates
print("main", flush=True)
print(Templates().render("{% set x = n %}{{ x }}", {"n": 5}), flush=True)
(child,) = sandbox._children._free
print(child._process.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("is_killed", [True, False])
def test_no_child_outlives_its_parent_and_none_runs_the_parents_main(
    tmp_path: Path, is_killed: bool
) -> None:
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    with subprocess.Popen(
        [sys.executable, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as script:
        assert script.stdout is not None
        assert [script.stdout.readline() for _ in range(2)] == ["main\n", "5\n"]
        with contextlib.ExitStack() as stack:
            child = os.pidfd_open(int(script.stdout.readline()))
            stack.callback(os.close, child)
            if is_killed:
                script.kill()
            script.communicate()
            poll = select.poll()
            poll.register(child, select.POLLIN)
            assert poll.poll(60_000), "the child lives on"


def test_a_forked_process_has_children_of_its_own(children: Any) -> None:
    sandbox.ask(ECHO, [1])
    sandbox._begin_anew()  # what runs after a fork
    try:
        assert sandbox._children is not children
        assert sandbox.ask(ECHO, [2]) == [2]
    finally:
        sandbox.close()
        sandbox._children.threads.shutdown()
    assert pid(children)


@pytest.mark.parametrize(
    ("pattern", "length"),
    [
        ("(a+)+$", 10),
        ("(a|a)*b", 10),
        ("a*a*a*a*a*b", 100),
        ("a?" * 30, 30),
        ("(?x) # [\n (a+)+ b # ]", 10),
        (r"(a*)\1\1\1b", 100),
        ("a" * 101, 1),
    ],
)
def test_a_dear_pattern_is_not_looked_for_here(pattern: str, length: int) -> None:
    assert not patterns.is_light(pattern, length)


@pytest.mark.parametrize(
    ("pattern", "length"),
    [
        (r"^[a-z]{2}$", 2),
        (r"id=(?P<n>\d+)", 1_000),
        (r"^[^@\s]+@[^@\s]+$", 40),
        (r"[)*+?{|(]+ \)\*", 100),
        ("plain words", 100_000),
    ],
)
def test_a_usual_pattern_is(pattern: str, length: int) -> None:
    assert patterns.is_light(pattern, length)


def test_a_pattern_finds_the_same_here_and_in_a_child(children: Any) -> None:
    text = "id=17, id=42"
    for pattern in (r"id=(\d+)", "[", "(a)(b)"):
        question = {"pattern": pattern, "text": text, "group": None, "is_all": True}
        said = sandbox.ask("llm_orchestrator.language.patterns:answer", question)
        assert said == patterns.answer(question)
    assert patterns.find(r"(?i)ID=(\d+)", text, is_all=True) == ["17", "42"]
