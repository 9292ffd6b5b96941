"""Python workflows that misbehave, each once: served by the node of a drill, never by others."""

from __future__ import annotations

import asyncio
import ctypes
import os
import threading
from pathlib import Path

from llm_orchestrator import Context, step, workflow

_BLOCK_S = 6.0


def _is_first(flag: str) -> bool:
    """True once for each flag, also over crashes; without a flag, always."""
    if not flag:
        return True
    try:
        number = os.open(Path(flag), os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    os.fsync(number)
    os.close(number)
    return True


def _end_the_loop() -> None:
    raise SystemExit(70)


def _raise() -> None:
    raise RuntimeError("a drill's thread breaks")


@step
async def misbehave(how: str, flag: str) -> str:
    """Break something, the first time that it is called with this flag."""
    if _is_first(flag):
        if how == "exception":
            raise RuntimeError("a drill's step breaks")
        if how == "segfault":
            ctypes.string_at(0)
        if how == "loop":
            asyncio.get_running_loop().call_soon(_end_the_loop)
            await asyncio.Event().wait()
        if how == "block":
            threading.Event().wait(_BLOCK_S)
        if how == "thread":
            threading.Thread(target=_raise).start()
    return f"survived {how}"


@workflow
async def drill_misbehave(ctx: Context, *, key: str, how: str, flag: str) -> dict[str, str]:
    """One step that breaks something once."""
    return {"said": await ctx.step(misbehave, how, flag), "key": key}
