from __future__ import annotations

import subprocess
import sys

import pytest

from llm_orchestrator.model import Usage
from llm_orchestrator.providers.prices import PriceBook


def test_cached_tokens_are_cheaper_and_the_tokens_stay_as_they_are() -> None:
    book = PriceBook()
    plain = book.price("openai", "gpt-4o-mini", used=Usage(1000, 100))
    cached = book.price("openai", "gpt-4o-mini", used=Usage(1000, 100, 500))
    assert plain.usage.cost_usd == pytest.approx(0.00021)
    assert cached.usage.cost_usd == pytest.approx(0.0001725)
    assert (cached.usage.input_tokens, cached.usage.cached_tokens) == (1000, 500)


def test_an_unknown_model_costs_nothing_and_says_so() -> None:
    book = PriceBook()
    for _ in range(2):
        priced = book.price("openai", "gpt-of-tomorrow", used=Usage(5, 5))
        assert priced.usage == Usage(5, 5)
        assert not priced.is_priced
    assert not book.price("a company of one", "x", used=Usage(5)).is_priced


def test_what_runs_here_is_free_and_known() -> None:
    for provider in ("echo", "local"):
        assert PriceBook().price(provider, "any", used=Usage(5, 5)).is_priced


def test_importing_the_module_does_not_load_the_table() -> None:
    code = "import sys, llm_orchestrator.providers.registry as r; print(sorted(sys.modules))"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    for heavy in ("genai_prices", "aiohttp", "pydantic", "numpy"):
        assert f"'{heavy}'" not in shown
