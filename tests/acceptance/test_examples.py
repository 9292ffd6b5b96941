"""Every file of `examples/` runs, for real, and says what it promises to say.

The local model, the echo model and the local embeddings are the real ones; OpenAI, Anthropic and
Pinecone are fakes that speak their wire formats over a socket. What a small model answers is not
asserted, only what the engine makes of it.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import re
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from llm_orchestrator.config import Config
from llm_orchestrator.drill.fake_pinecone import FakePinecone
from llm_orchestrator.engine.replay import Fold, fold
from llm_orchestrator.errors import RunFailed
from llm_orchestrator.language.load import load_file
from llm_orchestrator.model import RunState
from llm_orchestrator.providers.echo import unit_vector
from llm_orchestrator.wire import Orchestrator
from tests.acceptance.fake_server import FakeServer, fake_server
from tests.acceptance.local_lab import SharedServer, data_dir_with_model

pytestmark = pytest.mark.timeout(600)

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FILES = sorted(str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*.*ml"))
PROGRAMS = sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.fixture(scope="module")
def local_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A llama.cpp server with the real model."""
    server = SharedServer(data_dir_with_model(tmp_path_factory.mktemp("local")))
    yield asyncio.run(server.url())
    server.stop()


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeServer]:
    """OpenAI's and Anthropic's wire formats."""
    with fake_server(tmp_path) as server:
        yield server


def paid(fake: FakeServer, **more: str) -> Config:
    """A configuration that sends every paid provider to the fake."""
    names = ("OPENAI", "ANTHROPIC")
    secrets = {f"{name}_BASE_URL": fake.url for name in names}
    return Config(secrets={**secrets, **{f"{name}_API_KEY": "sk-fake" for name in names}, **more})


class Lab:
    """An engine on a fresh store, and what its journal says of a run."""

    def __init__(self, orchestrator: Orchestrator) -> None:
        self.orchestrator = orchestrator

    async def run(self, name: str, inputs: dict[str, Any]) -> Any:
        return await self.orchestrator.run(EXAMPLES / name, inputs)

    async def start(self, name: str, inputs: dict[str, Any]) -> str:
        return await self.orchestrator.start(EXAMPLES / name, inputs)

    async def fold(self, run_id: str) -> Fold:
        journal = (await self.orchestrator.store.look.load([run_id]))[run_id]
        return fold(run_id, journal.entries)

    async def last(self) -> Fold:
        """The run that came last."""
        return await self.fold((await self.orchestrator.store.look.run_ids())[-1])


@asynccontextmanager
async def lab(tmp_path: Path, config: Config | None = None, **more: Any) -> AsyncIterator[Lab]:
    url = f"sqlite:///{tmp_path / 'runs.db'}"
    async with Orchestrator(url, config=config or Config(), **more) as orchestrator:
        yield Lab(orchestrator)


class Waits:
    """Told of what happens, as a progress display is; a test waits for it without sleeping."""

    def __init__(self) -> None:
        self._seen = asyncio.Queue[tuple[str, str]]()

    def publish(self, run_id: str, what: str, step: str, attempt: int, data: Any) -> None:
        self._seen.put_nowait((what, step))

    async def until(self, what: str, step: str) -> None:
        while await self._seen.get() != (what, step):
            pass


# -- the collection --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FILES, *PROGRAMS])
def test_every_example_is_run_by_a_test(name: str) -> None:
    body = Path(__file__).read_text().partition("# -- on the local model")[2]
    assert f'"{name}"' in body or f'"{name.removesuffix(".py")}"' in body, name


def test_there_are_enough_examples_and_five_of_the_earlier_system() -> None:
    assert len([name for name in FILES if "/" not in name]) >= 12
    assert len([name for name in FILES if name.startswith("earlier/")]) == 5


