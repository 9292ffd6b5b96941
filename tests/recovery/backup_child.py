"""One backup in a process that kills itself at a given point.

    python backup_child.py FOLDER POINT

Points are the calls that touch files (and each megabyte that is packed or copied): an audit hook
counts them. POINT 0 kills nothing, and prints how many there were.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from llm_orchestrator.clock import RealClock
from llm_orchestrator.recovery.create import create
from llm_orchestrator.recovery.places_folder import FolderPlace
from llm_orchestrator.store.sqlite import SQLiteStore
from tests.recovery.backup_support import PlainCopier, options

EVENTS = ("open", "os.", "shutil.", "tempfile.", "sqlite3.", "fcntl.")


async def main(folder: Path, kill_at: int) -> int:
    store = SQLiteStore(folder / "live.db", node_id="", clock=RealClock())
    await store.open_as_client()
    points = 0

    def count(event: str, _args: object) -> None:
        nonlocal points
        if event.startswith(EVENTS):
            points += 1
            if points == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    how = options(folder / "b")
    place = FolderPlace(folder / "p")
    await create(PlainCopier(store.path), place, how, store=store, clock=RealClock())
    seen = points
    await store.close()
    return seen


if __name__ == "__main__":
    print(asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]))))
