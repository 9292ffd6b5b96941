from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from llm_orchestrator import errors
from llm_orchestrator.providers.http import HttpClient
from tests.acceptance.fake_server import fake_server
from tests.acceptance.providers_support import Seen, ask, http_client, openai, target


@pytest.fixture
async def client() -> AsyncIterator[HttpClient]:
    made = http_client()
    yield made
    await made.close()


def start(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE)


async def answer(client: HttpClient, url: str, prompt: str, model: str = "fake") -> str:
    llm = openai(client, target(url + "/v1"))
    return (await llm.complete(ask(prompt, model=model), Seen().chunk, Seen().handle)).text


async def test_an_answer_that_began_is_in_the_ledger_though_the_server_is_killed(
    tmp_path: Path, client: HttpClient
) -> None:
    ledger = tmp_path / "ledger.jsonl"
    command = [sys.executable, "-m", "llm_orchestrator.drill.fake_llm", "--ledger", str(ledger)]
    with start(command) as process:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        seen = Seen()

        async def kill(text: str) -> None:
            await seen.chunk(text)
            process.send_signal(signal.SIGKILL)

        question = ask("dies [[fake: chunk_delay_ms=20]]")
        with pytest.raises(errors.ProviderTransient):
            await openai(client, target(url + "/v1")).complete(question, kill, seen.handle)
    (line,) = [json.loads(text) for text in ledger.read_text().splitlines()]
    assert (line["event"], line["prompt"][:4]) == ("arrived", "dies")
    with fake_server(tmp_path) as again:
        text = await answer(client, again.url, "dies [[fake: chunk_delay_ms=20]]")
        assert text.startswith(seen.text)
        assert len(again.arrived("dies")) == 2


async def test_a_killed_client_leaves_the_count_of_what_was_sent(tmp_path: Path) -> None:
    code = (
        "import sys, urllib.request as u; r = u.Request(sys.argv[1] + '/v1/chat/completions',"
        " data=sys.argv[2].encode()); f = u.urlopen(r)\n"
        "while b'content' not in f.readline(): pass\n"
        "f.readline(); print(f.readline(), flush=True); sys.stdin.read()"
    )
    prompt = "client dies [[fake: tokens=100000 chunk_delay_ms=2]]"
    body = json.dumps(
        {"model": "m", "stream": True, "messages": [{"role": "user", "content": prompt}]}
    )
    with fake_server(tmp_path) as fake:
        command = [sys.executable, "-c", code, fake.url, body]
        with start(command) as process:
            assert process.stdout is not None
            process.stdout.readline()
            process.send_signal(signal.SIGKILL)
        await asyncio.to_thread(fake.wait_idle)
        (line,) = fake.ended("client dies")
    assert line["outcome"] == "aborted"
    assert 1 <= line["tokens"] < 100000


async def test_a_script_is_used_up_one_request_each_and_a_default_stays(
    tmp_path: Path, client: HttpClient
) -> None:
    with fake_server(tmp_path) as fake:
        fake.control(
            script=[{"reply": "first"}, {"reply": "second", "match": {"model": "b"}}],
            default={"reply": "always"},
        )
        texts = [await answer(client, fake.url, "x", model) for model in ("a", "a", "b", "b")]
        assert texts == ["first", "always", "second", "always"]
        fake.control(default={"status": 503})
        with pytest.raises(errors.ProviderTransient):
            await answer(client, fake.url, "x")
        fake.control(reset=True)
        assert await answer(client, fake.url, "x")


async def test_times_counts_each_prompt_for_itself(tmp_path: Path, client: HttpClient) -> None:
    with fake_server(tmp_path) as fake:
        for prompt in ("one", "two"):
            steered = f'{prompt} [[fake: status=500 times=2 reply="got there"]]'
            for _ in range(2):
                with pytest.raises(errors.ProviderTransient):
                    await answer(client, fake.url, steered)
            assert await answer(client, fake.url, steered) == "got there"


async def test_a_longer_answer_begins_with_the_shorter_one_in_every_process(
    tmp_path: Path, client: HttpClient
) -> None:
    texts = []
    for number, tokens in enumerate((5, 40)):
        with fake_server(tmp_path / str(number)) as fake:
            llm = openai(client, target(fake.url + "/v1"))
            question = ask("stable", max_tokens=tokens)
            texts.append((await llm.complete(question, Seen().chunk, Seen().handle)).text)
    assert texts[1].startswith(texts[0])
    assert [len(text.split()) for text in texts] == [5, 40]


async def test_a_malformed_request_is_answered_and_not_fatal(
    tmp_path: Path, client: HttpClient
) -> None:
    with fake_server(tmp_path) as fake:
        for path in ("/chat/completions", "/messages", "/embeddings"):
            bodies: list[Any] = [{}, [], {"messages": [{}], "model": 1}, {"input": 3}]
            for body in bodies:
                with pytest.raises(errors.ProviderInvalidRequest):
                    await client.post(target(fake.url + "/v1"), path, body)
        assert await answer(client, fake.url, "still there")
