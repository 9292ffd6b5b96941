"""Leaving in order has an end, also when the store does not answer any more."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from llm_orchestrator.cli import closing
from llm_orchestrator.wire import Orchestrator


class Stuck:
    """An engine whose store takes nothing more."""

    async def close(self, *, grace_s: float) -> None:
        await asyncio.Event().wait()


async def test_a_store_that_takes_nothing_does_not_keep_a_stopped_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(closing, "PATIENCE_S", 0.0)
    stuck = cast("Orchestrator", cast("Any", Stuck()))
    await closing.close_engine(stuck, grace_s=0.0)
    assert "run again" in capsys.readouterr().err
