"""A paid answer that comes while the database is away, in a process that then dies, is used."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_orchestrator.clock import RealClock
from llm_orchestrator.drill.postgres_lab import PostgresServer
from llm_orchestrator.engine.audit import verify_store
from llm_orchestrator.engine.replay import Fold, fold
from llm_orchestrator.model import RunState
from llm_orchestrator.store.postgres import PostgresStore
from tests.acceptance.fake_server import FakeServer, fake_server

pytestmark = [pytest.mark.timeout(180)]
FLOW = """
name: paid
steps:
  - id: answer
    type: llm
    provider: openai
    model: gpt-4o-mini
    prompt: "one paid answer [[fake: delay_ms=1500]]"
    output: [text]
  - id: after
    type: llm
    provider: openai
    model: gpt-4o-mini
    prompt: "then {{ steps.answer.text }}"
    output: [text]
outputs:
  text: "{{ steps.after.text }}"
"""


class Lab:
    """One node, one database, one provider that can be counted."""

    def __init__(self, folder: Path, server: PostgresServer, fake: FakeServer) -> None:
        self.folder = folder
        self.server = server
        self.fake = fake
        self.url = server.create_database("spooled")
        self.environment = {
            **os.environ,
            "OPENAI_API_KEY": "sk-test",
            "OPENAI_BASE_URL": f"{fake.url}/v1",
            "LLM_ORCHESTRATOR_URL": self.url,
            "LLM_ORCHESTRATOR_DATA": str(folder / "data"),
        }
        (folder / "paid.yaml").write_text(FLOW)

    def llmo(self, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "llm_orchestrator", *words],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def serve(self, log: str) -> subprocess.Popen[bytes]:
        with (self.folder / log).open("wb") as errors:
            return subprocess.Popen(
                [sys.executable, "-m", "llm_orchestrator", "serve", "--port", "0"],
                cwd=self.folder,
                env=self.environment,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )

    def spooled(self) -> bool:
        """True when a file of the spool holds something."""
        files = (self.folder / "data" / "spool").glob("*.spool")
        return any(file.stat().st_size for file in files)


def until(happens: Callable[[], bool], what: str) -> None:
    pause = threading.Event()
    for _ in range(3_000):
        if happens():
            return
        pause.wait(0.02)
    raise AssertionError(f"it does not happen: {what}")


async def read(url: str, run_id: str) -> tuple[Fold, list[str]]:
    store = PostgresStore(url, node_id="reader", clock=RealClock())
    await store.open_as_client()
    try:
        journals = await store.look.load([run_id])
        flaws = [str(flaw) for flaw in await verify_store(store)]
        return fold(run_id, journals[run_id].entries), flaws
    finally:
        await store.close()


def state_of(lab: Lab, run_id: str) -> RunState:
    return asyncio.run(read(lab.url, run_id))[0].state


@pytest.mark.parametrize("is_restarted", [False, True], ids=["the node lives on", "the node dies"])
def test_an_answer_that_came_while_the_database_was_away_is_paid_once(
    tmp_path: Path, is_restarted: bool
) -> None:
    with PostgresServer() as server, fake_server(tmp_path) as fake:
        lab = Lab(tmp_path, server, fake)
        node = lab.serve("first.log")
        try:
            run_id = lab.llmo("run", "paid.yaml", "--detach")
            until(lambda: bool(fake.arrived("one paid answer")), "the request goes out")
            server.kill()
            until(lambda: bool(fake.ended("one paid answer")), "the answer comes")
            until(lab.spooled, "the answer is spooled")
            if is_restarted:
                node.send_signal(signal.SIGKILL)
                node.wait()
            server.restart()
            if is_restarted:
                node = lab.serve("second.log")
            until(lambda: state_of(lab, run_id) is RunState.COMPLETED, "the run completes")
            assert len(fake.arrived("one paid answer")) == 1
            state, flaws = asyncio.run(read(lab.url, run_id))
            assert flaws == []
            assert state.repeats == 0
            assert state.finished["answer"].attempt == 1
            until(lambda: not lab.spooled(), "the spool is empty")
        finally:
            node.send_signal(signal.SIGTERM)
            node.wait(30)
        assert "Traceback" not in (tmp_path / "first.log").read_text()
