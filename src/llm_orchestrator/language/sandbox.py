"""Where work runs that may be too much: a child process, which dies of it in this one's place.

A question may take so much of the child's processor time, counted by the kernel, so that a busy
machine changes no answer, and the child MEMORY_BYTES_MAX. It knows no environment and has no files
open but its two pipes; it ends when its standard input does, so it never outlives its parent for
longer than a question. What goes in and out is JSON with its length before it, never code.

A child is kept for the next question; CHILDREN_MAX live at a time, and who comes then waits. So a
coroutine asks inside of `aside`, which moves it to a thread, but only if there is such a question.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from importlib import import_module
from typing import IO, TypeVar

from llm_orchestrator.errors import TemplateError
from llm_orchestrator.model import Json

T = TypeVar("T")
CPU_S_MAX = 0.5
MEMORY_BYTES_MAX = 512 << 20
MESSAGE_BYTES_MAX = 16 << 20
CHILDREN_MAX = 2
SILENCE_S_MAX = 60.0
"""After this long without an answer a child counts as stuck: somebody has stopped it."""
_QUESTIONS_MAX = 1_000
"""Then a child is replaced: what its memory has grown by is given back."""
_LENGTH = struct.Struct(">I")
_START = "from llm_orchestrator.language.sandbox import serve; serve()"


_functions: dict[str, Callable[[Json], Json]] | None = None
"""Not None: this process is a child, and answers its own questions itself."""


class TooMuch(TemplateError):
    """It takes more time or memory than the texts of a workflow may. It is not tried again."""


class _Elsewhere(BaseException):
    """There is a question, and who asks must not wait here. No code but `aside` catches it."""


_must_not_wait: ContextVar[bool] = ContextVar("llm_orchestrator_must_not_wait", default=False)


async def aside(work: Callable[[], T], again: Callable[[], Callable[[], T]] | None = None) -> T:
    """`work()`, on a thread if it has questions for a child. It must not mind being begun twice.

    `again` makes what the thread does instead, out of copies of what others may change meanwhile.
    """
    token = _must_not_wait.set(True)
    try:
        return work()
    except _Elsewhere:
        pass
    finally:
        _must_not_wait.reset(token)
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(_children.threads, again() if again is not None else work)


def ask(function: str, question: Json, *, cpu_s: float = CPU_S_MAX) -> Json:
    """What `function` ("module:name", JSON to JSON) answers in a child. Blocks; raises TooMuch."""
    if _functions is not None:
        return _function(_functions, function)(question)
    if _must_not_wait.get():
        raise _Elsewhere
    data = json.dumps([function, cpu_s, question]).encode()
    if len(data) > MESSAGE_BYTES_MAX:
        raise TooMuch(f"it works on more than {MESSAGE_BYTES_MAX >> 20} MiB")
    answer = _children.ask(data)
    if answer is None:
        raise TooMuch(
            f"it takes more than {cpu_s:.2g} s, {MEMORY_BYTES_MAX >> 20} MiB of memory"
            f" or {MESSAGE_BYTES_MAX >> 20} MiB of text"
        )
    return json.loads(answer)


def close() -> None:
    """End the children that are free; more come when they are needed."""
    _children.close()


class _Children:
    """Those of one process."""

    def __init__(self) -> None:
        self.threads = ThreadPoolExecutor(CHILDREN_MAX, "llmo-aside")
        self._free: list[_Child] = []
        self._seats = threading.BoundedSemaphore(CHILDREN_MAX)

    def ask(self, data: bytes) -> bytes | None:
        with self._seats:
            for _ in range(2):
                child = self._take()
                answer = child.ask(data)
                if answer is not None:
                    self._give(child)
                    return answer
                if not child.was_killed():
                    break
        return None

    def close(self) -> None:
        while True:
            try:
                child = self._free.pop()
            except IndexError:
                return
            child.end()

    def _take(self) -> _Child:
        with contextlib.suppress(IndexError):
            return self._free.pop()
        return _Child()

    def _give(self, child: _Child) -> None:
        if child.questions < _QUESTIONS_MAX:
            self._free.append(child)
        else:
            child.end()


class _Child:
    def __init__(self) -> None:
        self.questions = 0
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-B", "-c", _START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            cwd="/",
            start_new_session=True,
        )

    def ask(self, data: bytes) -> bytes | None:
        """Its answer; None when it died of the question, or of something else, or is stuck."""
        self.questions += 1
        sender, receiver = self._process.stdin, self._process.stdout
        assert sender is not None
        assert receiver is not None
        poll = select.poll()
        poll.register(receiver, select.POLLIN)
        try:
            _write_message(sender, data)
            answer = _read_message(receiver) if poll.poll(SILENCE_S_MAX * 1000) else None
        except OSError:
            answer = None
        if answer is None:
            self.end()
        return answer

    def was_killed(self) -> bool:
        """True if somebody has killed it, so that nothing is said about the question."""
        return self._process.returncode in {-signal.SIGKILL, -signal.SIGTERM}

    def end(self) -> None:
        """Kill it, unless it has ended already, and wait for its end."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        self._process.kill()
        self._process.wait()


_children = _Children()
atexit.register(close)


def _begin_anew() -> None:
    """After a fork: children belong to the process that started them."""
    global _children  # noqa: PLW0603 (one per process, and this is another process)
    _children = _Children()


os.register_at_fork(after_in_child=_begin_anew)


def _write_message(stream: IO[bytes], data: bytes) -> None:
    stream.write(_LENGTH.pack(len(data)) + data)
    stream.flush()


def _read_message(stream: IO[bytes]) -> bytes | None:
    """One message; None at the end of the stream."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    data = stream.read(length)
    return data if len(data) == length else None


def serve() -> None:
    """A child's life: answer until no more questions come. A limit ends it without an answer."""
    global _functions  # noqa: PLW0603 (from now on this process is a child)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    _functions = {}
    while (data := _read_message(source)) is not None:
        name, cpu_s, question = json.loads(data)
        function = _function(_functions, name)
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        answer = json.dumps(function(question)).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        if len(answer) > MESSAGE_BYTES_MAX:
            return
        _write_message(sink, answer)


def _function(known: dict[str, Callable[[Json], Json]], name: str) -> Callable[[Json], Json]:
    if name not in known:
        module, _, attribute = name.partition(":")
        known[name] = getattr(import_module(module), attribute)
    return known[name]
