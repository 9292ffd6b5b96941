"""No form of a remembered value is left in a text, and nothing else is touched."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import cast
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.trace import Span, Status

from llm_orchestrator.config import load_config, resolve_secret
from llm_orchestrator.engine.failure import MESSAGE_CHARACTERS_MAX, describe
from llm_orchestrator.errors import ProviderError
from llm_orchestrator.providers.failures import EXCERPT_MAX, excerpt
from llm_orchestrator.security.audit import pack
from llm_orchestrator.telemetry import redact
from llm_orchestrator.telemetry.redact import CHARACTERS_MIN, Registry, Veil, passwords_in
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


def test_the_depth_of_a_value_is_no_limit(registry: Registry) -> None:
    value: list[object] = [SECRET]
    for _ in range(5_000):
        value = [value]
    found = registry.redact_json(value)
    while isinstance(found, list):
        found = found[0]
    assert found == "***"


@pytest.mark.parametrize("value", [SECRET, "x" + SECRET, {SECRET: 1}, [{"a": [SECRET]}]])
@pytest.mark.parametrize("is_ascii", [True, False])
def test_json_that_holds_one_is_known_by_its_text(
    registry: Registry, value: object, is_ascii: bool
) -> None:
    once = json.dumps(value, ensure_ascii=is_ascii)
    assert registry.is_in(once)
    assert registry.is_in(json.dumps({"inner": once}, ensure_ascii=False))
    assert not registry.is_in(json.dumps([SECRET[:-1], SECRET[1:]], ensure_ascii=is_ascii))


def test_json_of_every_form_is_known_by_its_text(registry: Registry) -> None:
    forms = registry._forms
    assert len(forms) > 10
    for form in forms:
        assert registry.is_in(json.dumps({"a": f"x{form}y"}, ensure_ascii=False)), form


@pytest.mark.parametrize(
    ("secret", "is_word"),
    [("password", True), ("completions", True), ("pass-word", False), ("passw0rds", False),
     ("Password", False), ("correcthorsebattery", False), ("12345678", False)],
)  # fmt: skip
def test_a_plain_word_stays_in_data_and_in_nothing_else(secret: str, is_word: bool) -> None:
    redact.remember(secret)
    assert redact.redact(f"the {secret}") == "the ***"
    assert redact.is_in_data(f'"the {secret}"') is not is_word
    assert redact.redact_data([f"the {secret}"]) == [f"the {secret}" if is_word else "the ***"]


PIECES = st.lists(
    st.one_of(
        st.sampled_from(["abcdefgh", "abcdefgh-more", "abcd", "efgh-", "h-more", "a", "YWJj"]),
        st.text("abcdefgh-YWJjZGVmZ2g= ", max_size=6),
    ),
    max_size=12,
)


@given(PIECES)
def test_a_text_in_pieces_is_cleaned_as_if_it_came_whole(pieces: list[str]) -> None:
    registry = Registry()
    registry.remember("abcdefgh")
    registry.remember("abcdefgh-more")
    veil, whole = Veil(registry), "".join(pieces)
    shown = "".join([veil.push(piece) for piece in pieces])
    assert "abcdefgh" not in shown
    assert shown + veil.rest() == registry.redact(whole)


def test_a_secret_whose_end_may_begin_another_does_not_wait_in_the_open() -> None:
    registry = Registry()
    registry.remember("kx9-planted")
    registry.remember("planted-zz8-other")
    veil = Veil(registry)
    assert veil.push("a kx9-planted") == "a ***"
    assert veil.push("-zz8-other!") == "-zz8-other!"
    assert veil.push("a planted-") == "a "
    assert veil.push("zz8-other!") == "***!"


def test_of_a_text_in_pieces_only_what_may_become_one_is_held_back() -> None:
    registry = Registry()
    registry.remember("kx9-planted")
    veil = Veil(registry)
    assert veil.push("a word, ") == "a word, "
    assert veil.push("then kx9-pl") == "then "
    assert veil.push("ace: kx9-") == "kx9-place: "
    assert veil.push("plant") == ""
    assert veil.push("ed!") == "***!"
    assert veil.push("kx9") == ""
    veil.drop()
    assert veil.push("-planted") == "-planted"
    assert veil.push("kx") == ""
    assert veil.rest() == "kx"
    assert veil.rest() == ""


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
