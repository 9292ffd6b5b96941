from __future__ import annotations

import asyncio
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llm_orchestrator import errors
from llm_orchestrator.clock import RealClock
from llm_orchestrator.providers.base import LLMResponse, Partial, Resume
from llm_orchestrator.providers.breaker import BreakerPolicy
from llm_orchestrator.providers.limits import Limit
from llm_orchestrator.providers.registry import Registry
from llm_orchestrator.providers.settings import Address, ProviderSettings
from tests.acceptance.fake_server import FakeServer, fake_server
from tests.acceptance.providers_support import Seen, ask


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    with fake_server(tmp_path_factory.mktemp("fake")) as server:
        yield server


def settings_for(fake: FakeServer) -> ProviderSettings:
    address = Address(base_url=fake.url, api_key=" sk-test-key-123456\n")
    return ProviderSettings(
        openai=address,
        anthropic=address,
        cohere=address,
        compatible={"house": address, "vllm": address},
        local_url=fake.url,
    )


async def complete(registry: Registry, name: str, prompt: str, **more: Any) -> LLMResponse:
    seen = Seen()
    return await registry.llm(name).complete(ask(prompt, **more), seen.chunk, seen.handle)


async def test_every_provider_answers_by_its_name(fake: FakeServer) -> None:
    registry = Registry(settings_for(fake), clock=RealClock())
    for name in ("openai", "anthropic", "local", "echo", "house", "vllm"):
        assert (await complete(registry, name, f"hello {name}")).text
        assert registry.llm(name) is registry.llm(name)
    for name in ("openai", "cohere", "echo", "house"):
        answer = await registry.embedding(name).embed(["one", "two"], model="m")
        assert len(answer.vectors) == 2
    await registry.close()


async def test_cohere_says_what_the_vectors_are_for_and_what_they_cost(fake: FakeServer) -> None:
    registry = Registry(settings_for(fake), clock=RealClock())
    cohere = registry.embedding("cohere")
    assert cohere.batch_size_max == 96
    answer = await cohere.embed(
        ["a", "b"], model="embed-v4.0", dimensions=256, extra={"input_type": "search_query"}
    )
    assert [len(vector) for vector in answer.vectors] == [256, 256]
    assert answer.usage.cost_usd > 0
    with pytest.raises(errors.ProviderRateLimited):
        await cohere.embed(["x [[fake: status=429]]"], model="embed-v4.0")
    await registry.close()


async def test_an_unknown_name_is_answered_with_the_nearest_and_the_list(fake: FakeServer) -> None:
    registry = Registry(settings_for(fake), clock=RealClock())
    with pytest.raises(errors.ConfigError, match=r"'opnai'; did you mean 'openai'\? \(known: ant"):
        registry.llm("opnai")
    with pytest.raises(errors.ConfigError, match="unknown embedding provider 'anthropic'"):
        registry.embedding("anthropic")
    with pytest.raises(errors.ConfigError, match=r"unknown vector store 'qdrnt'.*'qdrant'"):
        registry.vectors("qdrnt")
    assert {"openai", "house", "echo"} <= set(registry.names("llm"))


@pytest.mark.parametrize(
    ("name", "variable"), [("openai", "OPENAI_API_KEY"), ("anthropic", "ANTHROPIC_API_KEY")]
)
async def test_a_missing_key_shows_at_first_use_and_the_hint_names_it(
    name: str, variable: str
) -> None:
    registry = Registry(ProviderSettings(), clock=RealClock())
    llm = registry.llm(name)
    with pytest.raises(errors.ProviderAuthentication) as caught:
        await llm.complete(ask("x"), Seen().chunk, Seen().handle)
    assert caught.value.hint == f"set {variable}"
    with pytest.raises(errors.ProviderAuthentication) as caught:
        await registry.embedding("cohere").embed(["x"], model="m")
    assert caught.value.hint == "set COHERE_API_KEY"
    await registry.close()


