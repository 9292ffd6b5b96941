"""The command line as its users meet it: a process with arguments, streams and an exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

HELLO = """\
name: hello
version: "1.0"
inputs:
  who: {type: string, default: world}
steps:
  - id: greet
    type: llm
    provider: echo
    model: echo
    prompt: "Hello {{ inputs.who }}"
    stream: true
outputs:
  text: "{{ steps.greet.text }}"
"""
GATE = """\
name: gate
steps:
  - id: before
    type: transform
    function: expression
    expression: "1 + 1"
  - id: review
    type: approval
    depends_on: before
outputs:
  approved: "{{ steps.review.approved }}"
"""
CODE = """\
from llm_orchestrator import Context, step, workflow


@step
async def add(a: int, b: int) -> int:
    return a + b


@step
async def fail_unless(path: str) -> str:
    with open(path) as file:
        return file.read()


@workflow
async def total(ctx: Context, a: int, b: int) -> int:
    first = await ctx.step(add, a, b)
    return await ctx.step(add, first, 1)


@workflow
async def signalled(ctx: Context) -> str:
    return await ctx.wait_signal("go")


@workflow
async def reads(ctx: Context, path: str) -> str:
    await ctx.step(add, 1, 2)
    return await ctx.step(fail_unless, path)
"""


class Done(NamedTuple):
    """A command that ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Shell:
    """Runs `llmo` in a folder of its own, with a data folder of its own and no keys."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
        self.environment = {
            **kept,
            "LLM_ORCHESTRATOR_DATA": str(folder / "data"),
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PYTHONUNBUFFERED": "1",
        }
        for name, text in {"hello.yaml": HELLO, "gate.yaml": GATE, "code.py": CODE}.items():
            (folder / name).write_text(text)

    @property
    def store(self) -> Path:
        return self.folder / "data" / "runs.db"

    def __call__(
        self,
        *words: str,
        stdin: str = "",
        environment: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
        **options: Any,
    ) -> Done:
        done = subprocess.run(
            [sys.executable, "-m", "llm_orchestrator", *words],
            cwd=self.folder,
            env={**self.environment, **(environment or {})},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            **options,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Done(done.returncode, done.stdout, done.stderr)

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "llm_orchestrator", *words],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @contextmanager
    def serving(self, *words: str) -> Iterator[subprocess.Popen[str]]:
        """An engine that is ready; ended gently at the end if it still runs."""
        process = self.start("serve", "--port", "0", *words)
        try:
            read_until(process, "ready: ")
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.communicate(timeout=30)


def read_until(process: subprocess.Popen[str], words: str) -> str:
    """The line of stderr that holds `words`; fails when the process ends without it."""
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if words in line:
            return line
    raise AssertionError(f"it ended without saying {words!r}: {said}")
