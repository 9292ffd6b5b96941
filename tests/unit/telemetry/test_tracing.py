"""Spans: their tree, who exports them, what is said of models, and what happens without an SDK."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased, Sampler, TraceIdRatioBased
from opentelemetry.trace import NoOpTracerProvider, StatusCode, get_current_span

from llm_orchestrator import Context, Orchestrator, step, workflow
from llm_orchestrator.engine.control import Operator
from llm_orchestrator.engine.node import registration
from llm_orchestrator.errors import RunFailed
from llm_orchestrator.model import NewRun, Retry, Usage
from llm_orchestrator.server.trace import TraceContext
from llm_orchestrator.steps.llm import LLM
from llm_orchestrator.telemetry import genai, here
from llm_orchestrator.telemetry.propagation import (
    ATTRIBUTES,
    UNTRACED,
    Trace,
    accepting,
    asked,
    incoming,
    outgoing,
)
from llm_orchestrator.telemetry.tracing import Past, Tracing
from llm_orchestrator.wire import orchestrator as wired
from llm_orchestrator.wire.telemetry import Telemetry
from tests.unit.steps.support import Play, Room, Scripted, Shelf, config, fail, say

CLIENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
RUN = "01a206d4-6549-7b37-9d2b-176ea40e235f"
PAST = Past("flow", "1", created_at=1_800_000_000_000_000)


class Spans:
    """What was exported, in that order."""

    def __init__(self, sampler: Sampler | None = None) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))

    @property
    def all(self) -> tuple[ReadableSpan, ...]:
        return self.exporter.get_finished_spans()

    @property
    def names(self) -> list[str]:
        return [span.name for span in self.all]

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.all if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        (span,) = self.named(name)
        return span


@pytest.fixture(autouse=True)
def nowhere() -> None:
    """What a test that is no coroutine binds would still be bound in the next one."""
    here.bound.set(None)
    incoming("")


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Spans:
    """Every engine of this test is traced."""
    made = Spans()
    monkeypatch.setattr(wired, "set_up", lambda *_: Telemetry(Tracing(made.provider)))
    return made


def id_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return int(span.context.span_id)


def trace_of(span: ReadableSpan) -> int:
    assert span.context is not None
    return int(span.context.trace_id)


def parent_of(span: ReadableSpan) -> int:
    return span.parent.span_id if span.parent else 0


def facts(span: ReadableSpan) -> dict[str, Any]:
    return {
        key.removeprefix("llm_orchestrator."): value
        for key, value in (span.attributes or {}).items()
    }


tries: list[int] = []


@step
async def add(a: int, b: int) -> int:
    return a + b


@step
async def flaky(number: int) -> int:
    tries.append(number)
    if len(tries) == 1:
        raise OSError("not yet")
    return number


@step(retry=Retry(1))
async def broken() -> int:
    raise ValueError("it is broken")


@step
async def headers() -> dict[str, str]:
    return outgoing()


@step
async def current() -> str:
    return f"{get_current_span().get_span_context().span_id:016x}"


@workflow
async def sums(ctx: Context, number: int) -> Any:
    first = await ctx.step(add, number, 1)
    return await ctx.step(flaky, first)


@workflow
async def fails(ctx: Context) -> Any:
    return await ctx.step(broken)


@workflow
async def asks(ctx: Context) -> list[Any]:
    return [await ctx.step(headers), await ctx.step(current)]


@workflow
async def parent(ctx: Context) -> Any:
    return await ctx.run(sums, 1)


@workflow
async def gated(ctx: Context) -> Any:
    await ctx.step(add, 1, 1)
    return await ctx.wait_signal("go")


async def test_a_run_its_stay_its_steps_and_attempts_are_a_tree(
    tmp_path: Path, spans: Spans
) -> None:
    tries.clear()
    async with Orchestrator(f"sqlite:///{tmp_path}/a.db") as engine:
        run_id = await engine.start(sums, {"number": 1})
        assert await engine.result(run_id) == 2

    run, stay = spans.one("run sums"), spans.one("stay sums")
    whole, tried = spans.one("step flaky"), spans.named("attempt flaky")
    assert len({trace_of(span) for span in spans.all}) == 1
    assert (parent_of(run), parent_of(stay), parent_of(whole)) == (0, id_of(run), id_of(stay))
    assert [parent_of(span) for span in tried] == [id_of(whole)] * 2
    assert [facts(span)["attempt"] for span in tried] == [1, 2]
    assert [span.status.status_code for span in tried] == [StatusCode.ERROR, StatusCode.UNSET]
    assert tried[0].status.description == "OSError: not yet"
    assert facts(tried[0])["error.type"] == "OSError"
    assert facts(whole)["attempts"] == 2
    assert facts(run)["run.state"] == facts(stay)["run.state"] == "completed"
    assert facts(run)["run.id"] == run_id
    assert sorted(spans.names) == sorted(
        [
            *("run sums", "stay sums", "step add", "attempt add"),
            "step flaky",
            *["attempt flaky"] * 2,
        ]
    )


async def test_a_failed_run_says_why_on_each_level(tmp_path: Path, spans: Spans) -> None:
    async with Orchestrator(f"sqlite:///{tmp_path}/a.db") as engine:
        with pytest.raises(RunFailed):
            await engine.run(fails)
    assert {span.name: span.status.status_code for span in spans.all} == dict.fromkeys(
        ["attempt broken", "step broken", "stay fails", "run fails"], StatusCode.ERROR
    )
    assert facts(spans.one("step broken"))["error.type"] == "ValueError"
    assert not any(span.events for span in spans.all)  # no tracebacks


async def test_the_accepting_requests_trace_goes_on_in_the_run_and_in_its_requests(
    tmp_path: Path, spans: Spans
) -> None:
    async with Orchestrator(f"sqlite:///{tmp_path}/a.db") as engine:
        incoming(CLIENT)
        run_id = await engine.start(asks)
        incoming("")
        header, nested = await engine.result(run_id)
        kept = (await engine.operator.state(run_id)).accepted["origin"]
    assert kept == {"traceparent": CLIENT}
    assert f"{trace_of(spans.one('run asks')):032x}" == CLIENT[3:35]
    assert f"{parent_of(spans.one('run asks')):016x}" == CLIENT[36:52]
    tried = spans.one("attempt headers")
    assert header == {"traceparent": f"00-{CLIENT[3:35]}-{id_of(tried):016x}-01"}
    assert nested == f"{id_of(spans.one('attempt current')):016x}"  # the author's spans go below


async def test_without_an_sdk_the_requests_trace_is_passed_on_as_it_came(tmp_path: Path) -> None:
    async with Orchestrator(f"sqlite:///{tmp_path}/a.db") as engine:
        incoming(CLIENT)
        run_id = await engine.start(asks)
        incoming("")
        header, _ = await engine.result(run_id)
        assert header == {"traceparent": CLIENT}
        assert await engine.run(asks) == [{}, "0" * 16]


async def test_a_child_is_in_its_parents_trace(tmp_path: Path, spans: Spans) -> None:
    async with Orchestrator(f"sqlite:///{tmp_path}/a.db") as engine:
        await engine.run(parent)
    stays = {id_of(span) for span in spans.named("stay parent")}
    assert parent_of(spans.one("run sums")) in stays
    assert len({trace_of(span) for span in spans.all}) == 1


async def test_a_run_that_parked_goes_on_in_the_same_trace(tmp_path: Path, spans: Spans) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    parked = asyncio.Event()

    def publish(*told: Any) -> None:
        if told[1:3] == ("waiting", ""):  # the run as a whole
            parked.set()

    async with Orchestrator(url, workflows=[gated], publish=publish) as engine:
        run_id = await engine.start(gated)
        await parked.wait()
    assert "run gated" not in spans.names
    async with Orchestrator(url, workflows=[gated]) as engine:  # another process life
        await engine.operator.signal(run_id, "go", 5)
        assert await engine.result(run_id) == 5
    first, second = spans.named("stay gated")
    run = spans.one("run gated")
    assert parent_of(first) == parent_of(second) == id_of(run)
    assert [link.context.span_id for link in second.links] == [id_of(first)]
    assert not first.links
    assert len({trace_of(span) for span in spans.all}) == 1
    assert spans.names.count("step add") == 1  # it was replayed, not done


async def test_a_run_that_ended_and_is_retried_has_another_span(
    tmp_path: Path, spans: Spans
) -> None:
    async with Orchestrator(f"sqlite:///{tmp_path}/a.db") as engine:
        run_id = await engine.start(fails)
        for _ in range(2):
            with pytest.raises(RunFailed):
                await engine.result(run_id)
            await engine.operator.retry(run_id)
        with pytest.raises(RunFailed):
            await engine.result(run_id)
    runs = spans.named("run fails")
    assert len({id_of(span) for span in spans.all}) == len(spans.all)
    assert [[link.context.span_id for link in run.links] for run in runs] == [
        [],
        [id_of(runs[0])],
        [id_of(runs[1])],
    ][: len(runs)]
    assert len(runs) >= 2


# -- lives that end in the middle --------------------------------------------------------------


def life(spans: Spans, epoch: int, **past: Any) -> Trace:
    """A process that takes the run, with a generator of ids of its own."""
    fields = {name: getattr(PAST, name) for name in ("workflow", "version", "created_at")}
    stay = here.Stay(RUN, epoch, f"node-{epoch}")
    return Tracing(spans.provider).begin(stay, Past(**{**fields, **past}))


def attempt(trace: Trace, key: str, number: int) -> None:
    trace.leave(trace.enter(key, number))


def test_what_a_node_had_in_flight_when_it_died_appears_once() -> None:
    spans = Spans()
    first = life(spans, 1)
    attempt(first, "a", 1)
    first.finished("a", 1)
    attempt(first, "b", 1)  # it dies here: nothing of this is exported
    second = life(spans, 2, stay_epoch=1, stay_at=1_800_000_001_000_000, lost_node="node-1")
    attempt(second, "b", 1)
    second.finished("b", 1)
    second.left("completed", "", None, is_final=True)

    assert len({id_of(span) for span in spans.all}) == len(spans.all)
    run = spans.one("run flow")
    lost, stay = sorted(spans.named("stay flow"), key=lambda span: facts(span)["epoch"])
    assert parent_of(lost) == parent_of(stay) == id_of(run)
    assert parent_of(spans.one("step a")) == id_of(lost)  # no span is without its parent
    assert lost.start_time == 1_800_000_001_000_000_000
    assert (facts(lost)["node"], facts(lost)["error.type"]) == ("node-1", "node_lost")
    assert spans.names.count("attempt b") == spans.names.count("step b") == 1
    assert len({trace_of(span) for span in spans.all}) == 1


def test_a_node_that_lost_its_run_exports_nothing_more_of_it() -> None:
    spans = Spans()
    life(spans, 1)
    assert spans.all == ()


def test_a_step_is_one_span_however_many_lives_it_took() -> None:
    spans = Spans()
    first = life(spans, 1)
    attempt(first, "a", 1)
    first.failed("a", 1, {"kind": "timeout", "message": "late"}, is_final=False)
    second = life(spans, 2, stay_epoch=1)
    attempt(second, "a", 2)
    second.finished("a", 2)
    whole = spans.one("step a")
    assert [parent_of(span) for span in spans.named("attempt a")] == [id_of(whole)] * 2


def test_an_attempt_that_is_begun_again_is_exported_once() -> None:
    spans = Spans()
    trace = life(spans, 1)
    attempt(trace, "a", 1)  # its provider was away: it left no entry
    attempt(trace, "a", 1)
    trace.finished("a", 1)
    assert spans.names == ["attempt a", "step a"]


def test_a_step_that_a_rewind_took_back_is_another_one() -> None:
    spans = Spans()
    for mark in ("", "@7"):
        trace = life(spans, 1, mark=lambda _, mark=mark: mark)
        attempt(trace, "a", 1)
        trace.finished("a", 1)
    assert len({id_of(span) for span in spans.named("step a")}) == 2


def test_lives_agree_on_whether_a_run_is_sampled_and_about_half_are() -> None:
    spans = Spans(ParentBased(TraceIdRatioBased(0.5)))
    for number in range(400):
        stay = here.Stay(f"run-{number}", 1)
        for epoch in (1, 2):
            past = Past("flow", "1", 1_800_000_000_000_000)
            trace = Tracing(spans.provider).begin(here.Stay(stay.run_id, epoch), past)
            trace.left("released", "", None, is_final=False)
    seen = [facts(span)["run.id"] for span in spans.all]
    assert {seen.count(run_id) for run_id in seen} == {2}
    assert 120 < len(set(seen)) < 280


def test_a_trace_that_its_sender_does_not_sample_is_not_sampled_here() -> None:
    spans = Spans()
    stay = here.Stay(RUN, 1, traceparent=CLIENT[:-2] + "00")
    trace = Tracing(spans.provider).begin(stay, PAST)
    place = trace.enter("a", 1)
    assert outgoing()["traceparent"].endswith("-00")
    assert outgoing()["traceparent"].startswith(CLIENT[:35])
    asked(genai.Asked("chat", "openai", "m"))
    trace.leave(place)
    trace.finished("a", 1)
    trace.left("completed", "", None, is_final=True)
    assert spans.all == ()
    assert Spans(ALWAYS_OFF).all == ()


# -- what is taken from others -----------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        "",
        "00",
        CLIENT.upper(),
        CLIENT + "-00",
        "ff" + CLIENT[2:],
        CLIENT.replace("4bf92f3577b34da6a3ce929d0e0e4736", "0" * 32),
        CLIENT.replace("00f067aa0ba902b7", "0" * 16),
        CLIENT + "\n00",
        "x" * 10_000,
    ],
)
def test_a_header_of_another_form_is_ignored(header: str) -> None:
    incoming(header)
    assert accepting() == ""


def test_a_run_accepted_inside_a_span_belongs_to_its_trace() -> None:
    spans = Spans()
    incoming("")
    with spans.provider.get_tracer("app").start_as_current_span("request") as span:
        context = span.get_span_context()
        assert accepting() == f"00-{context.trace_id:032x}-{context.span_id:016x}-01"
    assert accepting() == ""


async def test_the_server_reads_the_header_of_each_request() -> None:
    heard: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        heard.append(accepting())

    async def nothing(*_: Any) -> Any: ...

    name = b"traceparent"
    for headers_of in ([(name, CLIENT.encode())], [], [(name, CLIENT.encode())] * 2):
        await TraceContext(app)({"type": "http", "headers": headers_of}, nothing, nothing)
    assert heard == [CLIENT, "", ""]


async def test_an_operators_request_keeps_the_trace_with_the_run(tmp_path: Path) -> None:
    async with Orchestrator(f"sqlite:///{tmp_path}/a.db", workflows=[gated]) as engine:
        await engine.operator.register(registration(gated))
        operator = Operator(engine.store, engine.clock)
        incoming(CLIENT)
        new = NewRun(RUN, gated.name, gated.version, gated.digest, wake_at=1 << 60, input={})
        await operator.accept(new)
        forked = await operator.fork(RUN, None)
        incoming("")
        origins = [(await operator.state(run_id)).accepted["origin"] for run_id in (RUN, forked)]
    assert [origin["traceparent"] for origin in origins] == [CLIENT, CLIENT]
    assert origins[1]["fork"] == RUN


# -- what is said of models --------------------------------------------------------------------


ANSWERS = say(
    "the secret answer",
    model="gpt-x-2026",
    usage=Usage(11, 7, 3, 0.25),
    response_id="resp-1",
    resumed_from_tokens=4,
)


async def ask(spans: Spans, names: genai.Version, play: Play) -> ReadableSpan:
    trace = Tracing(spans.provider, names=names).begin(here.Stay(RUN, 1), PAST)
    place = trace.enter("ask", 1, is_paid=True)
    shelf = Shelf(llms={"openai": Scripted("openai", play)})
    asking = config("llm", provider="openai", model="gpt-x", prompt="the secret question")
    try:
        await LLM().execute(Room(providers=shelf), asking)
        trace.finished("ask", 1)
    except OSError as error:
        trace.failed("ask", 1, {"kind": type(error).__name__, "message": "no"}, is_final=True)
    trace.leave(place)
    return spans.named("chat gpt-x")[-1]


@pytest.mark.parametrize(
    ("names", "own", "absent"),
    [
        (
            "latest",
            {"gen_ai.provider.name", "gen_ai.usage.cache_read.input_tokens"},
            {"gen_ai.system"},
        ),
        (
            "v1.36",
            {"gen_ai.system"},
            {"gen_ai.provider.name", "gen_ai.usage.cache_read.input_tokens"},
        ),
        ("both", {"gen_ai.system", "gen_ai.provider.name"}, set()),
    ],
)
async def test_an_answers_facts_have_the_chosen_names_and_no_content(
    names: genai.Version, own: set[str], absent: set[str]
) -> None:
    span = await ask(Spans(), names, ANSWERS)
    said = dict(span.attributes or {})
    assert own <= set(said)
    assert not absent & set(said)
    assert {said[key] for key in own & {"gen_ai.system", "gen_ai.provider.name"}} == {"openai"}
    assert {key: said[key] for key in said if key.startswith("gen_ai.re") or "put" in key} == {
        "gen_ai.request.model": "gpt-x",
        "gen_ai.response.model": "gpt-x-2026",
        "gen_ai.response.id": "resp-1",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 11,
        "gen_ai.usage.output_tokens": 7,
        **({} if names == "v1.36" else {"gen_ai.usage.cache_read.input_tokens": 3}),
    }
    assert said["llm_orchestrator.cost_usd"] == 0.25
    assert said["llm_orchestrator.resumed_from_tokens"] == 4
    assert "secret" not in span.to_json()


async def test_a_model_that_does_not_answer_is_named() -> None:
    span = await ask(Spans(), "latest", fail(OSError("gone")))
    said = dict(span.attributes or {})
    assert (said["gen_ai.provider.name"], said["gen_ai.request.model"]) == ("openai", "gpt-x")
    assert "gen_ai.usage.input_tokens" not in said
    assert span.status.status_code is StatusCode.ERROR


# -- without --------------------------------------------------------------------------------------


def test_without_tracing_only_the_place_is_known() -> None:
    outside = here.current()
    place = UNTRACED.enter("a", 3)
    now = here.current()
    assert now is not None
    assert (now.step, now.attempt, now.recording) == ("a", 3, None)
    asked(genai.Asked("chat", "openai", "m"))
    assert outgoing() == {}
    UNTRACED.leave(place)
    assert here.current() == outside


def test_a_provider_that_is_no_sdk_is_refused() -> None:
    with pytest.raises(ValueError, match="NoOpTracerProvider"):
        Tracing(NoOpTracerProvider())


def test_every_attribute_of_ours_is_documented() -> None:
    spans = Spans()
    trace = life(spans, 2, stay_epoch=1, lost_node="x")
    attempt(trace, "a", 1)
    trace.failed("a", 1, {"kind": "k"}, is_final=True)
    place = trace.enter("b", 1)
    asked(genai.Asked("chat", "p", "m", "m"), cost_usd=1.0, resumed_from_tokens=2)
    trace.leave(place)
    trace.finished("b", 1)
    trace.left("failed", "timeout", {"kind": "timeout"}, is_final=True)
    said = {key for span in spans.all for key in span.attributes or {}}
    assert {f"llm_orchestrator.{key}" for key in ATTRIBUTES} == {
        key for key in said if not key.startswith(("gen_ai.", "error."))
    }
