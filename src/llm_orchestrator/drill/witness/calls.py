"""What the provider's own server says it was asked: its ledger, a file or behind its address.

The judge reads one file. Where the ledger is that file already, nothing is copied; where it is
elsewhere, the lines of this drill alone are brought into it, so that the evidence is whole and
nobody else's prompts are in it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp

from llm_orchestrator.drill.judge import PROMPT

Json = Any
_TIMEOUT = aiohttp.ClientTimeout(total=60, connect=3)
_LEDGER = "/control/ledger"


class Calls:
    """The calls of one drill. `sources`: a path or an address for each server, or out of sight.

    `kept`: the files for the judge, one for each source.
    """

    def __init__(self, sources: Sequence[str], kept: Sequence[Path]) -> None:
        self._sources = sources
        self.kept = kept

    @property
    def is_seen(self) -> bool:
        """Whether anybody can say what was called."""
        return bool(self._sources)

    async def count(self, name: str) -> int:
        """How many calls of the drill `name` have arrived. Raises OSError, aiohttp.ClientError."""
        found = [_of(name, await _lines(source)) for source in self._sources]
        return sum(line["event"] == "arrived" for lines in found for line in lines)

    async def keep(self, name: str) -> None:
        """Have all of them in the files. Raises OSError, aiohttp.ClientError."""
        if not self._sources:
            for path in self.kept:
                path.touch()
            return
        for source, path in zip(self._sources, self.kept, strict=True):
            if Path(source) != path:
                lines = _of(name, await _lines(source))
                text = "".join(f"{json.dumps(line)}\n" for line in lines)
                await asyncio.to_thread(path.write_text, text)


async def _lines(source: str) -> list[dict[str, Json]]:
    if not source.startswith(("http://", "https://")):
        text = await asyncio.to_thread(Path(source).read_text)
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    url = source.rstrip("/") + _LEDGER
    async with aiohttp.ClientSession(timeout=_TIMEOUT) as http, http.get(url) as response:
        response.raise_for_status()
        return list(await response.json())


def _of(name: str, lines: list[dict[str, Json]]) -> list[dict[str, Json]]:
    """The calls whose prompt names a run of the drill, and how they ended."""
    ours = {
        line["id"]
        for line in lines
        if line["event"] == "arrived"
        and (found := PROMPT.match(line["prompt"]))
        and found.group(1).startswith(f"{name}-")
    }
    return [line for line in lines if line.get("id") in ours]
