"""Python workflows that misbehave, each once: served by the node of a drill, never by others."""

from __future__ import annotations

import asyncio
import ctypes
import os
import threading
from pathlib import Path

from llm_orchestrator import Context, step, workflow
from llm_orchestrator.clock import RealClock

_BLOCK_S = 6.0
_PIECE = 16 << 20
_LOOK_S = 0.1


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


def _take_all_memory() -> None:
    taken = []
    while True:
        taken.append(b"x" * _PIECE)  # written to, so that the kernel must give it


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
        if how == "memory":
            _take_all_memory()
        if how == "thread":
            threading.Thread(target=_raise).start()
    return f"survived {how}"


@workflow
async def drill_misbehave(ctx: Context, *, key: str, how: str, flag: str) -> dict[str, str]:
    """One step that breaks something once."""
    return {"said": await ctx.step(misbehave, how, flag), "key": key}


def _is_there(file: str) -> bool:
    return Path(file).exists()


@step
async def hold(size: int, while_there: str) -> int:
    """Keep `size` bytes of memory while there is a file."""
    if not _is_there(while_there):
        return 0
    kept = b"x" * size
    while _is_there(while_there):
        await RealClock().sleep(_LOOK_S)
    return len(kept)


@workflow
async def drill_hungry(ctx: Context, *, key: str, size: int, while_there: str) -> dict[str, str]:
    """One step that keeps memory."""
    await ctx.step(hold, size, while_there)
    return {"key": key}
