"""No form of a remembered value is left in a text, and nothing else is touched."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import cast
from urllib.parse import quote, quote_plus

import pytest
from opentelemetry.trace import Span, Status

from llm_orchestrator.config import load_config, resolve_secret
from llm_orchestrator.engine.failure import MESSAGE_CHARACTERS_MAX, describe
from llm_orchestrator.errors import ProviderError
from llm_orchestrator.providers.failures import EXCERPT_MAX, excerpt
from llm_orchestrator.security.audit import pack
from llm_orchestrator.telemetry import redact
from llm_orchestrator.telemetry.redact import CHARACTERS_MIN, Registry, passwords_in
from llm_orchestrator.telemetry.tracing import _fail

SECRET = 'k3y/+ "ü\\ & tab\tend'


@pytest.fixture
def registry() -> Registry:
    made = Registry()
    made.remember(SECRET)
    return made


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """Stands for the process's own registry in the configuration."""
    made = Registry()
    monkeypatch.setattr("llm_orchestrator.config.remember", made.remember)
    return made


@pytest.mark.parametrize(
    "form",
    [
        SECRET,
        " ".join(SECRET.split()),
        repr(SECRET)[1:-1],
        json.dumps(SECRET)[1:-1],
        json.dumps(SECRET, ensure_ascii=False)[1:-1],
        quote(SECRET),
        quote(SECRET, safe=""),
        re.sub("%..", lambda found: found[0].lower(), quote(SECRET, safe="")),
        quote_plus(SECRET),
        base64.b64encode(SECRET.encode()).decode(),
        base64.b64encode(SECRET.encode()).decode().rstrip("="),
        base64.urlsafe_b64encode(SECRET.encode()).decode(),
    ],
)
def test_every_form_goes(registry: Registry, form: str) -> None:
    assert registry.redact(f"before {form} after") == "before *** after"


@pytest.mark.parametrize("before", ["", "a", "ab", "abc", "user:"])
@pytest.mark.parametrize("after", ["", "z", "zy", "zyx"])
def test_base64_of_something_longer_holds_it_no_more(before: str, after: str) -> None:
    registry = Registry()
    registry.remember("planted-secret-1")
    text = base64.b64encode(f"{before}planted-secret-1{after}".encode()).decode()
    left = registry.redact(text)
    assert "***" in left
    assert len(left) - len("***") <= len(text) - len("planted-secret-1") * 8 // 6 + 1


def test_the_longer_value_goes_first(registry: Registry) -> None:
    registry.remember("abcdefgh")
    registry.remember("abcdefgh-and-more")
    assert registry.redact("abcdefgh-and-more abcdefgh") == "*** ***"


def test_short_values_stay_and_so_does_everything_without_a_secret(registry: Registry) -> None:
    short = "s" * (CHARACTERS_MIN - 1)
    registry.remember(short)
    registry.remember("")
    text = f"{short} and *** and {SECRET[:-1]}"
    assert registry.redact(text) == text


def test_json_is_cleaned_at_every_depth_and_keeps_its_shape(registry: Registry) -> None:
    value = {"a": [1, None, True, 2.5, {SECRET: f"x{SECRET}"}], "b": SECRET}
    assert registry.redact_json(value) == {"a": [1, None, True, 2.5, {"***": "x***"}], "b": "***"}


def test_nothing_is_remembered_nothing_is_copied() -> None:
    value = {"a": [SECRET]}
    assert Registry().redact_json(value) is value


def test_the_value_used_last_outlives_older_ones() -> None:
    registry = Registry(values_max=2)
    for value in ("value-one", "value-two", "value-one", "value-three"):
        registry.remember(value)
    assert registry.redact("value-one value-two value-three") == "*** value-two ***"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://me:p%40ss@host/db", {"p%40ss", "p@ss"}),
        ("postgresql://host/db?user=me&password=hidden%21#x", {"hidden%21", "hidden!"}),
        ("postgresql://me@host/db", set()),
        ("postgresql://postgres:postgres@host/db", set()),
        ("sqlite:////data/runs.db", set()),
        ("", set()),
    ],
)
def test_passwords_in_urls(url: str, expected: set[str]) -> None:
    assert set(passwords_in(url)) == expected


def test_the_configuration_remembers_its_secrets_and_no_addresses(
    own: Registry, tmp_path: Path
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('[providers.house]\nbase_url = "http://me:in-base-url@h"\napi_key_env = "HK"\n')
    environ = {
        "LLM_ORCHESTRATOR_URL": "postgresql://me:in-store-url@h/db",
        "LLM_ORCHESTRATOR_DIRECT_URL": "postgresql://me:in-direct-url@h/db",
        "LLM_ORCHESTRATOR_TOKEN": "the-api-token",
        "OPENAI_API_KEY": "the-openai-key",
        "HK": "the-house-key",
        "OPENAI_BASE_URL": "http://address.example/v1",
        "PINECONE_HOST": "pinecone.example",
    }
    load_config(environ=environ, file=file)
    urls = ["in-base-url", "in-store-url", "in-direct-url"]
    secrets = [*urls, "the-api-token", "the-openai-key", "the-house-key"]
    assert own.redact(" ".join(secrets)) == " ".join(["***"] * len(secrets))
    for address in ("http://address.example/v1", "pinecone.example"):
        assert own.redact(address) == address


def test_a_reference_is_remembered_when_it_is_resolved(
    own: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANTED", "from-the-environment")
    file = tmp_path / "secret"
    file.write_text("from-the-file\n")
    assert resolve_secret("env:PLANTED") == "from-the-environment"
    assert resolve_secret(f"file:{file}") == "from-the-file"
    assert own.redact("from-the-environment from-the-file") == "*** ***"


def test_the_process_has_one_registry() -> None:
    text = "a-value-of-this-test-alone"
    assert redact.redact(text) == text
    redact.remember(text)
    assert redact.redact(text) == "***"
    assert redact.redact_json([text]) == ["***"]


@pytest.fixture
def planted() -> str:
    """A value that the process itself knows."""
    redact.remember("planted/in+this-test")
    return "planted/in+this-test"


def test_errors_in_the_journal_hold_none_not_even_where_they_are_cut(planted: str) -> None:
    error = ProviderError("x" * (MESSAGE_CHARACTERS_MAX - 4) + planted, hint=f"use {planted}")
    facts = describe(error)
    assert facts["message"] == "x" * (MESSAGE_CHARACTERS_MAX - 4) + "***"
    assert facts["hint"] == "use ***"


def test_excerpts_of_answers_hold_no_encoded_one_where_they_are_cut(planted: str) -> None:
    encoded = base64.b64encode(planted.encode()).decode()
    text = "x " * (EXCERPT_MAX // 2 - 8) + encoded
    assert excerpt(text).endswith("x ***")


def test_a_span_says_none(planted: str) -> None:
    class Spy:
        said = ""

        def set_attribute(self, *_: object) -> None: ...

        def set_status(self, status: Status) -> None:
            self.said = str(status.description)

    spy = Spy()
    _fail(cast("Span", spy), {"kind": "k", "message": f"no {planted}"})
    assert spy.said == "no ***"


def test_the_audit_log_holds_none(planted: str) -> None:
    assert json.loads(pack({"reason": f"was {planted}"})) == {"reason": "was ***"}
