"""Where spans go: by configuration, by the process's own SDK, nowhere; and how sending ends."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from llm_orchestrator.config import Config, load_config
from llm_orchestrator.errors import ConfigError
from llm_orchestrator.wire import telemetry
from llm_orchestrator.wire.telemetry import Announced, Telemetry, set_up

LOCAL = "http://localhost:4318"


def endpoint(tmp_path: Path, environ: Mapping[str, str], text: str = "") -> tuple[str, str]:
    file = tmp_path / "llm-orchestrator.toml"
    file.write_text(text)
    config = load_config(environ=environ, file=file)
    return config.otel_endpoint, config.origins.get("otel_endpoint", "")


@pytest.mark.parametrize(
    ("environ", "text", "url", "origin"),
    [
        ({}, "", "", ""),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": LOCAL},
            "",
            f"{LOCAL}/v1/traces",
            "OTEL_EXPORTER_OTLP_ENDPOINT",
        ),
        (
            {
                "OTEL_EXPORTER_OTLP_ENDPOINT": "x",
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{LOCAL}/t",
            },
            "",
            f"{LOCAL}/t",
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
        ),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": LOCAL, "OTEL_TRACES_EXPORTER": "none"},
            "",
            "",
            "OTEL_TRACES_EXPORTER",
        ),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": LOCAL, "OTEL_SDK_DISABLED": "true"},
            "",
            "",
            "OTEL_SDK_DISABLED",
        ),
        ({}, f'otel_endpoint = "{LOCAL}/"', f"{LOCAL}/v1/traces", "llm-orchestrator.toml"),
        ({}, f'otel_endpoint = "{LOCAL}/v1/traces"', f"{LOCAL}/v1/traces", "llm-orchestrator.toml"),
    ],
)
def test_opentelemetrys_own_variables_say_where(
    tmp_path: Path, environ: dict[str, str], text: str, url: str, origin: str
) -> None:
    found, where = endpoint(tmp_path, environ, text)
    assert found == url
    assert where.endswith(origin)


def test_a_password_in_the_address_is_not_shown() -> None:
    config = Config(otel_endpoint="https://user:hush@host/v1/traces")
    assert "hush" not in repr(config.settings())


@pytest.mark.parametrize(
    ("variable", "known"),
    [
        ("LOG_FORMAT", "text, json"),
        ("LOG_LEVEL", "debug, info, warning, error"),
        ("OTEL_GENAI", "latest, v1.36, both"),
    ],
)
def test_a_word_that_is_none_of_the_known_is_refused(variable: str, known: str) -> None:
    environ = {f"LLM_ORCHESTRATOR_{variable}": "loud"}
    with pytest.raises(ConfigError, match=f"'loud'.*{variable}.*{known}"):
        load_config(environ=environ)


def test_nothing_is_set_up_that_was_not_asked_for() -> None:
    assert set_up(Config(), "node") == Telemetry()


async def test_an_endpoint_makes_an_sdk_that_says_who_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "whales")
    made = set_up(Config(otel_endpoint=f"{LOCAL}/v1/traces", otel_genai="both"), "node-1")
    assert made.tracing is not None
    assert made.own is not None
    assert made.tracing.names == "both"
    resource: Resource = made.own.resource
    assert resource.attributes["service.name"] == "whales"
    assert resource.attributes["service.instance.id"] == "node-1"
    await made.close()


def test_the_processes_own_sdk_is_used_and_left_open(monkeypatch: pytest.MonkeyPatch) -> None:
    provider = TracerProvider(shutdown_on_exit=False)
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    made = set_up(Config(otel_endpoint=LOCAL), "node")
    assert made.tracing is not None
    assert made.own is None


def test_a_provider_that_cannot_be_told_its_ids_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Other(trace.TracerProvider):
        def get_tracer(self, *_: Any, **__: Any) -> trace.Tracer:
            return trace.NoOpTracer()

    monkeypatch.setattr(trace, "get_tracer_provider", Other)
    assert set_up(Config(), "node") == Telemetry()
    assert "nothing is traced" in caplog.text


def test_without_the_extra_one_line_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    assert set_up(Config(otel_endpoint=LOCAL), "node") == Telemetry()
    assert "llm-orchestrator[otel]" in caplog.text


def test_a_receiver_that_never_answers_keeps_no_process_from_ending(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(telemetry, "FLUSH_S", 0.0)
    may_end, ended = threading.Event(), threading.Event()

    class Stuck:
        def shutdown(self) -> None:
            may_end.wait()
            ended.set()

    asyncio.run(Telemetry(own=cast(TracerProvider, Stuck())).close())
    assert not ended.is_set()  # it was not waited for
    may_end.set()
    assert ended.wait(30)


class Line:
    """An exporter that is up or down, and complains like the real one."""

    def __init__(self) -> None:
        self.results: list[SpanExportResult] = []

    def export(self, spans: Any) -> SpanExportResult:
        result = self.results.pop(0)
        if result is SpanExportResult.FAILURE:
            logging.getLogger(__name__).warning("retrying")
            logging.getLogger(__name__).error("connection refused")
        return result


def test_a_receiver_that_is_down_is_said_once_and_its_return_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    line = Line()
    exporter = Announced(cast(SpanExporter, line), "https://user:hush@host/v1/traces")
    down, up = SpanExportResult.FAILURE, SpanExportResult.SUCCESS
    line.results = [up, down, down, down, up, up]
    while line.results:
        exporter.export([])
    assert [record.getMessage() for record in caplog.records] == [
        "connection refused",
        "spans cannot be sent to https://user:***@host/v1/traces; until they can they are lost",
        "spans are sent to https://user:***@host/v1/traces again",
    ]