@pytest.mark.parametrize("name", FILES)
def test_an_example_is_valid_and_says_what_it_shows_and_how_to_run_it(name: str) -> None:
    definition = load_file(EXAMPLES / name)
    is_earlier = name.startswith("earlier/")
    assert is_earlier or not definition.warnings
    head = re.match(r"(#.*\n)+", (EXAMPLES / name).read_text())
    assert head, "a comment head"
    assert f"llmo run examples/{name}" in head[0]
    assert is_earlier or "# Shows: " in head[0]
    assert is_earlier or definition.description


# -- on the local model ----------------------------------------------------------------------------


async def test_simple_asks_the_second_question_with_the_first_answer(
    tmp_path: Path, local_url: str
) -> None:
    async with lab(tmp_path, Config(local_url=local_url)) as here:
        result = await here.run("simple.yaml", {"topic": "whales"})
        state = await here.last()
    assert result["facts"]
    assert result["story"]
    assert list(state.finished) == ["facts", "story"]
    assert state.finished["story"].data["usage"]["input_tokens"] > 0
    assert state.usage.cost_usd == 0


async def test_chain_takes_the_number_out_and_has_a_fallback_without_one(
    tmp_path: Path, local_url: str
) -> None:
    async with lab(tmp_path, Config(local_url=local_url)) as here:
        result = await here.run("chain.yaml", {"mail": "Order 4711 never came. Where is it?"})
        assert result["subject"] == "Your order 4711"
        assert result["answer"]
        result = await here.run("chain.yaml", {"mail": "Hello"})
        assert result["subject"] == "Your mail"
        assert (await here.last()).skipped == {"subject": "its condition is false"}


async def test_rag_finds_the_right_document_first(tmp_path: Path, local_url: str) -> None:
    async with lab(tmp_path, Config(local_url=local_url)) as here:
        result = await here.run("rag.yaml", {"question": "How long is the warranty?"})
        state = await here.last()
    assert result["sources"][0] == "document-0"
    assert len(result["sources"]) == 2
    assert state.finished["keep"].result["count"] == 4
    assert "three years" in state.finished["search"].result["results"][0]["metadata"]["text"]


async def test_map_reduce_summarises_each_part_once(tmp_path: Path, local_url: str) -> None:
    text = "Whales are big.\n\nTerns fly far.\n\n\n\nEels swim."
    async with lab(tmp_path, Config(local_url=local_url)) as here:
        result = await here.run("map_reduce.yaml", {"text": text})
        state = await here.last()
    assert len(result["parts"]) == 3
    assert result["summary"]
    assert {f"summaries/{n}/summarise" for n in range(3)} < set(state.finished)


async def test_structured_answers_are_data_that_fits(tmp_path: Path, local_url: str) -> None:
    async with lab(tmp_path, Config(local_url=local_url)) as here:
        result = await here.run("structured.yaml", {})
    names = [item["name"] for item in result["items"]]
    assert len(names) == 3
    assert names == sorted(names)
    assert result["pieces"] == sum(item["amount"] for item in result["items"])


# -- on the echo model -----------------------------------------------------------------------------


async def test_approval_waits_for_a_person_across_a_restart(tmp_path: Path) -> None:
    file, waits = tmp_path / "letter.txt", Waits()
    async with lab(tmp_path, publish=waits.publish) as here:
        run_id = await here.start("approval.yaml", {"to": "Ann", "file": str(file)})
        await waits.until("waiting", "")
        assert (await here.fold(run_id)).state is RunState.WAITING
    async with lab(tmp_path) as here:
        operator = here.orchestrator.operator
        await operator.approve(
            run_id, None, approved=True, form={"signature": "B. Clark"}, by="bea"
        )
        assert await here.orchestrator.result(run_id) == {"approved": True, "by": "bea"}
    assert file.read_text() == "echo: Dear Ann, thank you for your order.\nB. Clark\n"


async def test_approval_refused_writes_nothing(tmp_path: Path) -> None:
    file, waits = tmp_path / "letter.txt", Waits()
    async with lab(tmp_path, publish=waits.publish) as here:
        run_id = await here.start("approval.yaml", {"to": "Ann", "file": str(file)})
        await waits.until("waiting", "")
        await here.orchestrator.operator.approve(run_id, "sign_off", approved=False, by="bea")
        assert (await here.orchestrator.result(run_id))["approved"] is False
    assert not file.exists()


