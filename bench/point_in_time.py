"""Back to an exact moment with Barman: `python -m bench.point_in_time [--megabytes 250]`.

A server of our own whose log a real Barman keeps, a store of so many megabytes in it, a base
backup, one more record, the moment, and another record. Then `llmo restore --to MOMENT`, timed;
the record before is there, and the one after is not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from bench.contestants import ROOT
from bench.fill import fill
from llm_orchestrator.clock import RealClock
from llm_orchestrator.config import Config
from llm_orchestrator.model import MICROSECONDS
from llm_orchestrator.store.base import Batch, Database, PutRecord
from llm_orchestrator.wire import make_store
from tests.recovery.barman_lab import NAME, BarmanLab, tools_on_path


async def prepare(url: str, megabytes: int, lab: BarmanLab) -> int:
    """The moment."""
    store = make_store(Config(), RealClock(), url=url)
    await store.open_as_client(may_create=True)
    await fill(store, megabytes * 1_000_000)
    await asyncio.to_thread(lab.call, "backup", "--wait", NAME)
    await put(store, "before")
    moment = store.clock.now_us()
    await put(store, "after")
    await store.close()
    return moment


async def put(store: Database, key: str) -> None:
    await store.commit(Batch(changes=(PutRecord("bench", key, 1, 0),)))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.point_in_time")
    parser.add_argument("--megabytes", type=int, default=250)
    megabytes = parser.parse_args().megabytes
    with tools_on_path(), BarmanLab() as lab, tempfile.TemporaryDirectory() as text:
        url = lab.server.create_database("live")
        moment = asyncio.run(prepare(url, megabytes, lab))
        settings = Path(text) / "settings.toml"
        settings.write_text(f'barman_server = "{NAME}"\nbarman_config = "{lab.config}"\n')
        stamp = datetime.fromtimestamp(moment / MICROSECONDS, UTC).isoformat()
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "llm_orchestrator", "restore", "--to", stamp, "--yes", "--json"],
            env={
                **os.environ,
                "LLM_ORCHESTRATOR_URL": url,
                "LLM_ORCHESTRATOR_CONFIG": str(settings),
                "LLM_ORCHESTRATOR_DATA": text,
            },
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        took_s = time.monotonic() - started
        if done.returncode != 0:
            raise SystemExit(done.stderr)
        found = lab.server.psql(
            "SELECT string_agg(key, ' ') FROM records WHERE kind = 'bench'", database="live"
        )
        assert found == "before", found
        exchange_s = json.loads(done.stdout)["took_s"]
        print(f"{megabytes} MB: {took_s:.0f} s, of which {exchange_s:.0f} s after the log's replay")


if __name__ == "__main__":
    main()
