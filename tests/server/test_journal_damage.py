"""A journal is shown whatever has become of its rows: the page says what is wrong, it never fails.

(Every other view of a damaged run answers 500 `damaged` with the command that mends it.)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sqlite3
from collections.abc import Callable
from urllib.parse import urlsplit

import pytest

from llm_orchestrator.store.journal import encode
from tests.server.support import ECHO, Site

Hit = Callable[[str], None]
PAYLOADS = [
    b"",
    b"x",
    b"[]",
    b"null",
    b"\xff\xfe\x00",
    encode({"a": "\ud800"})[:1] + json.dumps({"$float": 10**400}).encode(),
    encode({"a": "\ud800"})[:1] + json.dumps({"$int": [1]}).encode(),
    encode({"a": "y" * 40_000})[:9],
    b"[" * 100_000,
    b'{"a":' * 2_000 + b"1" + b"}" * 2_000,
    b'{"a":' + b"9" * 5_000 + b"}",
]
ANYWHERE = [
    "DELETE FROM journal WHERE {entry}",
    "UPDATE journal SET digest = {blob} WHERE {entry}",
    "UPDATE journal SET recorded_at = 9223372036854775807 WHERE {entry}",
    "UPDATE journal SET recorded_at = -9223372036854775808 WHERE {entry}",
    "UPDATE journal SET kind = 'odd' WHERE {entry}",
    "UPDATE journal SET step = 'odd' WHERE {entry}",
    "UPDATE journal SET epoch = -9 WHERE {entry}",
    "UPDATE journal SET attempt = -9 WHERE {entry}",
    "UPDATE journal SET seq = seq + 1000 WHERE {entry}",
    "UPDATE journal SET seq = -seq WHERE {entry}",
    "UPDATE runs SET state = 'odd' WHERE {run}",
    "UPDATE runs SET head_seq = -4 WHERE {run}",
    "DELETE FROM runs WHERE {run}",
    "DELETE FROM blobs WHERE {run}",
    "UPDATE blobs SET content = {blob} WHERE {run}",
]
SQLITE = [
    "UPDATE journal SET recorded_at = 'yes' WHERE {entry}",
    "UPDATE journal SET recorded_at = 1.5e300 WHERE {entry}",
    "UPDATE journal SET payload = 'text' WHERE {entry}",
    "UPDATE journal SET digest = 'text' WHERE {entry}",
    "UPDATE journal SET kind = 7 WHERE {entry}",
    "UPDATE journal SET kind = x'ff' WHERE {entry}",
    "UPDATE journal SET kind = CAST(x'ffed' AS TEXT) WHERE {entry}",
    "UPDATE journal SET step = x'ff00' WHERE {entry}",
    "UPDATE journal SET step = CAST(x'ff' AS TEXT) WHERE {entry}",
    "UPDATE journal SET epoch = 'e' WHERE {entry}",
    "UPDATE journal SET attempt = 1.5 WHERE {entry}",
]
"""Its columns take what any bit makes of them."""


UNCHECKED = ("recorded_at", "UPDATE runs SET state", "DELETE FROM runs")
"""Of these the chain says nothing."""


@pytest.fixture
def hit(request: pytest.FixtureRequest, store_url: str) -> Hit:
    """Change the database behind everybody's back."""
    if store_url.startswith("postgresql:"):
        server = request.getfixturevalue("postgres_server")
        name = urlsplit(store_url).path[1:]
        return lambda statement: server.psql(statement, database=name)

    def change(statement: str) -> None:
        with contextlib.closing(sqlite3.connect(store_url.removeprefix("sqlite:///"))) as file:
            file.execute(statement)
            file.commit()

    return change


def blob(content: bytes, url: str) -> str:
    return f"x'{content.hex()}'" if url.startswith("sqlite:") else f"'\\x{content.hex()}'"


async def test_a_journal_is_shown_whatever_its_rows_hold(
    site: Site, store_url: str, hit: Hit
) -> None:
    await site.register(ECHO)
    damages = [
        f"UPDATE journal SET payload = {blob(p, store_url)} WHERE {{entry}}" for p in PAYLOADS
    ]
    damages += [*ANYWHERE, *(SQLITE if store_url.startswith("sqlite:") else [])]
    for number, damage in enumerate(damages):
        size = 1_200_000 if "blobs" in damage else 1_000
        run_id = (
            await site.execute("echo", {"topic": random.Random(number).randbytes(size).hex()})
        )["run_id"]
        rows = (await site.get(f"/runs/{run_id}/journal")).json()
        assert (len(rows["items"]) > 2, rows["flaws"]) == (True, [])
        words = {"run": f"run_id = '{run_id}'", "entry": f"run_id = '{run_id}' AND seq = 3"}
        statement = damage.format(**words, blob=blob(b"odd", store_url))
        await asyncio.to_thread(hit, statement)
        for query in ({}, {"limit": 1}, {"cursor": "2"}, {"cursor": "3", "limit": 1}):
            answer = await site.get(f"/runs/{run_id}/journal", **query)
            assert answer.status_code == 200, (damage[:200], answer.text)
            if not any(word in damage for word in UNCHECKED):
                assert answer.json()["flaws"], damage[:200]