async def test_budget_asks_no_question_beyond_it(tmp_path: Path) -> None:
    questions = {"questions": ["one", "two", "three", "four"]}
    async with lab(tmp_path) as here:
        with pytest.raises(RunFailed, match="the budget of 20 tokens is spent"):
            await here.run("budget.yaml", questions)
        state = await here.last()
    assert set(state.finished) == {"answers/0/answer", "answers/1/answer"}
    assert state.failures["answers/2/answer"].error["kind"] == "budget"


async def test_schedule_runs_by_hand_and_when_its_time_comes(tmp_path: Path) -> None:
    file = tmp_path / "report.txt"
    async with lab(tmp_path) as here:
        result = await here.run("schedule.yaml", {"file": str(file)})
    assert result == {"file": str(file)}
    assert file.read_text().startswith("echo: Report of ")
    assert "for operations" in file.read_text()


async def test_parallel_goes_on_with_whoever_answered(tmp_path: Path) -> None:
    async with lab(tmp_path) as here:
        result = await here.run("parallel.yaml", {"plan": "umbrellas"})
    assert "One reason for it: umbrellas" in result["decision"]
    assert "nobody knows" in result["decision"]
    assert "invalid_request" in result["missing"]


async def test_parent_runs_a_child_for_each_item(tmp_path: Path) -> None:
    async with lab(tmp_path) as here:
        alone = await here.run("child.yaml", {"city": "Oslo"})
        assert alone == {"tip": "echo: A tip for Oslo"}
        result = await here.run("parent.yaml", {"cities": ["Lisbon", "Oslo"]})
        look = here.orchestrator.store.look
        parents = [
            run.parent_run_id for run in [await look.run(r) for r in await look.run_ids()] if run
        ]
    assert result["tips"] == ["echo: A tip for Lisbon", "echo: A tip for Oslo"]
    assert len([parent for parent in parents if parent]) == 2


async def test_reminder_refuses_a_payment_that_does_not_fit(tmp_path: Path) -> None:
    waits = Waits()
    async with lab(tmp_path, publish=waits.publish) as here:
        run_id = await here.start("reminder.yaml", {"seconds": 0.05})
        operator = here.orchestrator.operator
        await operator.signal(run_id, "paid", {"amount": -1})
        await waits.until("refused", "payment")
        await operator.signal(run_id, "paid", {"amount": 40})
        assert await here.orchestrator.result(run_id) == {"text": "echo: Thank you for 40"}


# -- on the fake providers -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdict", "finished"),
    [
        ("safe", {"judge", "route/safe/publish"}),
        ("review", {"judge", "route/default/hold"}),
        ("block", {"judge", "route/block/explain", "route/block/tell"}),
    ],
)
async def test_moderation_goes_the_way_of_the_verdict(
    tmp_path: Path, fake: FakeServer, verdict: str, finished: set[str]
) -> None:
    answer = {"verdict": verdict, "reason": "because"}
    fake.control(script=[{"json": answer}, {"reply": "Sorry."}])
    async with lab(tmp_path, paid(fake)) as here:
        result = await here.run("moderation.yaml", {"post": "A post"})
        state = await here.last()
        outbox = await here.orchestrator.store.shelf.records("outbox")
    assert result == {"verdict": verdict, "explanation": "Sorry." if verdict == "block" else None}
    assert set(state.finished) == finished
    assert len(outbox) == (verdict != "safe")
    assert state.usage.cost_usd > 0


async def test_moderation_asks_again_for_an_answer_that_does_not_fit(
    tmp_path: Path, fake: FakeServer
) -> None:
    fake.control(script=[{"reply": "safe, I think"}, {"json": {"verdict": "safe", "reason": "x"}}])
    async with lab(tmp_path, paid(fake)) as here:
        assert (await here.run("moderation.yaml", {"post": "A post"}))["verdict"] == "safe"
    assert len(fake.arrived("")) == 2