@pytest.mark.parametrize(
    "address",
    [
        Address(base_url="localhost:8000"),
        Address(base_url="ftp://host/"),
        Address(base_url="http://h", api_key="sk\n-evil: header"),
        Address(base_url="http://h", resume=("magic",)),
        Address(base_url="http://h", prefill="magic"),
    ],
)
def test_a_wrong_setting_is_refused_without_showing_a_key(address: Address) -> None:
    registry = Registry(ProviderSettings(compatible={"house": address}), clock=RealClock())
    with pytest.raises(errors.ConfigError) as caught:
        registry.llm("house")
    assert "evil" not in str(caught.value)
    assert "evil" not in repr(address)


async def test_what_a_server_can_resume_is_a_setting(fake: FakeServer) -> None:
    address = Address(base_url=fake.url, resume=("prefill",))
    registry = Registry(ProviderSettings(compatible={"house": address}), clock=RealClock())
    full = await complete(registry, "house", "go on")
    answer = await complete(registry, "house", "go on", partial=Partial(full.text[:12]))
    assert (answer.resumed, answer.text) == (Resume.PREFILL, full.text)
    plain = Registry(
        ProviderSettings(compatible={"house": replace(address, resume=())}), clock=RealClock()
    )
    answer = await complete(plain, "house", "go on", partial=Partial(full.text[:12]))
    assert answer.resumed is Resume.RESTART
    await registry.close()
    await plain.close()


async def test_an_outage_parks_calls_and_nothing_more_is_sent(fake: FakeServer) -> None:
    policy = BreakerPolicy(failures_max=3, open_s=30)
    registry = Registry(replace(settings_for(fake), breaker=policy), clock=RealClock())
    for _ in range(3):
        with pytest.raises(errors.ProviderTransient):
            await complete(registry, "openai", "outage [[fake: status=503]]")
    for _ in range(20):
        with pytest.raises(errors.ProviderUnavailable):
            await complete(registry, "openai", "outage [[fake: status=503]]")
    assert len(fake.arrived("outage")) == 3
    assert (await complete(registry, "openai", "other model", model="other")).text
    await registry.close()


async def test_a_limit_holds_at_the_provider_under_a_crowd(fake: FakeServer) -> None:
    settings = replace(settings_for(fake), limits={"house": Limit(requests_per_minute=10)})
    registry = Registry(settings, clock=RealClock())
    answers = await asyncio.gather(
        *(complete(registry, "house", f"limited {n}") for n in range(50)), return_exceptions=True
    )
    refused = [a for a in answers if isinstance(a, errors.ProviderUnavailable)]
    assert len(fake.arrived("limited")) == 50 - len(refused)
    assert 10 <= 50 - len(refused) <= 12
    assert all(a.retry_after_s and a.retry_after_s > 0 for a in refused)
    await registry.close()


async def test_a_provider_comes_from_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "parrot-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: parrot\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[llm_orchestrator.providers]\nparrot = parrot_plugin:make\nbroken = parrot_plugin:gone\n"
        "[llm_orchestrator.vector_stores]\nnest = parrot_plugin:Nest\n"
    )
    (tmp_path / "parrot_plugin.py").write_text(
        textwrap.dedent("""
            from llm_orchestrator.model import Usage
            from llm_orchestrator.providers.base import LLMResponse

            class Parrot:
                name = "parrot"
                def __init__(self, word):
                    self.word = word
                async def complete(self, request, on_chunk, on_handle):
                    return LLMResponse(self.word, request.model, Usage())
                async def close(self):
                    pass

            def make(*, clock, options):
                return Parrot(options["word"])

            class Nest:
                name = "nest"
                def __init__(self, *, clock, options): pass
                async def search(self): pass
                async def close(self): pass
        """)
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    settings = ProviderSettings(plugins={"parrot": {"word": "polly"}})
    registry = Registry(settings, clock=RealClock())
    assert (await complete(registry, "parrot", "hello")).text == "polly"
    assert registry.vectors("nest").name == "nest"
    with pytest.raises(errors.ConfigError, match="has no 'embed'"):
        registry.embedding("parrot")
    with pytest.raises(errors.ConfigError, match="cannot be loaded"):
        registry.llm("broken")
    assert "parrot" in registry.names("llm")
    await registry.close()
