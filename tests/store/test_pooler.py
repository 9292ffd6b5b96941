"""Behind a pooler in transaction mode (a real pgbouncer, 1.18: no prepared statements)."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_orchestrator.clock import RealClock
from llm_orchestrator.drill.postgres_lab import PostgresServer
from llm_orchestrator.store.base import News, Post, PutRecord, Wanted
from llm_orchestrator.store.postgres import PostgresStore
from tests.store.support import accepted, claim, draft, land

pytestmark = pytest.mark.skipif(shutil.which("pgbouncer") is None, reason="no pgbouncer here")


@pytest.fixture
def pooler(postgres_server: PostgresServer, postgres_url: str) -> Iterator[str]:
    """The same database behind a pooler with two server connections."""
    folder = Path(tempfile.mkdtemp(prefix="llmo-pooler-"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "users").write_text('"postgres" ""\n')
    (folder / "ini").write_text(
        f"[databases]\n* = host=127.0.0.1 port={postgres_server.port}\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
        f"auth_type = trust\nauth_file = {folder / 'users'}\npool_mode = transaction\n"
        "default_pool_size = 2\nignore_startup_parameters = extra_float_digits\n"
    )
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755)  # whoever it runs as
    command = ["pgbouncer", str(folder / "ini")]
    if os.getuid() == 0:
        command = ["setpriv", "--reuid=nobody", "--clear-groups", *command]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pause = threading.Event()
    for _ in range(500):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        assert process.poll() is None, "pgbouncer ended at its start"
        pause.wait(0.01)
    yield f"postgresql://postgres@127.0.0.1:{port}/{postgres_url.rpartition('/')[2]}"
    process.terminate()
    process.wait(20)
    shutil.rmtree(folder)


async def test_everything_but_news_goes_through_the_pooler(pooler: str, postgres_url: str) -> None:
    stores = [
        PostgresStore(pooler, node_id=f"n{number}", clock=RealClock(), direct_url=postgres_url)
        for number in range(3)
    ]
    heard: list[News] = []
    for store in stores:
        await store.open_as_engine()
    stores[1].on_news(heard.append)

    async def work(place: int) -> None:
        store, other = stores[place], stores[(place + 1) % 3]
        for _ in range(20):
            writer = await accepted(store)
            entry, change = claim(f"n{place}")
            await land(store, writer.append(entry, draft(), change=change))
            record = PutRecord("k", writer.run_id, 1, 0)
            await land(store, changes=[Post(writer.run_id, "signal", "x"), record])
            journals = await other.look.load([writer.run_id])
            assert len(journals[writer.run_id].entries) == 3
            assert [message.name for message in await other.look.inbox(writer.run_id)] == ["x"]

    await asyncio.gather(*(work(place) for place in (0, 1, 2, 0, 1, 2)))
    assert await stores[0].pick("n0", Wanted(5, stores[0].clock.now_us())) == []
    members = await stores[2].members()
    await members.join("n2", "here", None)
    assert [member.is_connected for member in (await members.beat("n2", None)).members] == [True]
    await members.close()
    assert any(news.posted for news in heard)
    for store in stores:
        await store.close()