async def test_agent_calls_its_tool_and_answers_with_what_it_returned(
    tmp_path: Path, fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.delitem(sys.modules, "tools", raising=False)
    call = {"tool": "calculate", "json": {"expression": "6 * 7"}}
    fake.control(script=[call, {"reply": "It is 42."}])
    async with lab(tmp_path, paid(fake)) as here:
        result = await here.run("agent.yaml", {"question": "What is 6 times 7?"})
        state = await here.last()
    assert result == {"answer": "It is 42.", "turns": 2}
    (told,) = [
        m for m in state.finished["agent/1/act"].result["result"]["messages"] if m["role"] == "tool"
    ]
    assert told["content"] == "42"
    assert "42" in fake.arrived("What is 6 times 7?")[-1]["prompt"]


def test_a_tool_of_the_agent_computes_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.delitem(sys.modules, "tools", raising=False)
    tools = importlib.import_module("tools")
    assert tools.__file__ == str(EXAMPLES / "tools.py")
    assert tools.calculate("2 * (3 - 1) / 4") == 1
    with pytest.raises(ValueError, match="not arithmetic"):
        tools.calculate("__import__('os').getcwd()")
    bad = {"id": "1", "name": "calculate", "arguments": {"expression": "1 / 0"}}
    (*_, told) = tools.call([], "", [bad])["messages"]
    assert told["content"] == "error: division by zero"


async def test_fallback_asks_the_next_provider(tmp_path: Path, fake: FakeServer) -> None:
    fake.control(script=[{"match": {"api": "openai.chat"}, "status": 503}])
    async with lab(tmp_path, paid(fake)) as here:
        result = await here.run("fallback.yaml", {"question": "Why is the sky blue?"})
        state = await here.last()
    assert result["model"] == "claude-haiku-4-5"
    assert [line["api"] for line in fake.arrived("sky")] == ["openai.chat", "anthropic.messages"]
    assert state.skipped == {"apologise": "no step needed it"}
    notes = state.finished["ask"].data["notes"]["fallback"]
    assert notes["failed"][0]["error"] == "transient"


async def test_fallback_apologises_when_nobody_answers(tmp_path: Path, fake: FakeServer) -> None:
    fake.control(default={"status": 503})
    async with lab(tmp_path, paid(fake)) as here:
        result = await here.run("fallback.yaml", {"question": "Why is the sky blue?"})
    assert result["answer"].startswith("Nobody could answer")
    assert result["model"] is None


class Receiver:
    """A webhook's receiver: broken at first, then it says thank you and remembers."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.bodies: list[Any] = []

    async def receive(self, request: web.Request) -> web.Response:
        self.ids.append(request.headers["webhook-id"])
        assert request.headers["webhook-signature"].startswith("v1,")
        if len(self.ids) < 3:
            return web.Response(status=503)
        self.bodies.append(await request.json())
        return web.json_response({"receipt": 7})


async def test_webhook_is_sent_until_it_is_taken_always_with_one_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEBHOOK_SECRET", "whsec_c2VjcmV0")
    receiver = Receiver()
    app = web.Application()
    app.router.add_post("/hooks", receiver.receive)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/hooks"
    async with lab(tmp_path, Config(outgoing_allow=["127.0.0.1"])) as here:
        result = await here.run("webhook.yaml", {"url": url, "amount": 100})
        state = await here.last()
    await runner.cleanup()
    assert result == {"status": 200, "receipt": {"receipt": 7}}
    assert receiver.ids == [f"{state.run_id}/announce"] * 3
    assert receiver.bodies == [{"event": "payment", "amount": 100, "run": state.run_id}]
    assert state.finished["announce"].attempt == 3
    assert b"whsec" not in (tmp_path / "runs.db").read_bytes()


# -- in Python -------------------------------------------------------------------------------------


async def test_python_digest_reads_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    program = importlib.import_module("python_digest")
    first = await program.main(f"sqlite:///{tmp_path / 'd.db'}")
    assert capsys.readouterr().err.count("reading") == 3
    assert first["digest"].startswith("Eels cross an ocean to breed.")
    assert await program.main(f"sqlite:///{tmp_path / 'd.db'}") == first
    assert "reading" not in capsys.readouterr().err


async def test_python_order_waits_and_charges_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    program = importlib.import_module("python_order")
    result = await program.main(f"sqlite:///{tmp_path / 'o.db'}")
    assert (result["to"], result["packed"]) == ("Quay 3", ["packed lamp", "packed shade"])
    assert capsys.readouterr().err.count("charging") == 1


# -- of the earlier system -------------------------------------------------------------------------


async def test_earlier_simple_chain(tmp_path: Path, fake: FakeServer) -> None:
    fake.control(script=[{"reply": "Hi Ann"}, {"reply": "warm"}])
    async with lab(tmp_path, paid(fake)) as here:
        result = await here.run("earlier/simple.yaml", {"person": "Ann"})
    assert result["analyze"]["tone"] == "warm"
    assert fake.arrived("What tone")[0]["prompt"] == "What tone does this line have? Hi Ann"


async def test_earlier_transforms_give_something(tmp_path: Path) -> None:
    inputs = {"ticket": {"state": "open"}, "owner": {"team": "a"}}
    async with lab(tmp_path) as here:
        result = await here.run("earlier/transform-only.yaml", inputs)
    assert result["filter_data"]["open_record"] == {"state": "open", "team": "a"}


async def test_earlier_sentiment_reaches_the_second_provider(
    tmp_path: Path, fake: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    fake.control(script=[{"reply": "positive"}, {"reply": "Thank you"}])
    async with lab(tmp_path, paid(fake)) as here:
        with caplog.at_level("INFO", "llm_orchestrator.workflow"):
            await here.run("earlier/sentiment-analysis.yaml", {"text": "The lamp is lovely."})
    assert "The mood is positive." in fake.arrived("The mood")[0]["prompt"]
    assert "positive: Thank you" in caplog.messages


@pytest.mark.parametrize(
    ("decision", "posted"),
    [("safe", "publish"), ("review", "queue_review"), ("block", "send_notification")],
)
async def test_earlier_moderation_goes_one_way_and_leaves_no_step_hanging(
    tmp_path: Path, fake: FakeServer, decision: str, posted: str
) -> None:
    fake.control(script=[{"reply": decision}, {"reply": "Sorry"}])
    async with lab(tmp_path, paid(fake)) as here:
        await here.run("earlier/content-moderation.yaml", {"content": "hello"})
        outbox = await here.orchestrator.store.shelf.records("outbox")
        state = await here.last()
    assert [key.rpartition("/")[2] for key in outbox] == [posted]
    assert len(state.finished) + len(state.skipped) == 5


async def test_earlier_rag_answers_from_what_it_found(tmp_path: Path, fake: FakeServer) -> None:
    pinecone = FakePinecone(api_key="pc", dimension=64, index="knowledge-base")
    host = await pinecone.start()
    for number, text in enumerate(("The warranty is three years.", "We open at nine.")):
        kept = {"id": str(number), "values": unit_vector(text, 64), "metadata": {"text": text}}
        pinecone.namespaces.setdefault("", {})[str(number)] = kept
    fake.control(script=[{"match": {"api": "anthropic.messages"}, "reply": "Three years."}])
    config = paid(fake, PINECONE_HOST=host, PINECONE_API_KEY="pc")
    async with lab(tmp_path, config) as here:
        result = await here.run("earlier/rag-pipeline.yaml", {"question": "The warranty is what?"})
    await pinecone.stop()
    assert result["generate_answer"]["answer"] == "Three years."
    prompt = fake.arrived("Context:")[0]["prompt"]
    assert "0. The warranty is three years. (score " in prompt
    assert json.dumps("1. We open at nine.")[1:-1] in prompt
